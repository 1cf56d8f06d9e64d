"""A job that its client deletes: nothing of what was said is left, and the queue's accounts are as if it had ended."""

import pytest
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.queue import Attached, Queue, Terms
from fastchat_q.tokens import Status

from .protocol import MODEL, NAMES, claim, emit, enqueue, field, finish, job, lose_worker, revive

ID = "JOB0001"


async def emptied(redis: "Redis") -> bool:
    """Whether no line, account or index knows of a job."""
    sets = [NAMES.live, NAMES.lease, NAMES.delay, NAMES.parked("t"), *(NAMES.waiting(lane) for lane in keys.ALL_LANES)]
    hashes = [await redis.hlen(name) for name in (NAMES.queued, NAMES.running)]  # type: ignore[misc]
    return not any(hashes) and not any([await redis.zcard(name) for name in sets])


async def left(redis: "Redis") -> dict[bytes, bytes]:
    """What is left of the record."""
    found: dict[bytes, bytes] = await redis.hgetall(NAMES.job(ID))  # type: ignore[misc]
    return found


@pytest.mark.parametrize("state", ["queued", "running", "succeeded", "dead"])
async def test_whatever_its_state_nothing_is_left_but_that_it_has_ended(redis: "Redis", state: str) -> None:
    queue = Queue(redis)
    await queue.enqueue(job(), Terms(tenant="t", view='{"a": "secret"}', idempotency=("key", "body")))
    if state != "queued":
        [held] = await claim(queue)
    if state in ("running", "succeeded"):
        await emit(redis, held, 1, 7, text="secret")
    if state == "succeeded":
        await finish(redis, held, 1)
    while state == "dead" and await field(redis, "state") != "dead":
        await lose_worker(redis)
        await claim(queue)
    assert await queue.forget(MODEL, ID, tenant="t") == state
    record = await left(redis)
    assert not record.keys() & {b"view", b"spec", b"result"}
    assert record[b"reason"] == b"deleted"
    assert record[b"state"] == (b"succeeded" if state == "succeeded" else b"cancelled")
    assert 0 < await redis.pttl(NAMES.job(ID)) <= 120_000
    assert not await redis.exists(NAMES.log(ID), NAMES.idempotency("t:key"))
    assert await redis.xlen(NAMES.dead) == 0
    assert await emptied(redis)
    assert await queue.attach(MODEL, ID, "inbox", "t") is None
    assert await queue.forget(MODEL, ID, tenant="t") == "none", "once is enough"
    assert await revive(redis) == 0


async def test_its_worker_is_told_and_writes_nothing_any_more(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [held] = await claim(queue)
    async with redis.pubsub() as hints:
        await hints.subscribe(keys.worker_channel((await left(redis))[b"worker"].decode()))
        await hints.get_message(timeout=1)
        await queue.forget(MODEL, ID)
        hint = await hints.get_message(timeout=1)
    assert hint is not None
    assert hint["data"] == b"cancel JOB0001"
    assert await emit(redis, held, 1, 7) is Status.LOST
    assert await finish(redis, held, 0) is Status.LOST
    assert not await redis.exists(NAMES.log(ID))


async def test_it_is_not_accepted_once_more_by_a_server_that_takes_it_for_lost(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    await queue.forget(MODEL, ID)
    assert await enqueue(queue) == 0, "it is there already"
    assert await emptied(redis)


async def test_only_its_tenant_deletes_a_job(redis: "Redis") -> None:
    queue = Queue(redis)
    await queue.enqueue(job(), Terms(tenant="t", view="{}"))
    assert await queue.forget(MODEL, ID, tenant="other") == "none"
    assert await queue.attach(MODEL, ID, "inbox", "t") == Attached(b"{}", False)
    assert await queue.forget(MODEL, "JOB0002") == "none"
