"""Who is served when: fair sharing between tenants, lanes, caps, clocks."""

import time

import pytest
from redis.asyncio import Redis

from fastchat_q.errors import QueueDrainingError, QueueFullError
from fastchat_q.queue import Advice, Queue, Terms

from .protocol import MODEL, NAMES, claim, enqueue, field, finish, make_late, take


async def order_of_service(queue: Queue, of: range) -> list[int]:
    """At which places, from 1, the jobs with these numbers are served."""
    served = [held.job_id for _ in range(of.stop // 8 + 1) for held in await claim(queue, free=64)]
    return [served.index(f"JOB{number:04}") + 1 for number in of]


async def test_a_thousand_jobs_of_one_tenant_do_not_stand_before_twenty_of_another(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(1000):
        await enqueue(queue, number, tenant="a", max_waiting=2000)
    for number in range(1000, 1020):
        await enqueue(queue, number, tenant="b", max_waiting=2000)
    places = await order_of_service(queue, range(1000, 1020))
    assert all(2 * i + 1 <= place <= 2 * i + 2 for i, place in enumerate(places)), places


async def test_who_comes_new_catches_up_with_those_who_run_before_the_sharing_begins(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(100):
        await enqueue(queue, number, tenant="a", max_waiting=500)
    assert len(await claim(queue, free=4)) == 4, "a has all slots"
    for number in range(100, 130):
        await enqueue(queue, number, tenant="b", max_waiting=500)
    places = await order_of_service(queue, range(100, 130))
    assert places[:16] == list(range(1, 17)), "four times what runs"
    assert places[-1] in (43, 44, 45), "from then on by turns"


async def test_a_tenant_of_weight_three_gets_three_times_the_share(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(100):
        await enqueue(queue, number, tenant="a", max_waiting=500)
    for number in range(100, 130):
        await enqueue(queue, number, tenant="b", weight=3.0, max_waiting=500)
    places = await order_of_service(queue, range(100, 130))
    assert places[-1] in range(38, 42), "thirty of b and ten of a"


async def test_a_tenant_that_comes_late_gets_its_share_from_then_on_and_no_more(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(100):
        await enqueue(queue, number, tenant="a")
    await claim(queue, free=50)
    for number in range(100, 110):
        await enqueue(queue, number, tenant="b")
    served = [held.job_id for held in await claim(queue, free=20)]
    assert sum(job_id >= "JOB0100" for job_id in served) in (9, 10), "idle time is no credit"


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan"), 1e9])
def test_a_weight_that_would_break_the_accounts_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Terms(weight=weight)


async def test_jobs_beyond_the_tenants_parallel_cap_let_others_pass_and_go_when_one_ends(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(1, 5):
        await enqueue(queue, number, tenant="a", max_parallel=2)
    await enqueue(queue, 5, tenant="b")
    held = await claim(queue, free=10)
    assert sorted(h.job_id for h in held) == ["JOB0001", "JOB0002", "JOB0005"]
    assert await claim(queue, free=10) == []
    await finish(redis, held[0], 0)
    assert [h.job_id for h in await claim(queue, free=10)] == ["JOB0003"]


@pytest.mark.parametrize("how", ["cancelled", "expired"])
async def test_a_parked_job_takes_the_turn_of_one_that_ends_in_the_line(redis: "Redis", how: str) -> None:
    queue = Queue(redis)
    for number in range(1, 5):
        await enqueue(queue, number, tenant="a", max_parallel=2)
    first, _ = await claim(queue, free=10)
    await finish(redis, first, 0)
    if how == "cancelled":
        await queue.cancel(MODEL, "JOB0003", "test")
    else:
        await make_late(redis, "deadline_ms", 3)
    assert [h.job_id for h in await claim(queue, free=10)] == ["JOB0004"], "else the tenant runs one job too few"


async def test_a_tenant_whose_jobs_are_parked_is_not_sent_to_the_end_of_a_new_line(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(1, 11):
        await enqueue(queue, number, tenant="a", max_parallel=1)
    [held] = await claim(queue, free=10)
    for number in range(20, 40):
        await enqueue(queue, number, tenant="b")
    for number in range(2, 10):
        await finish(redis, held, 0)
        await queue.cancel(MODEL, f"JOB{number:04}", "test")
        served = await claim(queue, free=2)
        [held] = [h for h in served if h.job_id < "JOB0020"] or [held]
    assert held.job_id == "JOB0010"


async def test_a_tenant_may_have_only_so_many_jobs_waiting(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in (1, 2):
        await enqueue(queue, number, tenant="a", max_queued=2)
    with pytest.raises(QueueFullError, match="2 jobs waiting"):
        await enqueue(queue, 3, tenant="a", max_queued=2)
    await enqueue(queue, 4, tenant="b", max_queued=2)
    await claim(queue)
    await enqueue(queue, 3, tenant="a", max_queued=2)


async def test_a_refusal_says_when_to_come_again_from_depth_and_measured_service_time(redis: "Redis") -> None:
    queue = Queue(redis)
    await redis.hset(NAMES.stat, "service_ms", 3000)  # type: ignore[misc]
    for number in range(10):
        await enqueue(queue, number, slots=2, max_waiting=10)
    with pytest.raises(QueueFullError, match="10 jobs wait, the limit is 10") as full:
        await enqueue(queue, 10, slots=2, max_waiting=10)
    assert full.value.retry_after_s == 15, "ten jobs of 3 s on two slots"
    await redis.delete(NAMES.stat)
    with pytest.raises(QueueFullError) as unmeasured:
        await enqueue(queue, 10, slots=2, max_waiting=10)
    assert unmeasured.value.retry_after_s == 5


async def test_a_job_that_could_not_start_in_time_is_refused_at_once(redis: "Redis") -> None:
    queue = Queue(redis)
    await redis.hset(NAMES.stat, "service_ms", 3000)  # type: ignore[misc]
    for number in range(10):
        await enqueue(queue, number, slots=2)
    with pytest.raises(QueueFullError, match="for about 15 s, and this one must start within 14 s"):
        await enqueue(queue, 10, slots=2, queue_deadline_s=14.0)
    await enqueue(queue, 10, slots=2, queue_deadline_s=16.0)


async def test_the_measured_service_time_follows_the_jobs_that_succeeded(redis: "Redis") -> None:
    queue = Queue(redis)
    for number, took in ((1, 1600), (2, 3200)):
        await enqueue(queue, number)
        [held] = await claim(queue)
        started = int(await field(redis, "start_ms", number) or 0)
        await redis.hset(NAMES.job(held.job_id), "start_ms", started - took)  # type: ignore[misc]
        await finish(redis, held, 0)
    measured = float(await redis.hget(NAMES.stat, "service_ms"))  # type: ignore[misc, arg-type]
    assert 1700 <= measured < 1750, "a sixteenth of the way"


async def test_a_worker_may_serve_batch_first_and_take_only_so_many_of_a_lane(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(1, 5):
        await enqueue(queue, number)
        await enqueue(queue, 10 + number, lane="lo")
    taken = await queue.claim(MODEL, "w1", running=0, lanes=[("lo", 1), ("hi", 3)], nonce="n1")
    assert [held.job_id for held in taken.claims] == ["JOB0011", "JOB0001", "JOB0002"]
    taken = await queue.claim(MODEL, "w1", running=3, lanes=[("hi", 0), ("lo", 2)], nonce="n2")
    assert [held.job_id for held in taken.claims] == ["JOB0012", "JOB0013"]


async def test_a_paused_queue_accepts_and_gives_nothing_out_and_a_draining_one_the_reverse(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue, 1)
    await redis.set(NAMES.mode, "paused")
    await enqueue(queue, 2)
    assert (await take(queue)).advice is Advice.PAUSED
    await redis.set(NAMES.mode, "draining")
    with pytest.raises(QueueDrainingError):
        await enqueue(queue, 3)
    assert len(await claim(queue, free=5)) == 2


async def test_a_job_that_is_not_begun_in_time_expires_and_one_that_was_begun_has_until_its_deadline(
    redis: "Redis",
) -> None:
    queue = Queue(redis)
    await enqueue(queue, 1)
    await enqueue(queue, 2)
    [held] = await claim(queue)
    await queue.release(MODEL, [held])
    for number in (1, 2):
        await make_late(redis, "start_by_ms", number)
    assert (await queue.reap(MODEL)).expired == 1
    assert (await field(redis, "state", 1), await field(redis, "state", 2)) == ("queued", "expired")
    await make_late(redis, "deadline_ms", 1)
    assert await claim(queue) == []
    assert (await field(redis, "state", 1), await field(redis, "reason", 1)) == ("expired", "deadline")


async def test_a_running_job_past_its_deadline_ends(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [held] = await claim(queue)
    await make_late(redis, "deadline_ms")
    assert (await queue.reap(MODEL)).expired == 1
    assert await queue.renew(MODEL, [held]) == [held]


async def keep(queue: Queue, free: int, running: int) -> tuple[list[str], Advice]:
    """Claims with a headroom of one slot."""
    nonce = f"n{running}-{free}"
    taken = await queue.claim(MODEL, "w1", running=running, lanes=[("hi", free)], nonce=nonce, headroom=1)
    return [held.job_id for held in taken.claims], taken.advice


async def a_light_and_a_heavy_tenant(redis: "Redis") -> Queue:
    """b was served once and is away; a has fifty jobs in line."""
    queue = Queue(redis)
    await enqueue(queue, 1, tenant="b")
    [held] = await claim(queue)
    await finish(redis, held, 0)
    for number in range(100, 150):
        await enqueue(queue, number, tenant="a")
    return queue


async def test_a_tenant_that_fills_a_worker_leaves_a_slot_to_one_that_was_there_lately(redis: "Redis") -> None:
    queue = await a_light_and_a_heavy_tenant(redis)
    served, advice = await keep(queue, free=8, running=0)
    assert (len(served), advice) == (7, Advice.KEPT)
    assert await keep(queue, free=1, running=7) == ([], Advice.KEPT)
    await enqueue(queue, 2, tenant="b")
    assert await keep(queue, free=1, running=7) == (["JOB0002"], Advice.NONE)


async def test_a_tenant_that_stays_away_costs_nothing_any_more(redis: "Redis") -> None:
    queue = await a_light_and_a_heavy_tenant(redis)
    assert 9_000 < (await redis.zscore(NAMES.away, "b") or 0) - time.time() * 1000 <= 10_000
    await redis.zadd(NAMES.away, {"b": 1})
    assert len((await keep(queue, free=8, running=0))[0]) == 8
    await queue.reap(MODEL)
    assert not await redis.exists(NAMES.away)


async def test_a_tenant_alone_and_tenants_that_all_have_jobs_in_line_use_every_slot(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(20):
        await enqueue(queue, number, tenant="a")
    assert len((await keep(queue, free=8, running=0))[0]) == 8
    for number in range(20, 40):
        await enqueue(queue, number, tenant="b")
    served, advice = await keep(queue, free=16, running=8)
    assert (len(served), advice) == (16, Advice.NONE)


async def test_two_tenants_with_jobs_in_line_leave_one_slot_to_a_third(redis: "Redis") -> None:
    queue = await a_light_and_a_heavy_tenant(redis)
    for number in range(20, 40):
        await enqueue(queue, number, tenant="c")
    served, advice = await keep(queue, free=8, running=0)
    assert (len(served), advice) == (7, Advice.KEPT)


async def test_a_kept_slot_goes_to_a_tenant_up_to_its_equal_share(redis: "Redis") -> None:
    queue = await a_light_and_a_heavy_tenant(redis)
    assert len((await keep(queue, free=1, running=0))[0]) == 1, "nothing runs: nobody has more than a share"
    assert await keep(queue, free=1, running=1) == ([], Advice.KEPT)
    await enqueue(queue, 2, tenant="b")
    assert (await keep(queue, free=1, running=1))[0] == ["JOB0002"]
    assert len((await keep(queue, free=1, running=2))[0]) == 1, "one of two is a half"


async def test_jobs_that_are_parked_count_for_the_bound_on_waiting_jobs(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(21):  # one runs, twice ten wait in one way or another
        await enqueue(queue, number, tenant="a", max_parallel=1, max_waiting=10)
        await claim(queue, free=10)
    with pytest.raises(QueueFullError):
        await enqueue(queue, 21, tenant="a", max_parallel=1, max_waiting=10)
