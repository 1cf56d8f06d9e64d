"""How often a job's tokens go out."""

import asyncio
import time
from collections import Counter

from fastchat_q.workers.publisher import MAX_WINDOW_S, WINDOW_S, Publisher
from redis.asyncio import Redis

from fastchat_q.events import Piece
from fastchat_q.queue import Claim, Queue

from .protocol import MODEL, claim, enqueue

FOR_S = 0.4


async def events(redis: "Redis", jobs: int, urgent: int) -> tuple[Counter[str], float]:
    """Each job gets a token every millisecond or two, of which ``urgent`` jobs' are urgent -> events, and seconds."""
    queue = Queue(redis)
    for number in range(1, jobs + 1):
        await enqueue(queue, number)
    claims = await claim(queue, free=jobs)
    sent: Counter[str] = Counter()

    def on_sent(one: Claim, at: float, heard: bool) -> None:
        sent[one.job_id] += 1

    publisher = Publisher(redis, MODEL, on_lost=lambda one: None, on_sent=on_sent, on_refused=lambda why: None)
    running = asyncio.create_task(publisher.run())
    began, n = time.monotonic(), 0
    while time.monotonic() - began < FOR_S:
        n += 1
        for one in claims:
            publisher.add(one, n, (Piece((n,), "x"),), None, urgent=one.job_id <= f"JOB{urgent:04}")
        await asyncio.sleep(0.001)
    await publisher.flushed()
    took_s = time.monotonic() - began
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(sent) == jobs
    return sent, took_s


async def test_what_is_urgent_of_one_job_takes_no_tokens_of_others_along(redis: "Redis") -> None:
    sent, took_s = await events(redis, jobs=2, urgent=1)
    assert sent["JOB0002"] <= took_s / WINDOW_S + 2
    assert sent["JOB0001"] > sent["JOB0002"]


async def test_with_many_jobs_events_are_fewer_and_larger(redis: "Redis") -> None:
    sent, took_s = await events(redis, jobs=80, urgent=0)
    assert max(sent.values()) <= took_s / MAX_WINDOW_S + 3  # the first ones come at once
