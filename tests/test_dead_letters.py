"""Jobs that are given up: what is kept of them, and how they come back."""

import pytest
from redis.asyncio import Redis

from fastchat_q.events import Result
from fastchat_q.jobs import Message
from fastchat_q.queue import MAX_RETRIES, Claim, Finish, Queue
from fastchat_q.tokens import append, read

from .protocol import MODEL, NAMES, claim, drop, emit, enqueue, field, finish, job, lose_worker, revive


async def retry(redis: "Redis", held: Claim, n: int = 0, backoff_s: float = 60.0) -> None:
    await append(redis, MODEL, [], [Finish(held, n, "retry", "oom", Result(), backoff_s)])


async def die(redis: "Redis", number: int = 1) -> None:
    for _ in range(4):
        [_] = await claim(Queue(redis))
        await lose_worker(redis, number)


async def test_a_retry_waits_for_its_time_and_goes_first_then(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue, 1)
    [held] = await claim(queue)
    await emit(redis, held, 1, 7)
    await retry(redis, held, 1)
    await enqueue(queue, 2)
    assert (await field(redis, "state"), await field(redis, "reason")) == ("queued", "oom")
    await redis.zadd(NAMES.delay, {"JOB0001": 1})
    assert [(h.job_id, h.n) for h in await claim(queue, free=2)] == [("JOB0001", 1), ("JOB0002", 0)]


async def test_a_job_whose_retries_are_used_up_is_dead(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    for _ in range(MAX_RETRIES + 1):
        [held] = await claim(queue)
        await retry(redis, held, backoff_s=0.0)
        await queue.reap(MODEL)
    assert (await field(redis, "state"), await field(redis, "reason")) == ("dead", "oom")
    [(_, letter)] = await redis.xrange(NAMES.dead)
    assert letter == {b"j": b"JOB0001", b"reason": b"oom"}


async def test_a_suspect_that_is_tried_again_stays_in_quarantine(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    for _ in range(2):
        await claim(queue)
        await lose_worker(redis)
    [held] = await claim(queue)
    await retry(redis, held, backoff_s=0.0)
    [again] = await claim(queue, "w2", free=5)
    assert (again.lane, await field(redis, "home")) == ("sus", "hi")


async def test_a_dead_job_tells_its_history_and_keeps_prompt_and_tokens_for_days(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [held] = await claim(queue, "w7")
    await emit(redis, held, 1, 7)
    await lose_worker(redis)
    await die_further(redis)
    assert (await field(redis, "state"), await field(redis, "deaths")) == ("dead", "4")
    for attempt in range(1, 5):
        begun, ended = await field(redis, f"a{attempt}"), await field(redis, f"e{attempt}")
        assert begun is not None
        assert ended is not None
        assert begun.split()[1] == ("w7" if attempt == 1 else "w1")
        assert ended.split(" ", 1)[1] == ("lease ran out" if attempt < 4 else "dead")
    assert await field(redis, "spec") == job().to_spec()
    for name in (NAMES.job("JOB0001"), NAMES.log("JOB0001")):
        assert 6 * 86_400_000 < await redis.pttl(name) <= 7 * 86_400_000


async def die_further(redis: "Redis") -> None:
    for _ in range(3):
        await claim(Queue(redis))
        await lose_worker(redis)


@pytest.mark.parametrize("anew", [False, True])
async def test_a_revived_job_starts_with_counters_at_zero_behind_its_tokens_or_anew(redis: "Redis", anew: bool) -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [held] = await claim(queue)
    await emit(redis, held, 1, 7)
    await lose_worker(redis)
    await die_further(redis)
    other = job().model_copy(update={"messages": (Message(role="user", content="harmless"),)}).to_spec()
    assert await revive(redis, spec=other if anew else "") == 1
    assert await redis.xlen(NAMES.dead) == 0
    assert [await field(redis, name) for name in ("deaths", "retries", "lane", "a1", "e1", "reason")] == [
        "0",
        "0",
        "hi",
        None,
        None,
        None,
    ]
    assert await field(redis, "inbox") == "*", "nobody may be there to hear it"
    assert (await field(redis, "keep_ms"), await field(redis, "void")) == ("60000", "1" if anew else None)
    [again] = await claim(queue)
    assert (again.attempt, again.n, again.lane) == (1, 0 if anew else 1, "hi")
    assert again.spec.decode() == (other if anew else job().to_spec())
    n = again.n + 1
    await emit(redis, again, n, 9)
    assert await redis.pttl(NAMES.log("JOB0001")) > 0
    await finish(redis, again, n)
    assert await field(redis, "state") == "succeeded"
    assert len(await read(redis, MODEL, "JOB0001")) == n


async def test_a_dropped_job_leaves_nothing(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    await die(redis)
    assert await drop(redis) == 1
    assert await drop(redis) == 0
    assert await redis.exists(NAMES.job("JOB0001"), NAMES.log("JOB0001")) == 0
    assert await redis.xlen(NAMES.dead) == 0


async def test_only_dead_jobs_are_revived_or_dropped(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    assert (await revive(redis), await drop(redis), await revive(redis, 9), await drop(redis, 9)) == (0, 0, 0, 0)
    [held] = await claim(queue)
    await finish(redis, held, 0)
    assert (await revive(redis), await drop(redis)) == (0, 0)
    assert await field(redis, "state") == "succeeded"
