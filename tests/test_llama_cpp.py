"""GGUF through llama.cpp, for real: the built-in model as a GGUF file. Skipped without llama.cpp, but not in CI."""

import os
import shutil
import signal
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from fastchat_q.workers.main import build_engine

from fastchat_q.choices import LoadOptions, WorkerOptions
from fastchat_q.errors import ConfigurationError

from . import tiny_gguf
from .http_client import get
from .servers import wait_until
from .stack import Process, Stack
from .streams import open_stream, read_words, stream_text

llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None and shutil.which("llama-server") is None and not os.environ.get("CI"),
    reason="llama.cpp is not installed",
)
FLAGS = ("--engine", "llama-cpp", "--slots", "2", "--threads", "1")
STORY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Tell me a story about Mia."}],
    "temperature": 0,
}

LONG_STORY = {**STORY, "max_tokens": 600, "ignore_eos": True}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write(path)
    return path


def server_of(worker: Process) -> psutil.Process:
    """The llama.cpp server of an engine's process."""
    (child,) = psutil.Process(worker.pid).children()
    return child


@llama_cpp
def test_a_gguf_model_answers_as_the_same_model_does_in_transformers(stack: Stack, gguf: Path) -> None:
    stack.start_worker("--model", "tiny", "--name", "reference", "--threads", "1")
    stack.start_worker("--model", str(gguf), *FLAGS)
    client = stack.client()
    for question in ("What is 7 + 5?", "What is the capital of France?", "Tell me a story about Mia."):
        answers = [
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], temperature=0)
            for model in ("reference", "tiny")
        ]
        assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
        assert answers[0].usage == answers[1].usage


@llama_cpp
def test_raw_prompts_are_completed_as_in_transformers_and_echo_is_refused(stack: Stack, gguf: Path) -> None:
    stack.start_worker("--model", "tiny", "--name", "reference", "--threads", "1")
    stack.start_worker("--model", str(gguf), *FLAGS)
    client = stack.client()
    for prompt in ("The capital of France is", ["One and two", "Mia saw"]):
        answers = [
            client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=12)
            for model in ("reference", "tiny")
        ]
        assert [one.text for one in answers[1].choices] == [one.text for one in answers[0].choices]
        assert answers[1].usage == answers[0].usage
    tokens = []
    for model in ("reference", "tiny"):
        scored = client.completions.create(model=model, prompt="Mia saw", temperature=0, max_tokens=3, logprobs=2)
        assert scored.choices[0].logprobs is not None
        tokens.append(scored.choices[0].logprobs.tokens)
    assert len(tokens[0]) == 3
    assert tokens[1] == tokens[0]
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="tiny", prompt="Mia", echo=True)


@llama_cpp
def test_a_worker_that_dies_takes_its_server_along_and_the_next_one_goes_on_in_the_sentence(
    stack: Stack, gguf: Path
) -> None:
    first = stack.start_worker("--model", str(gguf), *FLAGS)
    server = server_of(first)
    connection, job_id = open_stream(stack.port, LONG_STORY)
    text = stream_text(connection)
    begun = read_words(text, 10)
    os.kill(server.pid, signal.SIGSTOP)  # so that the answer is not over before the worker is dead
    first.kill()
    os.kill(server.pid, signal.SIGCONT)
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, "its server ends")
    second = stack.start_worker("--model", str(gguf), *FLAGS)
    whole = begun + "".join(text)
    ask: Any = stack.client().chat.completions.create
    expected = ask(**STORY, max_tokens=600, extra_body={"ignore_eos": True})  # greedy: a repeated beginning would show
    assert whole[:200] == (expected.choices[0].message.content or "")[:200]
    job = get(stack.port, f"/v1/jobs/{job_id}").json()
    assert (job["state"], len(job["attempts"])) == ("succeeded", 2)
    assert "resuming" in second.output()


@llama_cpp
def test_a_server_that_dies_is_started_again_with_its_worker(stack: Stack, gguf: Path) -> None:
    worker = stack.start_worker("--model", str(gguf), *FLAGS, supervised=True)
    engine = stack.engine_pid(worker)
    (server,) = psutil.Process(engine).children()
    server.kill()
    wait_until(lambda: stack.registered(worker.pid) and stack.engine_pid(worker) != engine, "both are back", 60)
    connection, _ = open_stream(stack.port, STORY)
    read_words(stream_text(connection), 3)
    assert "the llama.cpp server ended with code -9" in worker.output()


@llama_cpp
def test_a_stopped_worker_leaves_no_server_behind(stack: Stack, gguf: Path) -> None:
    worker = stack.start_worker("--model", str(gguf), *FLAGS)
    server = server_of(worker)
    assert worker.stop() == 0
    assert not server.is_running()


@llama_cpp
def test_a_file_that_is_no_model_is_one_clear_line(stack: Stack, folder: Path) -> None:
    (folder / "bad.gguf").write_bytes(b"GGUF nonsense")
    worker = stack.start("bad", "worker", "--model", str(folder / "bad.gguf"), *FLAGS)
    assert worker.wait() == 2
    assert "llama.cpp cannot serve the model: " in worker.output()


def test_a_file_that_is_not_there_is_one_clear_line(stack: Stack, folder: Path) -> None:
    worker = stack.start("none", "worker", "--model", str(folder / "none.gguf"), *FLAGS)
    assert worker.wait() == 2
    assert "there is no such file" in worker.output()


LISTENS = """#!/bin/sh
echo "$@" > "{said}"
exit 1
"""


def test_context_and_device_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"
    program = tmp_path / "llama-server"
    program.write_text(LISTENS.format(said=said))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    model = tmp_path / "m.gguf"
    model.touch()
    options = WorkerOptions(
        str(model), engine="llama-cpp", slots=2, device="cpu", threads=3, load=LoadOptions(max_model_len=512)
    )
    with pytest.raises(ConfigurationError, match="cannot serve the model"):
        build_engine(options)
    wait_until(said.exists, "it was started")
    words = said.read_text()
    assert "--ctx-size 1024 --threads 3 " in words
    assert "--n-gpu-layers 0" in words
    with pytest.raises(ConfigurationError, match="--device cuda: "):
        build_engine(replace(options, device="cuda"))
