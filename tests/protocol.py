"""The protocol's calls with short names, for tests that drive the scripts directly: jobs JOB0001, JOB0002, …"""

import time
from typing import Any

from redis.asyncio import Redis

from fastchat_q import keys, scripts
from fastchat_q.events import Piece, Result, Usage
from fastchat_q.jobs import Job
from fastchat_q.queue import Claim, Finish, Queue, Taken, Terms
from fastchat_q.tokens import Chunk, Status, append

MODEL = "org/Some-Model"
NAMES = keys.model_keys(MODEL)
DONE = Result("stop", Usage(3, 2))


def job(number: int = 1, lane: str = "hi") -> Job:
    return Job.model_validate(
        {"id": f"JOB{number:04}", "model": MODEL, "lane": lane, "messages": [{"role": "user", "content": "hi"}]}
    )


async def enqueue(queue: Queue, number: int = 1, lane: str = "hi", **terms: Any) -> int:
    given = {"inbox": "fq:inbox:t", "deadline_s": 60.0, "max_waiting": 100, **terms}
    return (await queue.enqueue(job(number, lane), Terms(**given))).place


async def claim(
    queue: Queue, worker: str = "w1", free: int = 1, lanes: tuple[str, ...] = keys.LANES, running: int = 0
) -> list[Claim]:
    return (await take(queue, worker, free, lanes, running)).claims


async def take(
    queue: Queue, worker: str = "w1", free: int = 1, lanes: tuple[str, ...] = keys.LANES, running: int = 0
) -> Taken:
    nonce = f"n{time.monotonic_ns()}"
    return await queue.claim(MODEL, worker, running=running, lanes=[(lane, free) for lane in lanes], nonce=nonce)


async def emit(redis: "Redis", holder: Claim, n: int, *ids: int, text: str = "x") -> Status:
    [status] = (await append(redis, MODEL, [Chunk(holder, n, (Piece(ids, text),))])).chunks
    return Status.OK if status is Status.UNHEARD else status  # these tests do not listen


async def finish(redis: "Redis", holder: Claim, n: int) -> Status:
    return (await append(redis, MODEL, [], [Finish(holder, n, "succeeded", "stop", DONE)])).finishes[0]


async def field(redis: "Redis", name: str, number: int = 1) -> str | None:
    value = await redis.hget(NAMES.job(f"JOB{number:04}"), name)  # type: ignore[misc]
    return None if value is None else value.decode()


async def expire_lease(redis: "Redis", number: int = 1) -> None:
    await redis.zadd(NAMES.lease, {f"JOB{number:04}": 1})


async def revive(redis: "Redis", number: int = 1, spec: str = "") -> int:
    args = (f"JOB{number:04}", 600_000, 3_600_000, spec, 60_000)
    return int(await scripts.call(redis, "revive", NAMES.script_keys, args))


async def drop(redis: "Redis", number: int = 1) -> int:
    return int(await scripts.call(redis, "drop", NAMES.script_keys, (f"JOB{number:04}",)))


async def lose_worker(redis: "Redis", number: int = 1) -> None:
    await expire_lease(redis, number)
    await Queue(redis).reap(MODEL)


async def make_late(redis: "Redis", clock: str, number: int = 1) -> None:
    """One of its clocks has run out."""
    job_id = f"JOB{number:04}"
    enq_ms = await redis.hget(NAMES.job(job_id), "enq_ms")  # type: ignore[misc]
    await redis.hset(NAMES.job(job_id), clock, enq_ms)  # type: ignore[misc]
    await redis.zadd(NAMES.live, {job_id: 1})
