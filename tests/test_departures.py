"""Clients that leave, come back or ask elsewhere: whose job is cancelled, and whose is not."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from fastchat_q.api.departures import Departures
from redis.asyncio import Redis

from fastchat_q.queue import Queue

from .http_client import Connection, get, post
from .protocol import MODEL, enqueue, field
from .servers import free_port, wait_until
from .stack import Stack

INBOX = "fq:inbox:t"
LONG = {"model": "echo", "messages": [{"role": "user", "content": "word " * 400}]}


@pytest.fixture
async def departures(redis: "Redis") -> AsyncIterator[Departures]:
    made = Departures(Queue(redis), INBOX, lambda job_id: False)
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_job_whose_acceptance_is_unknown_is_cancelled_though_it_was_to_continue(
    redis: "Redis", departures: Departures
) -> None:
    await enqueue(Queue(redis), detached=True)
    departures.at_once(MODEL, "JOB0001")
    await departures.settled(5)
    assert await field(redis, "state") == "queued", "its client left, and wants it done"
    departures.refused(MODEL, "JOB0001")
    await departures.settled(5)
    assert await field(redis, "state") == "cancelled", "its client was told that it was not accepted"


@pytest.mark.parametrize("detached", [False, True])
async def test_a_refused_job_that_its_client_asked_for_elsewhere_goes_on(
    redis: "Redis", departures: Departures, detached: bool
) -> None:
    await enqueue(Queue(redis), detached=detached, inbox=INBOX)
    await Queue(redis).attach(MODEL, "JOB0001", "fq:inbox:another")  # the retry with the same idempotency key
    departures.refused(MODEL, "JOB0001")
    await departures.settled(5)
    assert await field(redis, "state") == "queued"
    assert await field(redis, "inbox") == ("* " if detached else "") + "fq:inbox:another"


def test_who_may_not_read_a_job_does_not_keep_it_running(stack: Stack) -> None:
    port = free_port()
    stack.start_api(port, FASTCHAT_Q_DISCONNECT_GRACE_S="2")
    stack.start_worker("--model", "echo", "--engine", "echo", "--token-delay-ms", "10")
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    connection = Connection(port)
    connection.send({**LONG, "stream": True, "ignore_eos": True, "max_tokens": 1_000_000})
    _, head = connection.head()
    connection.close()
    public_id = head["x-job-id"]
    foreign = f"another.{public_id.rpartition('.')[2]}"
    assert get(port, f"/v1/jobs/{foreign}/events").status == 404
    wait_until(lambda: get(port, f"/v1/jobs/{public_id}").json()["state"] == "cancelled", "its grace is over")


def test_an_answer_that_is_kept_under_an_idempotency_key_needs_no_worker(stack: Stack) -> None:
    worker = stack.start_worker("--model", "echo", "--engine", "echo", "--token-delay-ms", "1")
    first = post(stack.port, LONG, headers={"idempotency-key": "k"})
    assert first.status == 200
    assert worker.stop() == 0
    wait_until(lambda: get(stack.port, "/v1/models").json()["data"] == [], "the API knows that nobody serves it")
    assert post(stack.port, LONG, headers={"idempotency-key": "k"}).json() == first.json()
    assert post(stack.port, LONG, headers={"idempotency-key": "another"}).status == 503
