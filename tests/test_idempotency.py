"""One request, sent often: one job."""

import asyncio

import pytest
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.errors import IdempotencyConflictError, QueueFullError
from fastchat_q.queue import Queue, Terms

from .protocol import MODEL, NAMES, claim, drop, enqueue, finish, job, lose_worker

KEY = NAMES.idempotency("default:key")


async def test_fifty_requests_at_once_with_one_key_are_one_job(redis: "Redis") -> None:
    queue = Queue(redis)
    terms = Terms(idempotency=("key", "body"))
    answers = await asyncio.gather(*(queue.enqueue(job(number), terms) for number in range(50)))
    assert len({answer.job_id for answer in answers}) == 1
    assert sorted(answer.place for answer in answers) == [0] * 49 + [1]
    assert len(await claim(queue, free=64)) == 1


async def test_another_request_with_the_key_is_refused_and_another_tenants_is_not(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue, 1, idempotency=("key", "body"))
    with pytest.raises(IdempotencyConflictError):
        await enqueue(queue, 2, idempotency=("key", "other"))
    assert await redis.exists(NAMES.job("JOB0002")) == 0
    assert await enqueue(queue, 3, tenant="b", idempotency=("key", "other")) > 0


async def test_the_key_finds_its_job_as_long_as_that_is_kept_and_no_longer(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue, 1, idempotency=("key", "body"), keep_s=7.0)
    [held] = await claim(queue)
    await finish(redis, held, 0)
    assert 0 < await redis.pttl(KEY) <= 7000
    assert await enqueue(queue, 2, idempotency=("key", "body")) == 0
    await redis.delete(NAMES.job("JOB0001"))
    assert await enqueue(queue, 3, idempotency=("key", "other")) == 1, "a key without its job binds nobody"


async def test_a_dead_job_lets_go_of_its_key_and_never_takes_it_back(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue, 1, idempotency=("key", "body"))
    for _ in range(4):
        await claim(queue)
        await lose_worker(redis)
    assert await redis.exists(KEY) == 0
    assert (await queue.enqueue(job(2), Terms(idempotency=("key", "other")))).job_id == "JOB0002"
    assert await drop(redis) == 1
    assert (await queue.enqueue(job(3), Terms(idempotency=("key", "other")))).job_id == "JOB0002"
    assert await queue.cancel(MODEL, "JOB0001", "test") == "none"


async def test_who_asks_again_for_a_job_that_was_given_up_gets_another_one(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue, 1, idempotency=("key", "body"))
    await queue.cancel(MODEL, "JOB0001", "client disconnected")
    again = await queue.enqueue(job(2), Terms(idempotency=("key", "body")))
    assert (again.job_id, again.place) == ("JOB0002", 1)


async def test_a_key_that_was_used_for_another_model_is_a_conflict(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue, 1, idempotency=("key", "body"))
    other = job(2).model_copy(update={"model": "other"})
    with pytest.raises(IdempotencyConflictError):
        await queue.enqueue(other, Terms(idempotency=("key", "other body")))
    assert await redis.exists(keys.model_keys("other").live) == 0
    await queue.enqueue(other, Terms(tenant="somebody else", idempotency=("key", "other body")))


async def test_a_refused_request_binds_its_key_to_nothing(redis: "Redis") -> None:
    queue = Queue(redis)
    with pytest.raises(QueueFullError):
        await enqueue(queue, 1, max_waiting=0, idempotency=("key", "body"))
    other = job(2).model_copy(update={"model": "other"})
    await queue.enqueue(other, Terms(idempotency=("key", "other body")))
