"""Batches, as the official client makes them: real API server, orchestrator and workers."""

from collections.abc import Iterator
from contextlib import closing

import openai
import pytest

from .batches import create, ended, ids, jsonl, line, results
from .conftest import shared_stack
from .stack import Stack


@pytest.fixture(scope="module")
def batch_stack() -> Iterator[Stack]:
    """A stack with a fast echo worker, a scripted embedder and an orchestrator."""
    with shared_stack("--model", "echo", "--engine", "echo", "--token-delay-ms", "1") as stack:
        stack.start_scripted_worker("embedder", "embed")
        stack.start("orchestrator", "orchestrator")
        yield stack


@pytest.fixture(scope="module")
def client(batch_stack: Stack) -> Iterator[openai.OpenAI]:
    with closing(batch_stack.client()) as made:
        yield made


def test_a_batch_is_validated_worked_on_and_completed(client: openai.OpenAI) -> None:
    batch = create(client, jsonl(line(n, f"text {n}") for n in range(25)), metadata={"run": "first"})
    assert (batch.status, batch.metadata, batch.object) == ("validating", {"run": "first"}, "batch")
    assert batch.request_counts is not None
    assert batch.request_counts.total == 0
    batch = ended(client, batch)
    assert batch.status == "completed", batch
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (25, 25, 0)
    assert batch.error_file_id is None
    assert batch.expires_at == batch.created_at + 86400
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times, key=lambda at: at or 0)
    assert None not in times
    assert (batch.failed_at, batch.expired_at, batch.cancelling_at, batch.cancelled_at) == (None,) * 4
    assert batch.model == "echo"
    assert batch.usage is not None
    assert batch.usage.input_tokens == 50
    assert batch.usage.output_tokens == 50
    found = results(client, batch.output_file_id)
    assert sorted(ids(found)) == sorted(f"line-{n}" for n in range(25))
    for one in found:
        said = one["response"]["body"]["choices"][0]["message"]["content"]
        assert said == f"text {one['custom_id'].removeprefix('line-')}"
        assert (one["error"], one["response"]["status_code"]) == (None, 200)
        assert one["id"].startswith("batch_req_")
        assert one["response"]["request_id"]
    assert batch.output_file_id is not None
    file = client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
