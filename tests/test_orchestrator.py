"""The orchestrator's ticks, run by a real arq worker against a real server."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from arq.connections import ArqRedis
from arq.constants import default_queue_name
from fastchat_q.api import orchestrator
from fastchat_q.api.orchestrator import NAMED_S, find_batches, make_driver
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.batches import Manifest, new_batch_id
from fastchat_q.files import new_file_id
from fastchat_q.queue import Queue
from fastchat_q.registry import ModelCard, Registration, Registry
from fastchat_q.settings import Settings
from fastchat_q.tenants import ANONYMOUS

from .protocol import MODEL, NAMES, claim, enqueue, expire_lease, finish
from .servers import CHOSEN, RedisServer, wait_until
from .stack import Process


async def serve_model(redis: "Redis") -> None:
    """A worker of MODEL was there."""
    await Registry(redis).announce(Registration.of_this_process("w", ModelCard(MODEL, "echo", None, 0), 1))


async def test_a_tick_reaps_queues_that_nobody_looks_after(redis: "Redis") -> None:
    await serve_model(redis)
    queue = Queue(redis)
    await enqueue(queue)
    await claim(queue)
    await expire_lease(redis)
    assert await orchestrator.housekeeping({"client": redis}) == {"consumers_removed": 0, "reaped": 1, "mended": 0}


async def test_a_tick_removes_long_idle_consumers_but_never_one_with_pending_entries(redis: "Redis") -> None:
    await serve_model(redis)
    queue = Queue(redis)
    for number in (1, 2):
        await enqueue(queue, number)
    await claim(queue, "busy")
    [held] = await claim(queue, "idle")
    await finish(redis, held, 0)
    names = [c["name"] for c in await redis.xinfo_consumers(NAMES.stream("hi"), keys.GROUP)]
    assert sorted(names) == [b"busy", b"idle"]
    removed = await orchestrator._remove_idle_consumers(redis, NAMES.stream("hi"), idle_ms=-1)
    assert removed == 1
    [left] = await redis.xinfo_consumers(NAMES.stream("hi"), keys.GROUP)
    assert left["name"] == b"busy"


@pytest.mark.skipif(CHOSEN.cluster, reason="in cluster mode arq has a server of its own")
async def test_a_tick_that_died_before_it_counted_itself_holds_up_its_batch_for_seconds_only(
    redis: "Redis", folder: Path
) -> None:
    now = [1_800_000_000.0]
    driver = replace(make_driver(redis, Settings(state_dir=folder)), clock=lambda: now[0])
    batch_id = new_batch_id()
    await driver.batches.create(
        Manifest(batch_id, ANONYMOUS.model_dump(mode="json"), new_file_id(), "/v1/completions", "24h", 0, 1)
    )
    pool = ArqRedis(connection_pool=redis.connection_pool, job_serializer=orjson.dumps)
    ctx = {"driver": driver, "redis": pool}

    async def named() -> int:
        await find_batches(ctx)
        return int(await redis.zcard(default_queue_name))

    assert [await named(), await named()] == [1, 1], "one waits, or has died with arq's mark on it"
    now[0] += NAMED_S
    assert [await named(), await named()] == [2, 2]
    now[0] += NAMED_S
    await redis.config_set("maxmemory", "1mb")
    try:
        assert await named() == 2, "there is no room, and nothing is raised"
    finally:
        await redis.config_set("maxmemory", "0")


async def test_the_process_ticks_at_once_says_that_it_lives_and_pickles_nothing(
    redis: "Redis", redis_server: RedisServer, folder: Path
) -> None:
    process = Process(folder / "log", "orchestrator", **redis_server.environment())
    with redis_server.orchestrator_client() as client:
        wait_until(lambda: "housekeeping" in process.output(), "a tick")
        wait_until(lambda: client.exists(keys.ORCHESTRATOR_HEALTH), "the health line")
        for name in client.scan_iter("arq:job:*"):
            json.loads(client.get(name) or "null")  # gone since it was listed
    assert await asyncio.to_thread(process.stop) == 0
