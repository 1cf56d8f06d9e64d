"""Redis behind Sentinel: two servers and three sentinels on this machine, API and worker connected through them."""

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import redis as sync_redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from fastchat_q import sentinel
from fastchat_q.addresses import without_password
from fastchat_q.connection import connect
from fastchat_q.embedded import durability_findings, server_command
from fastchat_q.errors import ConfigurationError
from fastchat_q.loops import listen
from fastchat_q.prompt import run as run_prompt

from .servers import SINGLE, free_port, pings, wait_until
from .stack import Stack

SERVICE = "queue"
QUESTION = " ".join(f"word{number}" for number in range(300))
PACE_MS = "15"


class Replicated:
    """A master, a replica, and the sentinels that watch them. It is a `Server` to a `Stack`."""

    def __init__(self, folder: Path, sentinels: int = 3, quorum: int = 2) -> None:
        self.folder = folder
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        first, second = self.start_server(), self.start_server()
        self.admin(second).replicaof("127.0.0.1", str(first))
        wait_until(
            lambda: self.admin(second).info("replication")["master_link_status"] == "up", "the replica is in step"
        )
        self.servers = (first, second)
        self.sentinels = [self._start_sentinel(first, quorum) for _ in range(sentinels)]
        wait_until(self._everybody_knows_everybody, "the sentinels know each other and the replica")
        self.url = f"sentinel://{','.join(f'127.0.0.1:{port}' for port in self.sentinels)}/{SERVICE}"

    def environment(self) -> dict[str, str]:
        """What a command of fastchat-q needs to use it."""
        return {"FASTCHAT_Q_REDIS_URL": self.url}

    def admin(self, port: int) -> "sync_redis.Redis":
        """A client of one server or sentinel. A sentinel that promotes or demotes a server cuts its clients off."""
        again, cut = Retry(ConstantBackoff(0.1), 50), [sync_redis.ConnectionError]
        return sync_redis.Redis(port=port, decode_responses=True, socket_timeout=5, retry=again, retry_on_error=cut)

    def client(self) -> "sync_redis.Redis":
        """A client of the master."""
        return self.admin(self.master())

    def master(self) -> int:
        """The port of the server that most sentinels take for the master."""
        named = [int(self.admin(port).sentinel_get_master_addr_by_name(SERVICE)[1]) for port in self.sentinels]
        return max(set(named), key=named.count)

    def promoted(self, before: int) -> bool:
        """Whether another server is the master, and says so itself."""
        after = self.master()
        return after != before and self.admin(after).role()[0] == "master"

    def in_sync(self) -> bool:
        """Whether the replica has everything that the master has."""
        return bool(self.client().wait(1, 1000))

    def kill_server(self, port: int) -> None:
        """kill -9."""
        self.processes[port].kill()
        self.processes[port].wait()

    def close(self) -> None:
        """Ends everything."""
        for process in self.processes.values():
            process.kill()
            process.wait()

    def start_server(self) -> int:
        """A server of its own; returns its port."""
        port = free_port()
        folder = self.folder / str(port)
        folder.mkdir()
        command = server_command(SINGLE.binary(), folder, folder / "r.sock")
        self._start(port, [*command, "--port", str(port), "--repl-diskless-sync-delay", "0"])
        return port

    def _start_sentinel(self, master: int, quorum: int) -> int:
        port = free_port()
        down_after_ms = 1000 if quorum > 1 else 30_000  # with one sentinel the test moves the master itself
        config = self.folder / f"sentinel-{port}.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {master} {quorum}\n"
            f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}\n"
            f"sentinel failover-timeout {SERVICE} 5000\n"
        )
        self._start(port, [str(SINGLE.binary()), str(config), "--sentinel"])
        return port

    def _start(self, port: int, command: list[str]) -> None:
        with (self.folder / f"{port}.log").open("ab") as log:
            self.processes[port] = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(lambda: pings(self.admin(port)), f"{command[0]} answers")

    def _everybody_knows_everybody(self) -> bool:
        states = [self.admin(port).sentinel_master(SERVICE) for port in self.sentinels]
        others = len(self.sentinels) - 1
        return all(s["num-other-sentinels"] == others and s["num-slaves"] == 1 for s in states)


@contextmanager
def running(folder: Path, sentinels: int = 3, quorum: int = 2) -> Iterator[Replicated]:
    servers = Replicated(folder, sentinels, quorum)
    try:
        yield servers
    finally:
        servers.close()


@pytest.fixture
def replicated(folder: Path) -> Iterator[Replicated]:
    with running(folder) as servers:
        yield servers


@pytest.fixture(scope="module")
def watched() -> Iterator[Replicated]:
    """A replicated server with one sentinel, for tests that leave the master where it is."""
    folder = Path(tempfile.mkdtemp(prefix="fq"))
    with running(folder, sentinels=1, quorum=1) as servers:
        yield servers
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def stack(replicated: Replicated, folder: Path) -> Iterator[Stack]:
    """An API server and an echo worker."""
    stack = Stack(replicated, folder)
    try:
        stack.start_worker("--model", "echo", "--engine", "echo", "--token-delay-ms", PACE_MS)
        yield stack
    finally:
        stack.close()


def read_while(stack: Stack, after: int, meanwhile: object) -> str:
    """Streams QUESTION back; calls ``meanwhile`` after some chunks, and returns all the text."""
    text = []
    with stack.client().chat.completions.create(
        model="echo", messages=[{"role": "user", "content": QUESTION}], stream=True
    ) as stream:
        for number, chunk in enumerate(stream):
            if number == after:
                assert callable(meanwhile)
                meanwhile()
            if chunk.choices:
                text.append(chunk.choices[0].delta.content or "")
    return "".join(text)


def answers_again(stack: Stack) -> bool:
    """Whether a new request is answered; a 503 says that it may be tried again."""
    try:
        answer = stack.client().chat.completions.create(model="echo", messages=[{"role": "user", "content": "and now"}])
    except openai.InternalServerError as error:
        if error.status_code == 503 and "retry-after" in error.response.headers:
            return False
        raise
    return answer.choices[0].message.content == "and now"


def test_a_stream_goes_on_when_the_master_is_killed_and_the_replica_promoted(
    stack: Stack, replicated: Replicated
) -> None:
    before = replicated.master()

    def kill_master() -> None:
        assert replicated.in_sync()
        replicated.kill_server(before)

    assert read_while(stack, 20, kill_master) == QUESTION
    wait_until(lambda: replicated.promoted(before), "most sentinels know it")
    wait_until(lambda: answers_again(stack), "new requests are answered")


def follows(server: "sync_redis.Redis") -> bool:
    """Whether it is a replica; a server that takes its new role closes the connections that it had."""
    try:
        return server.role()[0] in ("slave", "replica")
    except sync_redis.ConnectionError:
        return False


def test_a_stream_goes_on_through_a_planned_failover(stack: Stack, replicated: Replicated) -> None:
    before = replicated.master()

    def fail_over() -> None:
        replicated.admin(replicated.sentinels[0]).execute_command("SENTINEL FAILOVER", SERVICE)
        wait_until(lambda: replicated.promoted(before), "the replica is the master")

    assert read_while(stack, 20, fail_over) == QUESTION
    wait_until(lambda: answers_again(stack), "new requests are answered")
    wait_until(lambda: follows(replicated.admin(before)), "the old master follows the new one")
    wait_until(lambda: answers_again(stack), "and again, now that it refuses writes")


async def test_a_subscription_leaves_a_master_that_has_a_successor_it_does_not_know(folder: Path) -> None:
    """As when the network cuts it off from the sentinels alone: it stays up, and keeps its clients."""
    with running(folder, sentinels=1, quorum=1) as replicated:
        first, second = replicated.servers
        watcher = replicated.admin(replicated.sentinels[0])
        client, blocking = connect(replicated.url), connect(replicated.url, blocking=True)
        messages = listen(blocking, "fq:inbox:t")
        assert await anext(messages) is None
        await client.publish("fq:inbox:t", "from the first")
        assert await anext(messages) == b"from the first"
        await sentinel.follow_master(client, blocking)

        replicated.admin(second).replicaof("NO", "ONE")
        watcher.sentinel_remove(SERVICE)
        watcher.sentinel_monitor(SERVICE, "127.0.0.1", second, 1)
        waiting = asyncio.ensure_future(anext(messages))
        await sentinel.follow_master(client, blocking)
        assert await waiting is None, "subscribed anew"
        assert replicated.admin(first).pubsub_numsub("fq:inbox:t")[0][1] == 0
        await client.publish("fq:inbox:t", "from the second")
        assert await anext(messages) == b"from the second"
        await messages.aclose()
        await client.aclose()
        await blocking.aclose()


async def test_a_burst_waits_for_connections_to_the_master_instead_of_failing(watched: Replicated) -> None:
    async with connect(watched.url, max_connections=3) as few:
        assert all(await asyncio.gather(*(few.ping() for _ in range(100))))


async def test_a_master_whose_replicas_need_not_follow_is_told_about(watched: Replicated) -> None:
    async with connect(watched.url) as redis:
        [finding] = [f for f in await durability_findings(redis) if "min-replicas" in f]
        assert finding.endswith("set min-replicas-to-write 1")
        await redis.config_set("min-replicas-to-write", 1)
        assert not any("min-replicas" in f for f in await durability_findings(redis))
        await redis.config_set("min-replicas-to-write", 0)


def test_redis_commands_reach_the_master(
    watched: Replicated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no redis-cli: our own prompt
    assert run_prompt(watched.url, ["ROLE"]) == 0
    assert '"master"' in capsys.readouterr().out


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://127.0.0.1:26379",
        "sentinel:///queue",
        "sentinel://127.0.0.1:x/queue",
        "sentinel://127.0.0.1/queue/x",
        "sentinel://127.0.0.1/queue?sentinel_pasword=x",
    ],
)
def test_a_sentinel_url_that_cannot_be_read_says_so(url: str) -> None:
    with pytest.raises(ConfigurationError, match="Expected sentinel://"):
        connect(url)


def test_a_sentinel_url_has_two_sets_of_credentials_and_shows_neither() -> None:
    url = "sentinel://me:p%40ss@a:1,[::1]:2,c/my%2Dqueue/3?sentinel_username=watcher&sentinel_password=s%26w"
    parsed = sentinel.SentinelUrl.parse(url)
    assert parsed.hosts == (("a", 1), ("::1", 2), ("c", 26379))
    assert (parsed.service, parsed.db) == ("my-queue", 3)
    assert parsed.credentials == {"username": "me", "password": "p@ss"}
    assert parsed.sentinel_credentials == {"username": "watcher", "password": "s&w"}
    assert "p@ss" not in repr(parsed)
    assert "%40" not in without_password(url)
    assert "%26" not in without_password(url)
