"""The orchestrator's ticks, run by a real arq worker against a real server."""

import asyncio
import json
from pathlib import Path

from fastchat_q.api import orchestrator
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.queue import Queue
from fastchat_q.registry import ModelCard, Registration, Registry

from .protocol import MODEL, NAMES, claim, enqueue, expire_lease, finish
from .servers import RedisServer, wait_until
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


async def test_the_process_ticks_at_once_says_that_it_lives_and_pickles_nothing(
    redis: "Redis", redis_server: RedisServer, folder: Path
) -> None:
    process = Process(folder / "log", "orchestrator", **redis_server.environment())
    with redis_server.orchestrator_client() as client:
        wait_until(lambda: "housekeeping" in process.output(), "a tick")
        wait_until(lambda: client.exists(keys.ORCHESTRATOR_HEALTH), "the health line")
        for name in client.scan_iter("arq:job:*"):
            json.loads(client.get(name) or "")
    assert await asyncio.to_thread(process.stop) == 0
