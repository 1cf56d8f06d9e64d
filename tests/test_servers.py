"""What differs between servers: errors, cluster mode, commands that some of them lack, which one `up` starts."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ClusterDownError, OutOfMemoryError

from fastchat_q import keys
from fastchat_q.capabilities import has_command
from fastchat_q.connection import TRANSIENT, connect
from fastchat_q.embedded import server_binary
from fastchat_q.errors import ConfigurationError
from fastchat_q.queue import Queue
from fastchat_q.replies import NoReplicasError, ReplyParser

from .protocol import enqueue
from .servers import CHOSEN, Kind, RedisServer, wait_until
from .stack import Process


@pytest.fixture
def cluster(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(folder, Kind(CHOSEN.find, cluster=True))
    yield server
    server.close()


@pytest.mark.parametrize("command", ["up", "orchestrator"])
def test_in_cluster_mode_the_orchestrator_asks_for_a_server_of_its_own(
    cluster: RedisServer, folder: Path, command: str
) -> None:
    process = Process(
        folder / "log", command, FASTCHAT_Q_REDIS_URL=cluster.url, FASTCHAT_Q_STATE_DIR=str(folder / "state")
    )
    assert process.wait() == 2
    assert "name another server for that with FASTCHAT_Q_ORCHESTRATOR_REDIS_URL" in process.output()


def test_with_a_server_of_its_own_the_orchestrator_looks_after_a_cluster(cluster: RedisServer, folder: Path) -> None:
    process = Process(folder / "log", "orchestrator", **cluster.environment())
    wait_until(lambda: "housekeeping" in process.output(), "a tick")
    with cluster.orchestrator_client() as client:
        wait_until(lambda: client.exists(keys.ORCHESTRATOR_HEALTH), "the health line")
    assert process.stop() == 0, process.output()


async def test_a_master_without_enough_replicas_is_an_error_that_passes_by(redis: "Redis") -> None:
    await redis.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(NoReplicasError) as raised:
            await enqueue(Queue(redis))
    finally:
        await redis.config_set("min-replicas-to-write", 0)
    assert isinstance(raised.value, TRANSIENT)


async def test_a_node_whose_cluster_is_down_is_an_error_that_passes_by(cluster: RedisServer) -> None:
    async with connect(cluster.url) as redis:
        await redis.execute_command("CLUSTER DELSLOTS", 0)
        with pytest.raises(ClusterDownError) as raised:
            await redis.get("any")
    assert isinstance(raised.value, TRANSIENT)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'. script: 5f, on @user_script:9.", OutOfMemoryError),
        (
            "ERR Error running script (call to f_5f): @user_script:9: @user_script: 9: -OOM command not allowed. ",
            OutOfMemoryError,
        ),
    ],
    ids=["since Redis 7", "before"],
)
def test_an_error_inside_a_script_is_the_error_of_the_command(reply: str, kind: type[Exception]) -> None:
    assert type(ReplyParser.parse_error(reply)) is kind


async def test_commands_are_found_by_asking_the_server(redis: "Redis") -> None:
    assert await has_command(redis, "xautoclaim")
    assert not await has_command(redis, "no-such-command")


async def test_a_burst_in_cluster_mode_touches_several_models_in_one_round_trip(cluster: RedisServer) -> None:
    async with connect(cluster.url) as redis:
        pipe = redis.pipeline(transaction=False)
        for number in range(8):
            pipe.zcard(keys.model_keys(f"model-{number}").live)
        assert await asyncio.wait_for(pipe.execute(), 30) == [0] * 8


def test_a_named_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="FASTCHAT_Q_REDIS_SERVER /nowhere/redis-server"):
        server_binary(Path("/nowhere/redis-server"))
