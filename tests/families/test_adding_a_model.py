"""docs/adding-a-model.md, step by step: its own files, its own command lines, real workers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import wait_until
from tests.stack import Stack, running_stack

from .adapter_package import example, install, write

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder: Path, *arguments: str, **environment: str) -> None:
    command = [sys.executable, *arguments]
    ran = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the document's files and models."""
    folder = tmp_path_factory.mktemp("shop")
    write(folder, "make_model.py", "my-format.jinja", "my-row.toml", "make_bigrams.py")
    run(folder, "make_model.py", "my-model")
    run(folder, "make_model.py", "bare-model", "--no-template")
    install(folder / "site", "bigrams", example("bigrams.py"), "bigrams:Adapter")
    run(folder, "make_bigrams.py", "bigram-model", PYTHONPATH=str(folder / "site"))
    return folder


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("s")) as running:
        yield running


def serve(stack: Stack, *arguments: str, **environment: str) -> str:
    """Starts a worker with one more model, asks it, and gives the worker's log."""
    worker = stack.start_worker("--threads", "1", *arguments, **environment)
    try:
        name = Path(arguments[1]).name
        with stack.client() as client:
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Hello!"}], max_tokens=5
            )
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 5
        return worker.output()
    finally:
        worker.stop()


def test_a_model_with_its_own_template_needs_nothing(stack: Stack, shop: Path) -> None:
    log = serve(stack, "--model", str(shop / "my-model"))
    assert "family=hermes" in log
    assert "the tokenizer's own" in log


def test_a_model_without_a_template_is_told_the_ways_out(stack: Stack, shop: Path) -> None:
    worker = stack.start("bare", "worker", "--no-supervise", "--model", str(shop / "bare-model"))
    assert worker.wait() == 2
    assert "Ways out: --chat-template NAME" in worker.output()


def test_the_model_card_names_a_family(stack: Stack, shop: Path) -> None:
    card = shop / "bare-model" / "README.md"
    card.write_text(example("bare-model/README.md"))
    try:
        assert "family=vicuna_v1.1" in serve(stack, "--model", str(shop / "bare-model"))
    finally:
        card.unlink()


@pytest.mark.parametrize(
    ("wanted", "family"), [("vicuna_v1.1", "vicuna_v1.1"), ("my-format.jinja", "own"), ("my-row.toml", "my-format")]
)
def test_a_template_is_asked_for(stack: Stack, shop: Path, wanted: str, family: str) -> None:
    path = shop / wanted
    given = str(path) if path.exists() else wanted
    log = serve(stack, "--model", str(shop / "bare-model"), "--chat-template", given)
    assert f"family={family} " in log


def test_an_adapter_serves_a_model_that_is_no_transformer(stack: Stack, shop: Path) -> None:
    worker = stack.start_worker("--model", str(shop / "bigram-model"), PYTHONPATH=str(shop / "site"))
    with stack.client() as client:
        chat = client.chat.completions
        whole = chat.create(
            model="bigram-model", messages=[{"role": "user", "content": "Hi!"}], temperature=0, max_tokens=200
        )
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (" A cat sat on my hat.", "stop")
        stopped = chat.create(
            model="bigram-model",
            messages=[{"role": "user", "content": "Hi!"}],
            temperature=0,
            stop=[" sat"],
            stream=True,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stopped) == " A cat"
        drawn = [
            chat.create(
                model="bigram-model",
                messages=[{"role": "user", "content": "zzz"}],
                temperature=1.0,
                seed=seed,
                max_tokens=20,
            )
            .choices[0]
            .message.content
            for seed in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]
        with pytest.raises(Exception, match=r"(?i)tools"):
            chat.create(
                model="bigram-model",
                messages=[{"role": "user", "content": "Hi!"}],
                tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            )
    worker.stop()


def test_an_endless_answer_of_an_adapter_is_cancelled_when_its_reader_leaves(stack: Stack, shop: Path) -> None:
    worker = stack.start_worker("--model", str(shop / "bigram-model"), PYTHONPATH=str(shop / "site"))
    with stack.client() as client:
        stream = client.chat.completions.create(
            model="bigram-model",
            messages=[{"role": "user", "content": "Hi!"}],
            max_tokens=100_000_000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for _, _chunk in zip(range(20), stream, strict=False):
            pass
        stream.close()
        wait_until(lambda: stack.live("bigram-model") == 0, "the job is cancelled")
    worker.stop()
