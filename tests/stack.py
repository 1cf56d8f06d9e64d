"""Real processes for tests: API servers and workers around a Redis server; each waits for a fact, never for a time."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import openai

from fastchat_q import keys

from .servers import RedisServer, free_port, wait_until

API_KEY = "sk-fcq-tests-only"
STARTUP_S = 60.0


class Process:
    """A fastchat-q command under test, or another module that is run as one."""

    def __init__(
        self,
        log: Path,
        *arguments: str,
        module: str = "fastchat_q.cli",
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.log = log
        command = [*prefix, sys.executable, "-m", module, *arguments]
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env=environment_of(environment))

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

    def start_api(
        self, port: int, *arguments: str, host: str = "127.0.0.1", prefix: Sequence[str] = (), **environment: str
    ) -> Process:
        """An API server on ``port``, listening when this returns. ``prefix``: the words before its command line."""
        values = {
            "FASTCHAT_Q_API_KEY": API_KEY,
            "FASTCHAT_Q_HOST": host,
            "FASTCHAT_Q_DISCONNECT_GRACE_S": "0.5",
            **environment,
        }
        api = self.start(f"api-{port}", "serve", "--port", str(port), *arguments, prefix=prefix, **values)
        wait_until(lambda: not api.alive or answers(f"http://{host}:{port}/healthz"), "the API answers", STARTUP_S)
        assert api.alive, api.output()
        return api

    def start_worker(
        self, *arguments: str, supervised: bool = False, prefix: Sequence[str] = (), **environment: str
    ) -> Process:
        """A worker that serves when this returns: the engine's process, or with ``supervised`` its supervisor.

        ``prefix``: the words before its command line.
        """
        flags = [] if supervised else ["--no-supervise"]
        name = f"worker-{len(self.processes)}"
        worker = self.start(name, "worker", *flags, *arguments, prefix=prefix, **environment)
        return self._serving(worker)

    def start_scripted_worker(self, model: str, kind: str = "chat") -> Process:
        """A worker of this model whose engine plays scripts; serves when this returns."""
        arguments = (self.server.url, model, kind)
        worker = self.start(f"scripted-{len(self.processes)}", *arguments, module="tests.scripted_worker")
        return self._serving(worker)

    def _serving(self, worker: Process) -> Process:
        wait_until(lambda: not worker.alive or self.registered(worker.pid), "the worker registers", STARTUP_S)
        assert worker.alive, worker.output()
        wait_until(lambda: self._is_served(worker.pid), "the API knows the worker")
        return worker

    def registered(self, pid: int) -> bool:
        """Whether the worker with this pid, or the engine's process under it, serves."""
        entry = self.registration(pid)
        return entry is not None and entry["state"] in ("serving", "draining")

    def registration(self, pid: int) -> dict[str, str] | None:
        """The entry of the worker with this pid; of a supervisor: that of its engine's process, or else its own."""
        entries = [self.redis.hgetall(name) for name in self.redis.scan_iter(keys.worker("*"))]
        ours = [entry for entry in entries if str(pid) in (entry.get("pid"), entry.get("supervisor"))]
        return max(ours, key=lambda entry: entry["pid"] != str(pid), default=None)

    def engine_pid(self, supervisor: Process) -> int:
        """The pid of the engine's process that a supervisor runs and that serves."""
        entry = self.registration(supervisor.pid)
        assert entry is not None, "it is not there"
        assert entry["pid"] != str(supervisor.pid), "it does not serve"
        return int(entry["pid"])

    def client(self, port: int | None = None) -> openai.OpenAI:
        """The official client, unmodified; without its retries, which would hide failures."""
        base = f"http://127.0.0.1:{port or self.port}/v1"
        return openai.OpenAI(base_url=base, api_key=API_KEY, max_retries=0, timeout=60)

    def make_key(self, *options: str) -> str:
        """An API key of this stack, with the options of ``key create``."""
        return make_key(self.server.url, self.folder, *options)

    def records(self, model: str) -> list[str]:
        """Keys of the model's job records."""
        return list(self.redis.scan_iter(keys.model_keys(model).job("*")))

    def job_keys(self, model: str) -> list[str]:
        """Keys of the model's job records and token logs."""
        return [*self.records(model), *self.redis.scan_iter(keys.model_keys(model).log("*"))]

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
        card = (self.registration(pid) or {}).get("card", "")
        return any(f'"name":"{model.id}"' in card for model in self.client().models.list())

    def start(
        self,
        name: str,
        *arguments: str,
        module: str = "fastchat_q.cli",
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> Process:
        """Any command of fastchat-q, or another module, on this stack's Redis; ``name`` is for its log."""
        log = self.folder / f"{name}.log"
        values = {**self.server.environment(), "FASTCHAT_Q_STATE_DIR": str(self.folder), **environment}
        process = Process(log, *arguments, module=module, prefix=prefix, **values)
        self.processes.append(process)
        return process


def environment_of(settings: Mapping[str, str]) -> dict[str, str]:
    """That of this process, without settings of the product but these."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FASTCHAT_Q_")} | settings


def make_key(redis_url: str, state_dir: Path, *options: str) -> str:
    """An API key, made with the command line."""
    where = ("--redis-url", redis_url, "--state-dir", str(state_dir))
    command = [sys.executable, "-m", "fastchat_q.cli", "key", "create", "--name", "test", *options, *where]
    made = subprocess.run(command, capture_output=True, text=True, env=environment_of({}), timeout=60)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


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
        server.close()


def answers(url: str) -> bool:
    """Whether a GET gets a 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
