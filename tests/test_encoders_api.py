"""Embeddings and rankings of small real models over HTTP, with the official client and everything in between."""

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from .engines.random_encoders import POSITIONS, Reference, checkpoint, reference_scores, text, tokens
from .http_client import get, post
from .servers import wait_until
from .stack import Stack, running_stack

ATOL = 1e-6
QUERY = text(4)


@pytest.fixture(scope="module")
def models() -> Iterator[Path]:
    """Checkpoints named ``bert``, which makes vectors, and ``cross``, which ranks."""
    path = Path(tempfile.mkdtemp(prefix="fq"))
    checkpoint(path / "bert", "bert", pooling="mean_tokens", prompts={"query": "w1 w2 "})
    checkpoint(path / "cross", "bert", labels=1)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Stack]:
    """A shared stack that serves both."""
    path = Path(tempfile.mkdtemp(prefix="fq"))
    with running_stack(path) as running:
        running.start_worker("--engine", "embeddings", "--model", str(models / "bert"), "--threads", "1")
        running.start_worker("--engine", "rerank", "--model", str(models / "cross"), "--threads", "1")
        yield running
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def reference(models: Path) -> Reference:
    return Reference(models / "bert", "mean")


def assert_vectors(answer: Any, expected: list[torch.Tensor]) -> None:
    got = torch.tensor([one.embedding for one in answer.data])
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=ATOL)


@pytest.mark.parametrize("encoding", [None, "float"])
@pytest.mark.parametrize("given", [text(9), [text(9), text(30), "w1"], list(tokens(5)), [[7, 8], [9]]])
def test_the_official_client_gets_the_models_vectors(
    served: Stack, reference: Reference, given: Any, encoding: Any
) -> None:
    inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    asked = {"encoding_format": encoding} if encoding else {}
    with served.client() as client:
        answer = client.embeddings.create(model="bert", input=given, **asked)
    inputs = [one if isinstance(one, str) else tuple(one) for one in inputs]
    assert_vectors(answer, [reference(one) for one in inputs])
    count = sum(len(one.split()) + 2 if isinstance(one, str) else len(one) for one in inputs)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)


def test_requests_that_share_batches_get_their_own_vectors(served: Stack, reference: Reference) -> None:
    texts = [[text(length, seed) for length in range(1 + seed, 60, 7)] for seed in range(12)]
    answers: list[Any] = [None] * len(texts)

    def ask(n: int, client: openai.OpenAI) -> None:
        answers[n] = client.embeddings.create(model="bert", input=texts[n], dimensions=8 if n % 2 else openai.omit)

    with served.client() as client:
        threads = [threading.Thread(target=ask, args=(n, client)) for n in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for n, answer in enumerate(answers):
        whole = [reference(one) for one in texts[n]]
        assert_vectors(answer, [one[:8] / one[:8].norm() for one in whole] if n % 2 else whole)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": ["w1", text(POSITIONS)]}, "input", f"{POSITIONS} tokens, but input 1 has {POSITIONS + 2}"),
        ({"input": [[1, 512]]}, "input", "0 to 511"),
        ({"input": "w1", "dimensions": 33}, "dimensions", "32 numbers"),
    ],
)
def test_what_the_model_cannot_take_is_the_clients_error(served: Stack, fields: Any, param: str, words: str) -> None:
    with served.client() as client, pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(model="bert", **fields)
    assert raised.value.param == param
    assert words in raised.value.message


def test_documents_are_ranked_by_the_models_scores(served: Stack, models: Path) -> None:
    documents = [text(length, seed) for length in (3, 20, 50) for seed in range(3)]
    scores = torch.tensor(reference_scores(models / "cross", QUERY, documents)).sigmoid().tolist()
    body = {"model": "cross", "query": QUERY, "documents": documents}
    answer = post(served.port, body, path="/v1/rerank").json()
    assert [one["index"] for one in answer["results"]] == sorted(range(len(scores)), key=lambda n: -scores[n])
    for one in answer["results"]:
        assert one["relevance_score"] == pytest.approx(scores[one["index"]], abs=ATOL)
    assert answer["usage"]["prompt_tokens"] == sum(len(one.split()) + 7 for one in documents)
    long = post(served.port, {**body, "documents": ["w1", text(POSITIONS)]}, path="/v1/rerank")
    assert (long.status, long.error()["param"], long.error()["code"]) == (400, "documents", "context_length_exceeded")


def test_cards_say_what_the_models_are_for(served: Stack) -> None:
    cards = {model["id"]: model for model in get(served.port, "/v1/models").json()["data"]}
    assert {name: (card["kind"], card["max_model_len"]) for name, card in cards.items()} == {
        "bert": ("embed", POSITIONS),
        "cross": ("rerank", POSITIONS),
    }


def test_vectors_survive_the_death_of_the_engine(stack: Stack, models: Path, reference: Reference) -> None:
    """Those in the log are not made again: the last attempt ends with as many units as there are inputs."""
    flags = ("--engine", "embeddings", "--model", str(models / "bert"), "--threads", "1", "--batch-tokens", "128")
    worker = stack.start_worker(*flags, supervised=True)
    texts = [text(100, seed) for seed in range(2048)]
    answers: list[Any] = []
    with stack.client() as client:
        asking = threading.Thread(
            target=lambda: answers.append(client.embeddings.create(model="bert", input=texts, timeout=120))
        )
        asking.start()

        def logged() -> int:
            logs = [key for key in stack.job_keys("bert") if stack.redis.type(key) == "stream"]
            return sum(int(stack.redis.xlen(key)) for key in logs)

        wait_until(lambda: logged() >= 3, "some vectors are in the log")
        os.kill(stack.engine_pid(worker), signal.SIGKILL)
        asking.join(120)
    assert "resuming" in worker.output()
    [answer] = answers
    assert_vectors(answer, [reference(one) for one in texts])


def test_models_for_vectors_are_loaded_on_demand(stack: Stack, models: Path, reference: Reference) -> None:
    """The door must know which kind of model it is before it was ever loaded."""
    flags = ("--engine", "embeddings", "--model", str(models / "bert"), "--on-demand", "--threads", "1")
    stack.start("demand", "worker", *flags, "--prompt-name", "query")
    with stack.client() as client:
        wait_until(lambda: [one.id for one in client.models.list()] == ["bert"], "it is offered")
        assert_vectors(client.embeddings.create(model="bert", input=text(5)), [reference("w1 w2 " + text(5))])


def test_options_of_encoders_are_refused_for_other_engines(stack: Stack) -> None:
    worker = stack.start("wrong", "worker", "--engine", "echo", "--model", "echo", "--pooling", "cls")
    assert worker.wait() == 2
    assert "--pooling is not for --engine echo: only for --engine embeddings." in worker.output()
