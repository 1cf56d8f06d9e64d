"""The worker's loops against a real server, in this process, with the echo engine."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from fastchat_q.workers.engines.base import Output
from fastchat_q.workers.engines.echo import EchoEngine
from fastchat_q.workers.worker import MAX_STEPS_AHEAD, Worker
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.events import Delta
from fastchat_q.jobs import Job, Message
from fastchat_q.queue import Queue
from fastchat_q.tokens import read

NAMES = keys.model_keys("echo")
WORDS = [f"w{number}" for number in range(150)]


def job(job_id: str = "J1", words: list[str] = WORDS, lane: str = "hi") -> Job:
    message = Message(role="user", content=" ".join(words))
    return Job.model_validate({"id": job_id, "model": "echo", "lane": lane, "messages": [message.model_dump()]})


async def enqueue(redis: "Redis", *jobs: Job) -> None:
    for one in jobs:
        await Queue(redis).enqueue(one, inbox="fq:inbox:t", deadline_s=60, max_waiting=100)


async def state(redis: "Redis", job_id: str = "J1") -> str:
    value = await redis.hget(NAMES.job(job_id), "state")  # type: ignore[misc]
    return value.decode() if value else "none"


async def until(fact: Callable[[], object], what: str) -> None:
    for _ in range(4000):
        if await fact():  # type: ignore[misc]
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"not within 20 s: {what}")


async def ended(redis: "Redis", job_id: str = "J1") -> None:
    async def over() -> bool:
        return await state(redis, job_id) not in ("queued", "running")

    await until(over, "the job ends")


@asynccontextmanager
async def running(redis: "Redis", blocking: "Redis", engine: EchoEngine, drain_s: float = 5) -> AsyncIterator[Worker]:
    stop = asyncio.Event()
    worker = Worker(redis, blocking, engine, drain_s)
    task = asyncio.create_task(worker.run(stop))
    try:
        yield worker
    finally:
        stop.set()
        await task


def assert_whole(log: list[Delta], words: list[str] = WORDS) -> None:
    """Counts without gap or overlap, and the text."""
    seen = 0
    for delta in log:
        assert delta.n - delta.k == seen
        seen = delta.n
    assert "".join(delta.text for delta in log).split() == words


async def test_a_worker_that_keeps_losing_its_job_to_itself_writes_each_token_once(
    redis: "Redis", blocking_redis: "Redis"
) -> None:
    async with running(redis, blocking_redis, EchoEngine("echo", 4, 0.005)):
        await enqueue(redis, job())
        for loss in range(3):  # the fourth would make it dead

            async def further(least: int = 20 * (loss + 1)) -> bool:
                return int(await redis.hget(NAMES.job("J1"), "n") or 0) >= least  # type: ignore[misc]

            await until(further, "it gets on")
            await redis.zadd(NAMES.lease, {"J1": 1})
            await Queue(redis).reap("echo")
        await ended(redis)
    assert await state(redis) == "succeeded"
    assert_whole(await read(redis, "echo", "J1"))
    assert await redis.hget(NAMES.job("J1"), "attempt") == b"4"  # type: ignore[misc]


async def test_output_of_a_claim_that_is_gone_is_not_taken_for_the_next_ones(
    redis: "Redis", blocking_redis: "Redis"
) -> None:
    async with running(redis, blocking_redis, EchoEngine("echo", 4, 0.005)) as worker:
        await enqueue(redis, job())

        async def claimed() -> bool:
            return bool(worker._active)

        await until(claimed, "it runs")
        worker._on_outputs([Output("J1 0-stale", (999,), "stale")])
        await ended(redis)
    assert_whole(await read(redis, "echo", "J1"))


async def test_it_takes_no_more_jobs_than_it_has_slots(redis: "Redis", blocking_redis: "Redis") -> None:
    await enqueue(redis, *(job(f"J{n}") for n in range(6)))
    async with running(redis, blocking_redis, EchoEngine("echo", 2, 0.002), drain_s=30):
        most = 0
        while await redis.zcard(NAMES.live):
            most = max(most, await redis.zcard(NAMES.lease))
            await asyncio.sleep(0.002)
    assert most == 2


async def test_a_spec_that_is_no_job_fails_alone(redis: "Redis", blocking_redis: "Redis") -> None:
    await enqueue(redis, job("J1"), job("J2", ["a", "b"]))
    await redis.hset(NAMES.job("J1"), "spec", '{"v":2,"what":"ever"}')  # type: ignore[misc]
    async with running(redis, blocking_redis, EchoEngine("echo", 4, 0)):
        await ended(redis, "J1")
        await ended(redis, "J2")
    assert (await state(redis, "J1"), await state(redis, "J2")) == ("failed", "succeeded")
    assert await redis.hget(NAMES.job("J1"), "reason") == b"bad_spec"  # type: ignore[misc]


async def test_a_job_whose_log_was_cut_fails_with_a_clear_error(redis: "Redis", blocking_redis: "Redis") -> None:
    await enqueue(redis, job())
    await redis.hset(NAMES.job("J1"), "n", 7)  # type: ignore[misc]
    async with running(redis, blocking_redis, EchoEngine("echo", 4, 0)):
        await ended(redis)
    assert await state(redis) == "failed"
    assert await redis.hget(NAMES.job("J1"), "reason") == b"log_incomplete"  # type: ignore[misc]


async def test_a_job_whose_last_token_is_logged_but_not_its_end_is_ended(
    redis: "Redis", blocking_redis: "Redis"
) -> None:
    """Its worker died between EMIT and FINISH."""
    words = ["a", "b"]
    await enqueue(redis, job("J1", words))
    async with running(redis, blocking_redis, EchoEngine("echo", 1, 0)):
        await ended(redis)
    await redis.delete(NAMES.job("J1"))
    await enqueue(redis, job("J1", words))
    await redis.hset(NAMES.job("J1"), "n", 2)  # type: ignore[misc]
    async with running(redis, blocking_redis, EchoEngine("echo", 1, 0)):
        await ended(redis)
    assert await state(redis) == "succeeded"
    assert_whole(await read(redis, "echo", "J1"), words)


async def test_a_dead_engine_ends_the_worker_with_its_cause(redis: "Redis", blocking_redis: "Redis") -> None:
    class Broken(EchoEngine):
        def step(self) -> list[Output]:
            raise MemoryError("no more")

    worker = Worker(redis, blocking_redis, Broken("echo", 1, 0), drain_s=1)
    await enqueue(redis, job())
    with pytest.raises(RuntimeError, match="the engine died") as raised:
        async with asyncio.timeout(20):
            await worker.run(asyncio.Event())
    assert isinstance(raised.value.__cause__, MemoryError)
    assert await state(redis) == "running", "its lease will run out, and somebody else takes it"


async def test_a_job_cancelled_while_others_are_begun_is_not_begun(redis: "Redis", blocking_redis: "Redis") -> None:
    """The claim loop reads a log for the first job; meanwhile the second one is cancelled."""
    await enqueue(redis, job("J1"), job("J2"))
    worker = Worker(redis, blocking_redis, EchoEngine("echo", 4, 0), drain_s=1)
    first, second = await Queue(redis).claim("echo", worker.id, free=2, nonce="n")
    worker._take(first)
    worker._take(second)
    worker._lost(second)
    await worker._begin(second)
    assert list(worker._active) == ["J1"]


async def test_a_job_whose_log_cannot_be_read_now_is_left_to_its_lease(
    redis: "Redis", blocking_redis: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    await enqueue(redis, job("J1"))
    worker = Worker(redis, blocking_redis, EchoEngine("echo", 4, 0), drain_s=1)
    await redis.hset(NAMES.job("J1"), "n", 3)  # type: ignore[misc]
    [claim] = await Queue(redis).claim("echo", worker.id, free=1, nonce="n")
    worker._take(claim)
    monkeypatch.setattr(redis, "xrange", _away)
    await worker._begin(claim)
    assert not worker._active, "nothing renews its lease any more"


async def _away(*args: object, **kwargs: object) -> None:
    raise ConnectionError("cut")


async def test_an_engine_waits_for_a_loop_that_is_far_behind(redis: "Redis", blocking_redis: "Redis") -> None:
    """Or else its outputs would pile up, and heartbeats would wait behind them."""
    worker = Worker(redis, blocking_redis, EchoEngine("echo", 1, 0), drain_s=1)
    loop = asyncio.get_running_loop()
    steps: list[int] = []

    def generate() -> None:
        for step in range(MAX_STEPS_AHEAD + 10):
            worker._hand_over(loop, [])
            steps.append(step)

    engine = threading.Thread(target=generate)
    engine.start()
    engine.join(0.3)  # on the loop's own thread: meanwhile it takes nothing
    assert len(steps) == MAX_STEPS_AHEAD
    await asyncio.to_thread(engine.join)
    assert len(steps) == MAX_STEPS_AHEAD + 10
