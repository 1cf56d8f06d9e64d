"""Real processes for benchmarks: an embedded Redis with an API server, and the workers that a benchmark starts."""

import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from fastchat_q.embedded import server_binary, server_command, server_version

CLI = (sys.executable, "-m", "fastchat_q.cli")


@contextmanager
def started(*command: str, log: Path, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is ended with the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True)
class Front:
    """A Redis and an API server in front of it, without a worker yet."""

    folder: Path
    url: str
    port: int
    redis_pid: int
    api_pid: int

    def worker(self, model: str, *arguments: str) -> AbstractContextManager["subprocess.Popen[bytes]"]:
        """An echo worker that is ended with the block."""
        return echo_worker(self.folder, self.url, model, *arguments)


def echo_worker(
    folder: Path, url: str, model: str, *arguments: str
) -> AbstractContextManager["subprocess.Popen[bytes]"]:
    """A worker on this Redis that is ended with the block; its log is in the folder."""
    flags = ("--engine", "echo", "--model", model, "--redis-url", url, *arguments)
    return started(*CLI, "worker", *flags, log=folder / f"{model}.log")


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, int]]:
    """An embedded Redis that answers: its URL and its pid."""
    url = f"unix://{folder}/r.sock"
    command = server_command(server_binary(), folder, folder / "r.sock")
    with started(*command, log=folder / "redis.log") as process, redis.Redis.from_url(url) as client:
        wait(lambda: client.ping(), "Redis")
        yield url, process.pid


@contextmanager
def front(folder: Path) -> Iterator[Front]:
    """Both, ready."""
    port = free_port()
    with server(folder) as (url, redis_pid):
        flags = ("--no-auth", "--port", str(port), "--redis-url", url)
        with started(*CLI, "serve", *flags, log=folder / "api.log") as api:
            wait(lambda: answers(f"http://127.0.0.1:{port}/healthz"), "the API server")
            yield Front(folder, url, port, redis_pid, api.pid)


def models(port: int) -> list[str]:
    """What the API server has workers for."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as response:
        return [model["id"] for model in json.load(response)["data"]]


def answers(url: str) -> bool:
    """Whether a GET gets a 200. Raises OSError if it gets nothing (urllib's errors are such)."""
    with urllib.request.urlopen(url, timeout=2) as response:
        return bool(response.status == 200)


def wait(fact: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Returns when ``fact`` is true; a server that cannot be reached yet counts as false. Else SystemExit."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if fact():
                return
        except (urllib.error.URLError, OSError, redis.RedisError):
            pass
        if time.monotonic() > deadline:
            raise SystemExit(f"not up within {timeout_s:g} s: {what}")
        time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "redis": server_version(server_binary()),
    }
