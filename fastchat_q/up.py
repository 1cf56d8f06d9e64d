"""``fastchat-q up``: the whole stack on one machine, as supervised child processes, from one command."""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from redis.asyncio import Redis

from . import keys
from .abilities import ENDPOINTS
from .addresses import check_port_free, http_base, without_password
from .capabilities import check_orchestrator_redis
from .connection import connect
from .credentials import KEY_FILE, load_or_create_api_key, write_secret
from .embedded import durability_findings, is_up, server_binary, server_command, server_version
from .errors import ConfigurationError
from .jobs import Kind
from .loops import AWAY, check_cancelled
from .registry import Registration, Registry
from .settings import Settings
from .supervisor import Child, LogFile, how_it_ended

REDIS_START_S = 60.0
"""Bound on loading a long append-only file."""
POLL_S = 0.05
KILL_AFTER_S = 5.0
HAND_BACK_S = 15.0
"""What a child may take on top of its draining; the worker's own supervisor gives up a little earlier."""
LOOK_S = 1.0


EXAMPLES: dict[Kind, dict[str, Any]] = {
    "chat": {"stream": True, "messages": [{"role": "user", "content": "Who are you?"}]},
    "embed": {"input": "Who are you?"},
    "rerank": {"query": "What is red?", "documents": ["the sky", "a ripe tomato"]},
}
"""A first request for each kind of model."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What ``up`` is told beyond the settings."""

    models: tuple[str, ...]
    """What clients may ask for."""
    worker_arguments: tuple[str, ...]
    kind: Kind = "chat"
    """What the models do."""


class Up:
    """One run of the stack."""

    def __init__(self, settings: Settings, options: UpOptions, out: TextIO = sys.stdout) -> None:
        self._settings = settings
        self._options = options
        self._out = out
        self._logs = settings.state_dir / "logs"
        self._children: list[Child] = []
        self._stop = asyncio.Event()
        self._crashes: asyncio.Task[None] | None = None
        self._url = settings.redis_url or f"unix://{settings.socket_path}"
        self._orchestrator_url = settings.orchestrator_redis_url or self._url

    async def run(self) -> None:
        """Starts everything, waits for SIGINT or SIGTERM, and stops everything.

        Raises:
            ConfigurationError: it cannot start; nothing is left running.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        self._logs.mkdir(parents=True, exist_ok=True)
        api_key = self._api_key()
        check_port_free(self._settings.host, self._settings.port)
        redis = connect(self._url)
        try:
            async with asyncio.TaskGroup() as group:
                try:
                    await self._start(group, redis, api_key)
                    await self._stop.wait()
                finally:
                    await self._stop_children()
        except* ConfigurationError as errors:
            raise errors.exceptions[0] from None
        finally:
            await redis.aclose()

    async def _start(self, group: asyncio.TaskGroup, redis: "Redis", api_key: str) -> None:
        await self._start_redis(group, redis)
        api = self._start_child(group, "api", ["serve"], {"FASTCHAT_Q_API_KEY": api_key})
        worker = self._start_child(group, "worker", ["worker", *self._options.worker_arguments])
        orchestrator = self._start_child(group, "orchestrator", ["orchestrator"])
        self._crashes = group.create_task(self._report_crashes(redis, worker))
        base = http_base(self._settings.host, self._settings.port)
        async with asyncio.TaskGroup() as waits:
            waits.create_task(self._report("api", f"{base}/v1", lambda: self._api_is_up(base, api)))
            waits.create_task(self._report("orchestrator", "arq", lambda: self._orchestrator_is_up(orchestrator)))
            waits.create_task(
                self._report("worker", ", ".join(self._options.models), lambda: self._worker_is_up(redis, worker))
            )
        if not self._stop.is_set():
            self._print_welcome(base, api_key)

    async def _start_redis(self, group: asyncio.TaskGroup, redis: "Redis") -> None:
        if self._settings.redis_url is not None:
            try:
                findings = await durability_findings(redis)
                await self._check_orchestrator_redis()
            except AWAY as error:
                raise ConfigurationError(
                    f"Redis at {without_password(self._url)} cannot be reached: {error}"
                ) from error
            self._say(f"✔ redis         {without_password(self._url)}")
            for finding in findings:
                self._say(f"! redis         {finding}")
            return
        await end_orphan(redis)
        binary = server_binary(self._settings.redis_server)
        data_dir, path = self._settings.state_dir / "redis", self._settings.socket_path
        data_dir.mkdir(exist_ok=True)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.stat().st_uid != os.getuid():  # a short path in the temporary folder can be guessed
            raise ConfigurationError(f"{path.parent} belongs to somebody else. Choose a shorter --state-dir.")
        path.unlink(missing_ok=True)
        command = server_command(binary, data_dir.absolute(), path)
        child = Child("redis", lambda: command, LogFile(self._logs / "redis.log"), {}, self._on_exit)
        self._children.append(child)
        child.start(group)
        detail = f"embedded {server_version(binary)} · unix socket · AOF everysec"
        await self._report("redis", detail, lambda: is_up(redis), REDIS_START_S)
        if not self._stop.is_set() and not await is_up(redis):
            raise ConfigurationError(f"The embedded Redis does not start: {child.last_words()}")

    async def _check_orchestrator_redis(self) -> None:
        async with connect(self._orchestrator_url) as redis:
            await check_orchestrator_redis(redis)

    def _start_child(
        self, group: asyncio.TaskGroup, name: str, arguments: list[str], environment: dict[str, str] | None = None
    ) -> Child:
        settings = self._settings
        common = {
            "FASTCHAT_Q_REDIS_URL": self._url,
            "FASTCHAT_Q_STATE_DIR": str(settings.state_dir),
            "FASTCHAT_Q_HOST": settings.host,
            "FASTCHAT_Q_PORT": str(settings.port),
            "FASTCHAT_Q_AUTH": str(settings.auth).lower(),
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "fastchat_q.cli", *arguments]
        output = LogFile(self._logs / f"{name}.log")
        child = Child(name, lambda: command, output, common | (environment or {}), self._on_exit)
        self._children.append(child)
        child.start(group)
        return child

    async def _stop_children(self) -> None:
        """API first, so that open streams can end while their worker still runs; Redis last."""
        if self._crashes is not None:
            self._crashes.cancel()
        if not self._children:
            return
        self._say("Stopping: running requests may end first (Ctrl-C again to stop at once)")
        self._stop.clear()  # a second signal sets it again
        impatient = asyncio.create_task(self._stop.wait())
        for name in ("api", "worker", "orchestrator", "redis"):
            for child in (c for c in self._children if c.name == name):
                patience = self._settings.drain_s + HAND_BACK_S
                stopping = asyncio.create_task(child.stop(0.0 if impatient.done() else patience))
                await asyncio.wait([stopping, impatient], return_when=asyncio.FIRST_COMPLETED)
                if not stopping.done():
                    await child.stop(0.0)
                await stopping
        impatient.cancel()
        self._say("Stopped")

    def _on_signal(self) -> None:
        self._stop.set()

    def _on_exit(self, child: Child, code: int, delay_s: float) -> None:
        words = child.last_words()
        how = how_it_ended(code)
        self._say(f"✘ {child.name:<13} ended ({how}); starts again in {delay_s:g} s{': ' + words if words else ''}")

    async def _report(
        self, name: str, detail: str, is_up: Callable[[], Awaitable[bool]], limit_s: float = float("inf")
    ) -> None:
        """Waits until a part is up, then prints its line; gives up quietly when everything is being stopped."""
        began = time.monotonic()
        while not await is_up():
            if self._stop.is_set() or time.monotonic() - began > limit_s:
                return
            await asyncio.sleep(POLL_S)
        self._say(f"✔ {name:<13} {detail:<60} {time.monotonic() - began:.1f} s")

    async def _api_is_up(self, base: str, child: Child) -> bool:
        return child.pid is not None and await asyncio.to_thread(_answers, f"{base}/healthz")

    async def _worker_is_up(self, redis: "Redis", child: Child) -> bool:
        try:
            workers = [worker for worker in await Registry(redis).workers() if _is_of(child, worker)]
            return any(worker.serves or worker.state == "idle" for worker in workers)
        except AWAY:
            return False

    async def _report_crashes(self, redis: "Redis", child: Child) -> None:
        """The worker supervises its engine's process itself; what it says of that in the registry is printed here."""
        told: dict[str, int] = {}
        while True:
            check_cancelled()
            await asyncio.sleep(LOOK_S)
            try:
                workers = await Registry(redis).workers()
            except AWAY:
                continue
            for worker in workers:
                if _is_of(child, worker) and worker.restarts > told.get(worker.worker_id, 0):
                    told[worker.worker_id] = worker.restarts
                    self._say(f"✘ {child.name:<13} {worker.card.name}: {worker.reason}; starts again")

    async def _orchestrator_is_up(self, child: Child) -> bool:
        try:
            async with connect(self._orchestrator_url) as redis:
                return child.pid is not None and await redis.exists(keys.ORCHESTRATOR_HEALTH) == 1
        except AWAY:
            return False

    def _api_key(self) -> str:
        state_dir = self._settings.state_dir
        if self._settings.api_key is not None:
            key = self._settings.api_key.get_secret_value()
            write_secret(state_dir / KEY_FILE, key)
            return key
        return load_or_create_api_key(state_dir)[0]

    def _print_welcome(self, base: str, api_key: str) -> None:
        auth = ""
        if self._settings.auth:
            auth = f'-H "Authorization: Bearer {api_key}" '
            self._say(f"\n  Key   {api_key}   (also in {self._settings.state_dir / KEY_FILE})")
        body = json.dumps({"model": self._options.models[0], **EXAMPLES[self._options.kind]})
        url = base + ENDPOINTS[self._options.kind].removeprefix("POST ")
        self._say(f"  API   {base}/v1   logs {self._logs}")
        self._say(f"  Try   curl -N {url} {auth}-H 'Content-Type: application/json' -d '{body}'")
        self._say("  Ctrl-C drains and stops\n")

    def _say(self, line: str) -> None:
        try:
            print(line, file=self._out, flush=True)
        except BrokenPipeError:  # nobody reads any more; that is no reason to stop serving
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


def hold_lock(state_dir: Path, url: str) -> TextIO:
    """Takes the state directory for this process; the kernel gives it back however the process ends.

    Raises:
        ConfigurationError: another ``up`` holds it; the message says which.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (state_dir / "up.lock").open("a+")
    except OSError as error:
        raise ConfigurationError(f"--state-dir {state_dir} cannot be used: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "starting"
        file.close()
        raise ConfigurationError(
            f"fastchat-q up already runs on {state_dir} ({holder}). Use it, stop it, or choose another --state-dir."
        ) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()}, {url}")
    file.flush()
    return file


async def end_orphan(redis: "Redis") -> None:
    """Ends an embedded server that an earlier ``up`` left behind (where the kernel did not end it with its parent)."""
    deadline = time.monotonic() + KILL_AFTER_S
    while await is_up(redis):
        if time.monotonic() > deadline:
            raise ConfigurationError("An embedded Redis of an earlier run is still there and does not shut down.")
        with contextlib.suppress(*AWAY):
            await redis.shutdown()
        await asyncio.sleep(POLL_S)


def _is_of(supervisor: Child, worker: Registration) -> bool:
    return worker.supervisor == supervisor.pid and worker.host == socket.gethostname()


def _answers(url: str) -> bool:
    try:
        # No proxy, whatever the environment says: this is our own child on this machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
