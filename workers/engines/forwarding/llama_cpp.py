"""GGUF models through llama.cpp: its own server as a child on a loopback port, spoken to like any other."""

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import httpx2
import openai
import structlog

from fastchat_q.choices import WorkerOptions
from fastchat_q.errors import ConfigurationError
from fastchat_q.registry import ModelCard

from . import llama_cpp_server
from .dialects import DIALECTS
from .openai import OpenAIEngine, context_length_of
from .remote import Upstream

TEXT_FEATURES = tuple(feature for feature in DIALECTS["llamacpp"].features if feature != "vision")
"""Its server is started without the projector that a model needs for images."""
CONTEXT = 8192
"""Tokens of context for each slot, unless told otherwise; or what the model was trained with if that is less."""
log = structlog.get_logger()

POLL_S = 0.1
SAY_S = 30.0
STOP_S = 3.0


@dataclass(frozen=True, slots=True)
class Child:
    """The running server. Its stdin is a pipe that only this process holds: it ends with us, even by a kill -9."""

    process: "subprocess.Popen[str]"
    base_url: str
    errors: IO[str]

    def last_words(self) -> str:
        """The last line that it printed."""
        self.errors.seek(0)
        lines = self.errors.read().split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def stop(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()
        if self.process.stdout is not None:
            self.process.stdout.close()


class LlamaCppEngine(OpenAIEngine):
    """Dies with its child: the worker's supervisor starts both again, and the jobs go on."""

    def __init__(self, card: ModelCard, slots: int, upstream: Upstream, child: Child) -> None:
        super().__init__(card, slots, upstream, DIALECTS["llamacpp"])
        self._child = child

    def duties(self) -> list[Coroutine[Any, Any, None]]:
        return [*super().duties(), self._watch_child()]

    async def _watch_child(self) -> None:
        code = await asyncio.to_thread(self._child.process.wait)
        raise RuntimeError(f"the llama.cpp server ended with code {code}: {self._child.last_words()}")

    async def closing(self) -> None:
        await super().closing()
        self._child.stop()


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server is started with.

    Args:
        context: tokens for each slot.
        on_cpu: nothing goes to a GPU.
    """

    threads: int
    context: int
    on_cpu: bool

    @classmethod
    def of(cls, options: WorkerOptions) -> "Settings":
        """From the command line.

        Raises:
            ConfigurationError: a device was named that llama.cpp cannot be told to take.
        """
        if options.device not in ("auto", "cpu"):
            raise ConfigurationError(
                f"--device {options.device}: llama.cpp takes the GPUs that it was built for. Leave it out, or take cpu."
            )
        threads = options.threads or max(1, (os.cpu_count() or 1) - 1)
        return cls(threads, options.load.max_model_len or CONTEXT, options.device == "cpu")


def connect(name: str, slots: int, upstream: Upstream, options: WorkerOptions) -> LlamaCppEngine:
    """Starts the server; it has loaded the model when this returns.

    Raises:
        ConfigurationError: there is no such file, no llama.cpp, or it cannot load the model.
    """
    path, settings = Path(upstream.model), Settings.of(options)
    if not path.is_file():
        raise ConfigurationError(f"{path}: there is no such file; the llama-cpp engine takes a GGUF file.")
    if shutil.which(llama_cpp_server.SERVER) is None and find_spec("xllamacpp") is None:
        raise ConfigurationError(
            f"The llama-cpp engine needs {llama_cpp_server.SERVER} on the PATH, or pip install 'fastchat-q[llama-cpp]'."
        )
    key = secrets.token_urlsafe(24)  # no other user of this host may use our server
    child = _start(path, slots, settings, key)
    reached = replace(upstream, base_url=f"{child.base_url}/v1", api_key=key)
    try:
        reached, context_length = _loaded(child, reached)
    except BaseException:
        child.stop()
        raise
    card = ModelCard(
        name,
        "llama-cpp",
        context_length,
        int(time.time()),
        device="-",
        features=TEXT_FEATURES,
        batching="upstream",
    )
    return LlamaCppEngine(card, slots, reached, child)


def _start(path: Path, slots: int, settings: Settings, key: str) -> Child:
    errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  open as long as the child runs
    numbers = map(str, (slots, settings.context, settings.threads))
    process = subprocess.Popen(
        [sys.executable, "-m", llama_cpp_server.__name__, str(path), *numbers, *(["cpu"] if settings.on_cpu else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "LLAMA_API_KEY": key},
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    child = Child(process, address, errors)
    if not address:
        process.wait()
        raise _cannot_load(child)
    return child


def _loaded(child: Child, upstream: Upstream) -> tuple[Upstream, int | None]:
    """Waits until the model is loaded, for as long as the server lives; says what it calls the model."""
    said = began = time.monotonic()
    with (
        httpx2.Client(trust_env=False) as http,
        openai.OpenAI(base_url=upstream.base_url, api_key=upstream.api_key, max_retries=0, http_client=http) as client,
    ):
        while child.process.poll() is None:
            with contextlib.suppress(httpx2.HTTPError, openai.APIError):
                if http.get(f"{child.base_url}/health").is_success:
                    models = client.models.list().data
                    return replace(upstream, model=models[0].id), context_length_of(models[0])
            time.sleep(POLL_S)
            if time.monotonic() - said > SAY_S:  # a load that says nothing is ended (`load_stall_s`)
                said = time.monotonic()
                log.info("loading", seconds=round(said - began))
    raise _cannot_load(child)


def _cannot_load(child: Child) -> ConfigurationError:
    return ConfigurationError(f"llama.cpp cannot serve the model: {child.last_words()}")
