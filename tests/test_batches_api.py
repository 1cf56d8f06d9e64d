"""Batches, as the official client makes them: real API server, orchestrator and workers."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from fastchat_q.api.batch_lines import RawLine, asked, envelope
from fastchat_q.api.endpoints import ENDPOINTS
from openai.types.responses import Response

from fastchat_q.errors import RequestTooLargeError
from fastchat_q.settings import Settings

from .batches import CHAT, Endpoint, create, ended, ids, jsonl, line, parsed, results
from .conftest import shared_stack
from .http_client import get
from .servers import wait_until
from .stack import API_KEY, Stack


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


def test_a_bad_body_is_the_trouble_of_its_line_alone(client: openai.OpenAI) -> None:
    lines = [
        line(0, "good"),
        line(1, temperature=99),
        line(2, messages=[]),
        line(3, model="embedder"),
        line(4, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.b/c"}}]}]),
        line(5, ""),
    ]
    batch = ended(client, create(client, jsonl(lines)))
    assert batch.status == "completed"
    assert batch.model is None, "its lines name several"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 5)
    assert ids(results(client, batch.output_file_id)) == ["line-0"]
    errors = {one["custom_id"]: one for one in results(client, batch.error_file_id)}
    found = {name: (one["response"]["status_code"], one["error"]) for name, one in errors.items()}
    assert found == {f"line-{n}": (400, None) for n in range(1, 6)}
    bodies = {name: one["response"]["body"]["error"] for name, one in errors.items()}
    assert bodies["line-1"]["param"] == "temperature"
    assert bodies["line-3"]["code"] == "model_kind"
    assert bodies["line-4"]["code"] == "remote_url"
    assert "repeats the last user message" in bodies["line-5"]["message"], "the worker said it"


@pytest.mark.parametrize("url", sorted(ENDPOINTS))
def test_a_line_is_no_larger_than_a_request(url: str, tmp_path: Path) -> None:
    """Room for images is for endpoints that take some, and for the images."""
    settings = Settings(state_dir=tmp_path, max_body_bytes=1024 * 1024)
    field = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}.get(url, "input")

    def look(size: int) -> None:
        text = "x" * size
        body = {"model": "echo", field: [{"role": "user", "content": text}] if field == "messages" else text}
        raw = json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()
        found = RawLine(1, 0, len(raw), raw)
        asked(found, envelope(found, url), url, settings)

    look(1000)
    with pytest.raises(RequestTooLargeError, match="the limit is 1048576"):
        look(settings.max_body_bytes)


GOOD = line(0)
WRONG: list[tuple[str, bytes, list[tuple[str, int | None, str | None]]]] = [
    ("json", jsonl([GOOD]) + b"{no\n", [("invalid_json_line", 2, None)]),
    ("no object", b"[1]\n", [("invalid_json_line", 1, None)]),
    ("name twice", jsonl([GOOD])[:-3] + b', "model": "echo"}}\n', [("invalid_json_line", 1, None)]),
    ("not utf-8", b'{"custom_id": "\xff"}\n', [("invalid_json_line", 1, None)]),
    ("custom_id", jsonl([{**GOOD, "custom_id": None}]), [("missing_required_parameter", 1, "custom_id")]),
    ("number", jsonl([{**GOOD, "custom_id": 7}]), [("invalid_custom_id", 1, "custom_id")]),
    ("twice", jsonl([GOOD, line(1), GOOD]), [("duplicate_custom_id", 3, "custom_id")]),
    ("method", jsonl([{**GOOD, "method": "GET"}]), [("invalid_method", 1, "method")]),
    ("url", jsonl([line(1, url="/v1/embeddings")]), [("mismatched_url", 1, "url")]),
    ("body", jsonl([{**GOOD, "body": "x"}]), [("missing_required_parameter", 1, "body")]),
    ("no model", jsonl([line(1, model="")]), [("missing_required_parameter", 1, "body.model")]),
    ("model", jsonl([line(1, model="nobody-serves-me")]), [("model_not_found", 1, "body.model")]),
    ("stream", jsonl([line(1, stream=True)]), [("unsupported_parameter", 1, "body.stream")]),
    ("blank", b"\n \n", [("empty_file", None, None)]),
    ("several", b"{\n" + jsonl([GOOD]) + b"{\n", [("invalid_json_line", 1, None), ("invalid_json_line", 3, None)]),
]


@pytest.mark.parametrize(("content", "wrong"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_one_line_that_is_no_request_fails_the_whole_batch(
    client: openai.OpenAI, batch_stack: Stack, content: bytes, wrong: list[tuple[str, int | None, str | None]]
) -> None:
    batch = ended(client, create(client, content))
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert (batch.in_progress_at, batch.output_file_id, batch.error_file_id) == (None, None, None)
    assert batch.errors is not None
    assert [(one.code, one.line, one.param) for one in batch.errors.data or []] == wrong
    assert all(one.message for one in batch.errors.data or [])
    assert batch.request_counts is not None
    assert batch.request_counts.total == 0
    assert batch_stack.live("echo") == 0


def test_a_hundred_errors_are_enough(client: openai.OpenAI) -> None:
    batch = ended(client, create(client, b"{\n" * 500))
    assert batch.errors is not None
    assert len(batch.errors.data or []) == 100


def test_embeddings_are_batched_too(client: openai.OpenAI) -> None:
    lines = [
        {
            "custom_id": f"e{n}",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "embedder", "input": [f"text {n}", "other"]},
        }
        for n in range(5)
    ]
    batch = ended(client, create(client, jsonl(lines), endpoint="/v1/embeddings"))
    assert batch.status == "completed"
    for one in results(client, batch.output_file_id):
        body = one["response"]["body"]
        assert body["object"] == "list"
        direct = client.embeddings.create(
            model="embedder", input=[f"text {one['custom_id'][1:]}", "other"], encoding_format="float"
        )
        assert [item["embedding"] for item in body["data"]] == [item.embedding for item in direct.data]


def test_responses_are_batched_too(client: openai.OpenAI) -> None:
    lines = [
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": "/v1/responses",
            "body": {"model": "echo", "input": f"text {n}"},
        }
        for n in range(3)
    ]
    lines[2]["body"]["background"] = True  # type: ignore[index]
    batch = ended(client, create(client, jsonl(lines), endpoint="/v1/responses"))
    assert batch.status == "completed"
    found = {one["custom_id"]: one["response"]["body"] for one in results(client, batch.output_file_id)}
    for name, body in found.items():
        answered = Response.model_validate(body, strict=True)
        assert (answered.status, answered.output_text) == ("completed", f"text {name[1:]}")
        assert answered.service_tier == "flex"
    assert found.keys() == {"r0", "r1"}
    [refused] = results(client, batch.error_file_id)
    assert refused["response"]["body"]["error"]["param"] == "background"


REQUESTS: dict[Endpoint, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": ({"model": "echo", "messages": [{"role": "user", "content": "hi"}]}, "chat.completion"),
    "/v1/completions": ({"model": "echo", "prompt": "hi"}, "text_completion"),
    "/v1/embeddings": ({"model": "embedder", "input": "hi"}, "list"),
    "/v1/responses": ({"model": "echo", "input": "hi"}, "response"),
}


def test_every_endpoint_of_the_table_can_be_batched(client: openai.OpenAI) -> None:
    assert REQUESTS.keys() == ENDPOINTS.keys()
    made = {}
    for path, (body, _) in REQUESTS.items():
        lines = [{"custom_id": f"r{n}", "method": "POST", "url": path, "body": body} for n in range(3)]
        made[path] = create(client, jsonl(lines), endpoint=path)
    for path, (_, kind) in REQUESTS.items():
        batch = ended(client, made[path])
        assert batch.status == "completed", batch
        found = results(client, batch.output_file_id)
        assert sorted(ids(found)) == ["r0", "r1", "r2"], results(client, batch.error_file_id)
        assert {one["response"]["body"]["object"] for one in found} == {kind}


def test_what_is_done_can_be_read_while_the_batch_runs(client: openai.OpenAI, batch_stack: Stack) -> None:
    batch_stack.start_worker("--model", "slow", "--engine", "echo", "--token-delay-ms", "150", "--slots", "4")
    lines = [line(n, "one two three", model="slow") for n in range(40)]
    batch = create(client, jsonl([*lines, line(40, model="slow", temperature=99)]))
    sizes = []
    while batch.status in ("validating", "in_progress"):
        reply = get(batch_stack.port, f"/v1/batches/{batch.id}/output", authorization=f"Bearer {API_KEY}")
        assert reply.status == 200
        sizes.append(len(ids(parsed(reply.body))))
        batch = client.batches.retrieve(batch.id)
    batch = ended(client, batch)
    assert sizes == sorted(sizes)
    assert any(0 < size < 40 for size in sizes), sizes
    whole = get(batch_stack.port, f"/v1/batches/{batch.id}/output", authorization=f"Bearer {API_KEY}").body
    assert batch.output_file_id is not None
    assert whole == client.files.content(batch.output_file_id).read()
    errors = get(batch_stack.port, f"/v1/batches/{batch.id}/errors", authorization=f"Bearer {API_KEY}").body
    assert ids(parsed(errors)) == ["line-40"]


def test_a_running_batch_is_cancelled(client: openai.OpenAI, batch_stack: Stack) -> None:
    words = " ".join(["word"] * 30)
    batch = create(client, jsonl(line(n, words, model="echo") for n in range(20_000)))
    wait_until(lambda: client.batches.retrieve(batch.id).to_dict()["request_counts"]["completed"], "answers")  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match=f"read by the batch '{batch.id}'"):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    assert client.files.delete(batch.input_file_id).deleted
    assert batch.request_counts is not None
    assert 0 < batch.request_counts.completed < 20_000
    assert len(ids(results(client, batch.output_file_id))) == batch.request_counts.completed
    assert client.batches.cancel(batch.id).status == "cancelled"
    wait_until(lambda: batch_stack.job_keys("echo") == [], "nothing is left in Redis")


def test_a_batch_that_has_ended_cannot_be_cancelled(client: openai.OpenAI) -> None:
    batch = ended(client, create(client, jsonl([GOOD])))
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a batch with status 'completed'"):
        client.batches.cancel(batch.id)


def test_batches_are_listed_newest_first_in_pages(client: openai.OpenAI) -> None:
    made = [create(client, jsonl([GOOD])).id for _ in range(3)]
    listed = [batch.id for batch in client.batches.list(limit=2)]  # the client follows the pages
    assert listed[:3] == made[::-1]
    page = client.batches.list(limit=1, after=made[2])
    assert [batch.id for batch in page.data] == [made[1]]
    for batch_id in made:
        ended(client, client.batches.retrieve(batch_id))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"endpoint": "/v1/nothing"}, "endpoint"),
    ({"completion_window": "soon"}, "completion_window"),
    ({"completion_window": "31d"}, "completion_window"),
    ({"input_file_id": "file-00000000000000000000000000"}, "input_file_id"),
    ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ({"metadata": {"x" * 65: "x"}}, "metadata"),
    ({"metadata": {"x": "x" * 513}}, "metadata"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 10}}, "output_expires_after.seconds"),
    ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
]


@pytest.mark.parametrize(("wrong", "param"), BAD)
def test_what_cannot_be_a_batch_is_refused(client: openai.OpenAI, wrong: dict[str, Any], param: str) -> None:
    file = client.files.create(file=("in.jsonl", jsonl([GOOD])), purpose="batch")
    good = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(**{**good, **wrong})
    assert (refused.value.param or "").startswith(param.partition(".")[0])


def test_the_input_must_have_been_uploaded_for_a_batch(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", jsonl([GOOD])), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="purpose 'user_data'"):
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def test_files_of_results_expire_as_asked(client: openai.OpenAI) -> None:
    expiry = {"output_expires_after": {"anchor": "created_at", "seconds": 3600}}
    batch = ended(client, create(client, jsonl([GOOD]), **expiry))
    assert batch.output_file_id is not None
    file = client.files.retrieve(batch.output_file_id)
    assert file.expires_at == file.created_at + 3600


def test_tenants_see_their_own_batches_alone(client: openai.OpenAI, batch_stack: Stack) -> None:
    batch = ended(client, create(client, jsonl([GOOD])))
    theirs = batch_stack.client().with_options(api_key=batch_stack.make_key("--tenant", "other"))
    for call in (theirs.batches.retrieve, theirs.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="No batch found with id"):
            call(batch.id)
    assert list(theirs.batches.list()) == []
    reply = get(batch_stack.port, f"/v1/batches/{batch.id}/output", authorization=f"Bearer {theirs.api_key}")
    assert reply.status == 404
    with pytest.raises(openai.BadRequestError, match="No such File object"):
        theirs.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")


def test_a_key_without_the_scope_makes_no_batch_and_cancels_none(client: openai.OpenAI, batch_stack: Stack) -> None:
    file = client.files.create(file=("in.jsonl", jsonl([GOOD])), purpose="batch")
    other = batch_stack.client().with_options(api_key=batch_stack.make_key("--scope", "inference"))
    with pytest.raises(openai.PermissionDeniedError, match="no scope 'batch'"):
        other.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.PermissionDeniedError, match="no scope 'batch'"):
        other.batches.cancel(batch.id)
    assert client.batches.retrieve(batch.id).cancelling_at is None


def test_a_key_for_other_models_gets_no_line_through(batch_stack: Stack) -> None:
    own = batch_stack.client().with_options(api_key=batch_stack.make_key("--tenant", "narrow", "--model", "embedder"))
    batch = ended(own, create(own, jsonl([GOOD])))
    assert batch.errors is not None
    assert [one.code for one in batch.errors.data or []] == ["model_not_allowed"]


def test_a_batch_is_charged_to_its_keys_quota_and_refused_when_that_is_used_up(batch_stack: Stack) -> None:
    key = batch_stack.make_key("--token-quota", "5")
    with batch_stack.client() as admin, closing(openai.OpenAI(base_url=f"{batch_stack.base}/v1", api_key=key)) as poor:
        poor = poor.with_options(max_retries=0)
        batch = ended(poor, create(poor, jsonl(line(n, "one two three") for n in range(4))))
        assert batch.status == "completed", "what was begun is finished"
        assert batch.usage is not None
        assert batch.usage.total_tokens > 5
        wait_until(lambda: refuses(poor), "it is charged")
        assert admin.models.list().data


def refuses(client: openai.OpenAI) -> bool:
    try:
        create(client, jsonl([line(0)]))
    except openai.RateLimitError as error:
        return error.code == "insufficient_quota"
    return False
