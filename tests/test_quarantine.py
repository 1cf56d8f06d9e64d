"""Jobs that kill workers are proven alone, and take nobody with them."""

from redis.asyncio import Redis

from fastchat_q.queue import Advice, Queue

from .protocol import MODEL, NAMES, claim, enqueue, field, finish, lose_worker, take


async def make_suspect(redis: "Redis", *numbers: int) -> None:
    """These jobs lose two workers."""
    for number in numbers:
        await enqueue(Queue(redis), number)
        for _ in range(2):
            assert len(await claim(Queue(redis), "w0")) == 1
            await lose_worker(redis, number)


async def test_after_its_second_lost_worker_a_job_is_claimed_alone_and_not_beside_others(redis: "Redis") -> None:
    queue = Queue(redis)
    await make_suspect(redis, 1)
    for number in (2, 3):
        await enqueue(queue, number)
    taken = await take(queue, free=10)
    assert [(held.job_id, held.lane) for held in taken.claims] == [("JOB0001", "sus")]
    beside = await take(queue, free=9, running=1)
    assert (beside.claims, beside.advice) == ([], Advice.EMPTY_FIRST), "not even when no other suspect waits"
    assert len(await claim(queue, "w2", free=10)) == 2, "other workers go on"
    await finish(redis, taken.claims[0], 0)
    await enqueue(queue, 4)
    assert len(await claim(queue, free=10)) == 1, "it is free again"


async def test_a_busy_worker_is_asked_to_empty_itself_and_an_idle_one_takes_over_at_once(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue, 1)
    [own] = await claim(queue, "w1")
    await make_suspect(redis, 2)
    assert (await take(queue, "w1", free=5, running=1)).advice is Advice.EMPTY_FIRST
    [held] = await claim(queue, "w2", free=5)
    assert held.lane == "sus"
    assert (await take(queue, "w1", free=5, running=1)).advice is Advice.NONE
    await finish(redis, own, 0)


async def test_one_suspect_runs_at_a_time_and_the_next_may_go_to_any_worker(redis: "Redis") -> None:
    queue = Queue(redis)
    await make_suspect(redis, 1)
    [first] = await claim(queue, "w1", free=5)
    await enqueue(queue, 2)
    for _ in range(2):
        assert len(await claim(queue, "w2")) == 1
        await lose_worker(redis, 2)
    assert await claim(queue, "w2", free=5) == [], "the ward is at work"
    await finish(redis, first, 0)
    assert [held.lane for held in await claim(queue, "w2", free=5)] == ["sus"]


async def test_a_ward_that_dies_is_followed_by_another(redis: "Redis") -> None:
    queue = Queue(redis)
    await make_suspect(redis, 1)
    await claim(queue, "w1", free=5)
    assert await queue.disown(MODEL, "w1", "killed", crashed=True) == (1, 0)
    assert [held.lane for held in await claim(queue, "w2", free=5)] == ["sus"]


async def test_a_ward_whose_suspects_had_ended_serves_the_others(redis: "Redis") -> None:
    queue = Queue(redis)
    await make_suspect(redis, 1)
    await redis.delete(NAMES.job("JOB0001"))
    for number in (2, 3):
        await enqueue(queue, number)
    assert len(await claim(queue, "w1", free=1)) == 1
    assert len(await claim(queue, "w1", free=1, running=1) or (await claim(queue, "w1", running=1))) == 1


async def test_a_poison_job_dies_and_its_neighbours_do_not(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(1, 21):
        await enqueue(queue, number)
    deaths = 0
    while deaths < 100 and await field(redis, "state") != "dead":
        worker = f"w{deaths}"
        held = await claim(queue, worker, free=5)
        if any(h.job_id == "JOB0001" for h in held):
            await queue.disown(MODEL, worker, "exit code 139", crashed=True)
        else:
            for h in held:
                await finish(redis, h, 0)
        deaths += 1
    for h in await claim(queue, "last", free=64):
        await finish(redis, h, 0)
    states = [await field(redis, "state", number) for number in range(1, 21)]
    while "queued" in states:
        for h in await claim(queue, "last", free=64):
            await finish(redis, h, 0)
        states = [await field(redis, "state", number) for number in range(1, 21)]
    assert states == ["dead"] + ["succeeded"] * 19
    assert await field(redis, "reason") == "lost its worker 4 times (exit code 139)"
