"""The Redis users that `fastchat-q redis acl` prints: each process works with its own, and can do nothing beyond."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
import redis as sync_redis
from redis.exceptions import AuthenticationError, NoPermissionError

from fastchat_q import keys, upkeep
from fastchat_q.connection import connect
from fastchat_q.files import Files
from fastchat_q.records import read_record
from fastchat_q.storage import Storage

from .http_client import post
from .servers import KINDS
from .stack import API_KEY, Process, answers, free_port, make_key, wait_until
from .tcp_redis import TcpRedis

ROLES = ["api", "worker", "orchestrator", "metrics", "admin"]
JOB, LOG = keys.model_keys("echo").job("1"), keys.model_keys("echo").log("1")
Do = Callable[["sync_redis.Redis"], object]


def acl(*options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fastchat_q.cli", "redis", "acl", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@dataclass
class Secured:
    """A server with our users on it and nobody else, and a stack whose processes connect as their own user."""

    server: TcpRedis
    version: str
    passwords: dict[str, str]
    folder: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, Process] = field(default_factory=dict)

    def url(self, role: str, prefix: str = "fq") -> str:
        return self.server.url(f"{prefix}-{role}", self.passwords[role])

    def client(self, role: str) -> "sync_redis.Redis":
        """A client with the rights of a role, under a name that tells it from the role's process."""
        return sync_redis.Redis.from_url(self.url(role, "test"), decode_responses=True)

    def start(self, role: str, *arguments: str, **environment: str) -> None:
        environment |= {"FASTCHAT_Q_REDIS_URL": self.url(role), "FASTCHAT_Q_STATE_DIR": str(self.folder)}
        self.processes[role] = Process(self.folder / f"{role}.log", *arguments, **environment)

    def denied(self) -> list[str]:
        """What Redis has refused to our processes."""
        with closing(self.client("admin")) as admin:
            rows = admin.execute_command("ACL", "LOG")
        named = [row if isinstance(row, dict) else dict(zip(row[::2], row[1::2], strict=True)) for row in rows]
        ours = [row for row in named if row["username"].startswith("fq-")]
        # redis-py tells Redis its name, and goes on where it may not: 6.2 counts all of CLIENT as dangerous.
        return [f"{row['username']} {row['reason']} {row['object']}" for row in ours if row["object"] != "client"]


@pytest.fixture(scope="module", params=["valkey", "redis-7", "redis-6.2"])
def secured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("acl")
    oldest = "6.2" if request.param == "redis-6.2" else "7.0"
    rows = json.loads(acl("--json", "--server", oldest).stdout)
    (folder / "users.acl").write_text(
        "".join(f"user {row['user']} {row['rules']}\nuser test-{row['role']} {row['rules']}\n" for row in rows)
        + "user default reset off\n"
    )
    server = TcpRedis(KINDS[request.param].binary(), folder, "--aclfile", str(folder / "users.acl"))
    stack = Secured(server, oldest, {row["role"]: row["password"] for row in rows}, folder)
    try:
        stack.start("api", "serve", "--port", str(stack.port), FASTCHAT_Q_API_KEY=API_KEY)
        stack.start("worker", "worker", "--engine", "echo", "--model", "echo", "--token-delay-ms", "1")
        stack.start("orchestrator", "orchestrator")
        wait_until(lambda: answers(f"http://127.0.0.1:{stack.port}/readyz"), "the stack is ready", 60)
        yield stack
    finally:
        for process in stack.processes.values():
            process.kill()
        server.close()


def test_without_a_user_nobody_comes_in(secured: Secured) -> None:
    with closing(sync_redis.Redis.from_url(secured.server.url())) as client, pytest.raises(AuthenticationError):
        client.ping()


def test_a_chat_a_key_with_limits_and_housekeeping_work_and_redis_denies_none_of_it(secured: Secured) -> None:
    key = make_key(secured.url("admin"), secured.folder, "--rpm", "9", "--tpm", "900")
    for stream in (False, True):
        body = {"model": "echo", "stream": stream, "messages": [{"role": "user", "content": "who am I"}]}
        reply = post(secured.port, body, headers={"authorization": f"Bearer {key}"})
        assert reply.status == 200, reply.body
        assert b"who" in reply.body
        assert int(reply.headers["x-ratelimit-remaining-requests"]) in (7, 8)
    made = openai.OpenAI(base_url=f"http://127.0.0.1:{secured.port}/v1", api_key=key, max_retries=0)
    with made as client:
        file = client.files.create(file=b"1", purpose="batch")
        assert [entry.id for entry in client.files.list()] == [file.id]
        asyncio.run(tidy(secured))
        assert list(client.files.list()) == []
    wait_until(lambda: "housekeeping" in secured.processes["orchestrator"].output(), "a tick")
    with closing(secured.client("metrics")) as metrics:
        wait_until(lambda: metrics.exists(keys.ORCHESTRATOR_HEALTH), "the orchestrator says that it lives")
    assert secured.denied() == []
    for role in ("api", "worker", "orchestrator"):
        assert secured.processes[role].alive
        assert "permission" not in secured.processes[role].output().lower()


async def tidy(secured: Secured) -> None:
    """All that the orchestrator does for files, with its rights."""
    redis, storage = connect(secured.url("orchestrator")), Storage(f"file://{secured.folder}/files")
    in_a_month = time.time() + 31 * 24 * 3600
    async with redis:
        files = Files(redis, storage)
        await redis.delete(keys.FILES_COMPARED)
        [record], _ = await files.list(None)
        await files.forget(record)
        assert await upkeep.tick(files, redis) == upkeep.Upkeep(indexed=1)
        assert await upkeep.tick(files, redis, lambda: in_a_month) == upkeep.Upkeep(expired=1)
        await files.create(b"1", tenant="t", filename="x", purpose="batch_output")


READ_ONLY = ("make an API key", "delete an API key", "be a worker")
FORBIDDEN: list[tuple[str, str, Do]] = [
    ("worker", "read an API key", lambda r: r.hgetall(keys.api_key("a" * 64))),
    ("worker", "list the API keys", lambda r: r.hgetall(keys.API_KEYS)),
    ("worker", "read the pepper's fingerprint", lambda r: r.get(keys.PEPPER)),
    ("worker", "make an API key", lambda r: r.hset(keys.api_key("a" * 64), "tenant", "mine")),
    ("worker", "lift a rate limit", lambda r: r.delete(keys.rate_limit("key_1"))),
    ("worker", "be an API server", lambda r: r.hset(keys.api_server("a"), "pid", "1")),
    ("worker", "publish on a foreign channel", lambda r: r.publish("news", "x")),
    ("worker", "reach a key through a script of its own", lambda r: r.eval("return 1", 0)),
    ("worker", "see all key names", lambda r: r.keys("*")),
    ("worker", "walk over all key names", lambda r: r.scan()),
    ("worker", "drop everything", lambda r: r.flushall()),
    ("worker", "read the settings", lambda r: r.config_get("*")),
    ("worker", "read arq's jobs", lambda r: r.get(f"{keys.ORCHESTRATOR_JOBS}job:1")),
    ("api", "make an API key", lambda r: r.hset(keys.api_key("a" * 64), "tenant", "mine")),
    ("api", "delete an API key", lambda r: r.delete(keys.api_key("a" * 64))),
    ("api", "be a worker", lambda r: r.hset(keys.worker("w"), "pid", "1")),
    ("worker", "read the record of a file", lambda r: r.get(keys.file_record("file-1"))),
    ("api", "see all key names", lambda r: r.keys("*")),
    ("api", "drop everything", lambda r: r.flushall()),
    ("api", "set a user", lambda r: r.acl_setuser("mallory", enabled=True)),
    ("orchestrator", "read an API key", lambda r: r.hgetall(keys.api_key("a" * 64))),
    ("orchestrator", "change the settings", lambda r: r.config_set("maxmemory", "1")),
    ("metrics", "read a prompt", lambda r: r.hgetall(JOB)),
    ("metrics", "read an answer", lambda r: r.xinfo_stream(LOG)),
    ("metrics", "read an API key", lambda r: r.hgetall(keys.api_key("a" * 64))),
    ("metrics", "write", lambda r: r.zadd(keys.WORKERS, {"w": 1})),
    ("metrics", "delete", lambda r: r.delete(keys.MODELS)),
    ("metrics", "listen to tokens", lambda r: r.publish(keys.inbox("a"), "x")),
]


@pytest.mark.parametrize(
    ("role", "what", "do"), FORBIDDEN, ids=[f"{role} may not {what}" for role, what, _ in FORBIDDEN]
)
def test_a_role_can_do_nothing_beyond_its_duty(secured: Secured, role: str, what: str, do: Do) -> None:
    if role == "api" and what in READ_ONLY and secured.version == "6.2":
        pytest.skip("Redis 6.2 has no read-only key patterns")
    with closing(secured.client(role)) as client, pytest.raises(NoPermissionError):
        do(client)


def test_metrics_can_see_how_the_queues_are(secured: Secured) -> None:
    names = keys.model_keys("echo")
    with closing(secured.client("metrics")) as client:
        assert client.info("clients")["connected_clients"] >= 3
        wait_until(lambda: client.exists(names.stream("hi")), "the stream is there, though no job ever was")
        assert client.xlen(names.stream("hi")) >= 0
        assert [group["name"] for group in client.xinfo_groups(names.stream("hi"))] == [keys.GROUP]
        assert client.zcard(names.waiting("hi")) == client.zcard(names.lease) == 0
        cards = [client.hget(keys.worker(worker), "card") for worker in client.zrange(keys.WORKERS, 0, -1)]
        assert any(card and "echo" in card for card in cards)


def test_the_commands_can_be_piped_into_redis_cli(folder: Path) -> None:
    lines = acl("--role", "worker", "--passwords", "hash")
    name, password = lines.stderr.split()
    server = TcpRedis(KINDS["valkey"].binary(), folder)
    try:
        for line in lines.stdout.splitlines():
            server.admin.execute_command(*line.split())
        with closing(sync_redis.Redis.from_url(server.url(name, password))) as worker:
            assert worker.ping()
        assert password not in lines.stdout
    finally:
        server.close()


def test_passwords_are_new_each_time_and_in_the_rules_by_default() -> None:
    first, second = (json.loads(acl("--json", "--role", "api").stdout) for _ in range(2))
    assert first[0]["password"] != second[0]["password"]
    assert len(first[0]["password"]) == 43
    assert f">{first[0]['password']}" in first[0]["rules"]


def test_an_aclfile_holds_one_user_a_line_and_the_default_user_can_be_switched_off() -> None:
    lines = acl("--format", "aclfile", "--default-off").stdout.splitlines()
    assert [line.split()[1] for line in lines] == [*(f"fq-{role}" for role in ROLES), "default"]
    assert lines[-1] == "user default reset off"


def test_for_redis_6_2_the_rules_have_no_read_only_patterns_and_say_so() -> None:
    printed = acl("--server", "6.2", "--role", "api")
    assert "%R~" not in printed.stdout
    assert f"~{keys.API_KEYS}" in printed.stdout
    assert "can write" in printed.stderr


def test_with_a_further_word_acl_is_the_command_of_redis(folder: Path) -> None:
    server = TcpRedis(KINDS["valkey"].binary(), folder)
    command = [sys.executable, "-m", "fastchat_q.cli", "redis", "--redis-url", server.url(), "acl", "whoami"]
    try:
        assert "default" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    finally:
        server.close()


async def test_the_api_may_read_job_records(secured: Secured) -> None:
    async with connect(secured.url("api", "test")) as client:
        assert await read_record(client, "echo", "1") is None  # every command of the reading was allowed
