"""Real processes for tests: an embedded Redis server, API servers, workers; each waits for a fact, never for a time."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import redis as sync_redis

from fastchat_q import keys
from fastchat_q.embedded import server_binary, server_command

API_KEY = "sk-fcq-tests-only"
STARTUP_S = 60.0


def wait_until(fact: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Polls until ``fact()`` is true; fails naming ``what``."""
    deadline = time.monotonic() + timeout_s
    while not fact():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.01)


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """An embedded server of its own, as ``fastchat-q up`` starts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "r.sock"
        self.url = f"unix://{self.socket}"
        self.process = self._start()

    def client(self) -> "sync_redis.Redis":
        """A blocking client that decodes replies."""
        return sync_redis.Redis.from_url(self.url, decode_responses=True)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Starts it again on the same data."""
        self.socket.unlink(missing_ok=True)
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = server_command(server_binary(), self.folder, self.socket)
        with (self.folder / "redis.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        with self.client() as client:
            wait_until(lambda: _pings(client), "redis answers")
        return process


class Process:
    """A fastchat-q command under test."""

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "fastchat_q.cli", *arguments]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTCHAT_Q_")}
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env={**clean, **environment})

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def output(self) -> str:
        """All that it printed."""
        return self.log.read_text()

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait()

    def signal(self, number: int) -> None:
        """Any other signal."""
        self._process.send_signal(number)

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM; returns the exit code."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout_s)

    def wait(self, timeout_s: float = 40.0) -> int:
        """Waits for its end; returns the exit code."""
        return self._process.wait(timeout_s)


class Stack:
    """One Redis, one API server, and the workers a test starts."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.redis = server.client()
        self.processes: list[Process] = []
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.api = self.start_api(self.port)

    def start_api(self, port: int, *arguments: str, **environment: str) -> Process:
        """An API server on ``port``, listening when this returns."""
        values = {"FASTCHAT_Q_API_KEY": API_KEY, **environment}
        api = self._spawn(f"api-{port}", "serve", "--port", str(port), *arguments, **values)
        wait_until(lambda: not api.alive or answers(f"http://127.0.0.1:{port}/healthz"), "the API answers", STARTUP_S)
        assert api.alive, api.output()
        return api

    def start_worker(self, *arguments: str) -> Process:
        """A worker, registered when this returns."""
        worker = self._spawn(f"worker-{len(self.processes)}", "worker", *arguments)
        wait_until(lambda: not worker.alive or self.registered(worker.pid), "the worker registers", STARTUP_S)
        assert worker.alive, worker.output()
        wait_until(lambda: self._is_served(worker.pid), "the API knows the worker")
        return worker

    def registered(self, pid: int) -> bool:
        """Whether the worker with this pid is in the registry."""
        return any(self.redis.hget(name, "pid") == str(pid) for name in self.redis.scan_iter(keys.worker("*")))

    def client(self, port: int | None = None) -> openai.OpenAI:
        """The official client, unmodified; without its retries, which would hide failures."""
        base = f"http://127.0.0.1:{port or self.port}/v1"
        return openai.OpenAI(base_url=base, api_key=API_KEY, max_retries=0, timeout=60)

    def job_keys(self, model: str) -> list[str]:
        """Keys of the model's jobs and logs."""
        prefix = keys.model_keys(model).prefix
        return [name for kind in "jt" for name in self.redis.scan_iter(f"{prefix}{kind}:*")]

    def running(self, model: str) -> int:
        """Jobs that hold a slot."""
        return int(self.redis.zcard(keys.model_keys(model).lease))

    def live(self, model: str) -> int:
        """Jobs that have not ended."""
        return int(self.redis.zcard(keys.model_keys(model).live))

    def close(self) -> None:
        """Ends all processes that are left."""
        for process in reversed(self.processes):
            if process.alive:
                process.kill()
        self.redis.close()

    def _is_served(self, pid: int) -> bool:
        name = next(n for n in self.redis.scan_iter(keys.worker("*")) if self.redis.hget(n, "pid") == str(pid))
        card = self.redis.hget(name, "card") or ""
        return any(f'"name":"{model.id}"' in card for model in self.client().models.list())

    def _spawn(self, name: str, *arguments: str, **environment: str) -> Process:
        log = self.folder / f"{name}.log"
        values = {"FASTCHAT_Q_REDIS_URL": self.server.url, "FASTCHAT_Q_STATE_DIR": str(self.folder), **environment}
        process = Process(log, *arguments, **values)
        self.processes.append(process)
        return process


@contextmanager
def running_stack(folder: Path) -> Iterator[Stack]:
    """A stack with an API server and no worker yet."""
    server = RedisServer(folder)
    stack = None
    try:
        stack = Stack(server, folder)
        yield stack
    finally:
        if stack is not None:
            stack.close()
        server.kill()


def answers(url: str) -> bool:
    """Whether a GET gets a 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _pings(client: "sync_redis.Redis") -> bool:
    try:
        return bool(client.ping())
    except sync_redis.RedisError:
        return False
