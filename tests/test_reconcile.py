"""What operators, evictions and failovers break, the records mend."""

from typing import Any

import pytest
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.queue import Queue
from fastchat_q.tokens import Status

from .protocol import MODEL, NAMES, claim, emit, enqueue, field, finish, make_late

STREAM = NAMES.stream("hi")


async def rush(queue: Queue, jobs: int = 6, **terms: Any) -> None:
    for number in range(1, jobs + 1):
        await enqueue(queue, number, **terms)


async def settle(queue: Queue) -> int:
    """Calls until nothing is left to mend; returns how many things were."""
    total = 0
    for _ in range(10):
        mended = await queue.reconcile(MODEL)
        total += mended
        if mended == 0:
            return total
    raise AssertionError("it never ends")


async def group(redis: "Redis") -> tuple[int, int]:
    """Undelivered and pending entries; Redis 6.2 does not tell the lag, and it must be what is left of the length."""
    [found] = await redis.xinfo_groups(STREAM)
    return found.get("lag", await redis.xlen(STREAM) - found["pending"]), found["pending"]


async def test_a_sound_queue_needs_no_mending(redis: "Redis") -> None:
    queue = Queue(redis)
    await rush(queue)
    await claim(queue, free=2)
    assert await queue.reconcile(MODEL) == 0


async def test_after_xtrim_all_jobs_are_claimed_and_the_stream_counts_them_again(redis: "Redis") -> None:
    queue = Queue(redis)
    await rush(queue)
    await claim(queue, free=2)
    await redis.xtrim(STREAM, 0, approximate=False)
    assert await settle(queue) > 0
    assert await group(redis) == (4, 0), "the entries of the two that run are gone"
    assert len(await claim(queue, "w2", free=10)) == 4


async def test_after_xtrim_a_claim_needs_no_reconcile(redis: "Redis") -> None:
    queue = Queue(redis)
    await rush(queue)
    await redis.xtrim(STREAM, 0, approximate=False)
    assert [held.job_id for held in await claim(queue, free=3)] == ["JOB0001", "JOB0002", "JOB0003"]


@pytest.mark.parametrize("claimed_meanwhile", [0, 2])
async def test_after_xgroup_destroy_no_running_job_is_given_out_twice(redis: "Redis", claimed_meanwhile: int) -> None:
    queue = Queue(redis)
    await rush(queue)
    held = await claim(queue, free=2)
    await redis.xgroup_destroy(STREAM, keys.GROUP)
    if claimed_meanwhile:
        held += await claim(queue, "w2", free=claimed_meanwhile)
    await settle(queue)
    assert await redis.zcard(NAMES.waiting("hi")) == 4 - claimed_meanwhile
    held += await claim(queue, "w2", free=10)
    assert sorted(h.job_id for h in held) == [f"JOB{number:04}" for number in range(1, 7)]
    for h in held:
        assert await finish(redis, h, 0) is Status.OK
    await settle(queue)
    assert await redis.xlen(STREAM) == 0


async def test_a_group_destroyed_while_all_jobs_run_leaves_no_entries_behind(redis: "Redis") -> None:
    queue = Queue(redis)
    await rush(queue, 2)
    await claim(queue, free=2)
    await redis.xgroup_destroy(STREAM, keys.GROUP)
    await settle(queue)
    assert await redis.xlen(STREAM) == 0


async def test_deleted_leases_come_back_and_cost_a_living_worker_nothing(redis: "Redis") -> None:
    queue = Queue(redis)
    await rush(queue, 3)
    a, b, _ = await claim(queue, free=3)
    await redis.delete(NAMES.lease)
    assert await emit(redis, a, 1, 7) is Status.OK
    assert await queue.renew(MODEL, [b]) == []
    assert await redis.zcard(NAMES.lease) == 2, "a sign of life is a lease"
    assert await queue.reconcile(MODEL) == 1
    assert (await queue.reap(MODEL)).handed_back == 0
    now_s, _ = await redis.time()  # type: ignore[misc]
    assert await redis.zscore(NAMES.lease, "JOB0003") > 1000 * now_s, "its worker has a whole lease to say so"


@pytest.mark.parametrize("whole", [False, True])
async def test_jobs_whose_line_was_deleted_stand_in_it_again(redis: "Redis", whole: bool) -> None:
    queue = Queue(redis)
    await rush(queue)
    await (redis.delete(NAMES.waiting("hi")) if whole else redis.zrem(NAMES.waiting("hi"), "JOB0003"))
    await settle(queue)
    assert await redis.zcard(NAMES.waiting("hi")) == 6
    assert (await group(redis))[0] == 6
    assert len(await claim(queue, free=10)) == 6


async def test_foreign_entries_are_taken_off(redis: "Redis") -> None:
    queue = Queue(redis)
    await rush(queue, 2)
    for _ in range(5):
        await redis.xadd(STREAM, {"j": "NOBODY"})
    assert await settle(queue) == 5
    assert (await group(redis))[0] == 2


async def test_a_job_whose_record_is_gone_leaves_no_count_and_no_entry(redis: "Redis") -> None:
    queue = Queue(redis)
    await rush(queue, 3, max_parallel=2)
    await claim(queue, free=1)
    await redis.delete(NAMES.job("JOB0001"), NAMES.job("JOB0002"))
    await redis.zadd(NAMES.lease, {"JOB0001": 1})
    await queue.reap(MODEL)
    await settle(queue)
    assert await redis.hgetall(NAMES.queued) == {b"default": b"1"}  # type: ignore[misc]
    assert await redis.hgetall(NAMES.running) == {}  # type: ignore[misc]
    assert [held.job_id for held in await claim(queue, free=5)] == ["JOB0003"]
    assert await settle(queue) == 0
    assert await group(redis) == (0, 1)


async def test_counters_that_drifted_are_counted_anew(redis: "Redis") -> None:
    queue = Queue(redis)
    await rush(queue, 2, max_parallel=1)
    await redis.hset(NAMES.running, mapping={"default": 9, "ghost": 1})  # type: ignore[misc]
    await settle(queue)
    assert await redis.hgetall(NAMES.running) == {}  # type: ignore[misc]
    assert len(await claim(queue, free=5)) == 1


async def test_the_lag_is_known_again_after_a_waiting_job_was_cancelled(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(1, 7):
        before = await redis.time()  # type: ignore[misc]
        while (await redis.time())[1] // 1000 == before[1] // 1000:  # type: ignore[misc]
            pass  # each entry in a millisecond of its own
        await enqueue(queue, number)
    await claim(queue, free=2)
    await queue.cancel(MODEL, "JOB0004", "test")
    [found] = await redis.xinfo_groups(STREAM)
    if "lag" not in found:
        pytest.skip("this server never tells the lag")
    assert found["lag"] is None, "the entry delivered last is deleted, older ones run"
    await queue.reconcile(MODEL)
    assert await group(redis) == (3, 2)
    assert len(await claim(queue, "w2", free=10)) == 3


async def test_all_jobs_are_looked_at_a_slice_at_a_time(redis: "Redis") -> None:
    queue = Queue(redis)
    await rush(queue, 10)
    await redis.delete(NAMES.waiting("hi"))
    for _ in range(4):
        await queue.reconcile(MODEL, 3)
    assert await redis.zcard(NAMES.waiting("hi")) == 10


async def test_a_restored_log_is_where_the_next_worker_goes_on(redis: "Redis") -> None:
    queue = Queue(redis)
    await rush(queue, 2)
    [held] = await claim(queue)
    await emit(redis, held, 1, 7)
    payload = b'{"t":[8],"s":"x"}'
    assert await queue.restore(MODEL, "JOB0001", 5, [(6, 1, payload)]) == 3
    assert await queue.restore(MODEL, "JOB0001", 1, [(2, 1, payload)]) == 1
    assert await emit(redis, held, 2, 8) is Status.LOST
    assert await queue.restore(MODEL, "JOB0002", 0, [(4, 4, payload)]) == 1
    await make_late(redis, "start_by_ms", 2)
    assert (await queue.reap(MODEL)).expired == 0, "a client has tokens of it: it was begun"
    assert [(h.job_id, h.n) for h in await claim(queue, free=2)] == [("JOB0001", 2), ("JOB0002", 4)]
    assert await field(redis, "deaths") == "0"


async def test_a_stale_entry_among_the_live_jobs_changes_no_job_that_has_ended(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    await queue.cancel(MODEL, "JOB0001", "no")
    await redis.zadd(NAMES.live, {"JOB0001": 1})
    await redis.hset(NAMES.job("JOB0001"), "deadline_ms", 1)
    assert (await queue.reap(MODEL)).expired == 0
    assert await field(redis, "state") == "cancelled"
    assert await redis.zcard(NAMES.live) == 0
