"""Ids of events: with one that an event has had a reader goes on exactly there, with any other it is told so."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from fastchat_q.api.render import View
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.connection import connect
from fastchat_q.events import Piece, Result, Usage
from fastchat_q.jobs import Job, Message
from fastchat_q.queue import MAX_DEATHS, Claim, Finish, Queue, Terms
from fastchat_q.tokens import Chunk, append

from .http_client import Connection, Reply, get
from .stack import Stack, wait_until
from .streams import echo_worker, events_until, open_stream, resume, text_of

MODEL = "solo"
NAMES = keys.model_keys(MODEL)
JOB_ID = "01M7YSN24098N6EY5MJ6FR9HZN"
PUBLIC_ID = keys.public_job_id(MODEL, JOB_ID)


class ByHand:
    """A job that nobody needs to listen to, and whose worker is the test: token n says « tn»."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._claim: Claim | None = None
        job = Job(id=JOB_ID, model=MODEL, messages=(Message(role="user", content="one two three"),))
        terms = Terms(inbox="fq:inbox:nobody", detached=True, view=View(JOB_ID, MODEL, 1, "hi").to_json())
        self._do(lambda redis: Queue(redis).enqueue(job, terms))

    def claim(self) -> None:
        async def claim(redis: "Redis") -> None:
            taken = await Queue(redis).claim(MODEL, "w", running=0, lanes=[("hi", 4), ("lo", 4)], nonce="n")
            [self._claim] = taken.claims

        self._do(claim)

    def say(self, first: int, last: int) -> None:
        """The tokens from ``first`` to ``last``, in one entry of the log."""
        assert self._claim is not None
        numbers = tuple(range(first, last + 1))
        chunk = Chunk(self._claim, last, (Piece(numbers, "".join(f" t{number}" for number in numbers)),))
        self._do(lambda redis: append(redis, MODEL, [chunk]))

    def finish(self, n: int) -> None:
        assert self._claim is not None
        end = Finish(self._claim, n, "succeeded", "stop", Result("stop", Usage(3, n)))
        self._do(lambda redis: append(redis, MODEL, [], [end]))

    def lose_worker(self) -> None:
        self._do(lambda redis: Queue(redis).disown(MODEL, "w", "crash", crashed=True))

    def roll_back(self, n: int) -> None:
        """What a failover does to the log that has not reached the replica."""
        log = NAMES.log(JOB_ID)
        kept = self._stack.redis.xrange(log, max=f"0-{n}")
        self._stack.redis.delete(log)
        for entry_id, fields in kept:
            self._stack.redis.xadd(log, fields, id=entry_id)
        self._stack.redis.hset(NAMES.job(JOB_ID), "n", n)

    def _do(self, action: Callable[["Redis"], Awaitable[object]]) -> None:
        async def run() -> None:
            redis = connect(self._stack.server.url)
            try:
                await action(redis)
            finally:
                await redis.aclose()

        asyncio.run(run())


def follow(stack: Stack, after: int | None) -> tuple[Connection, int]:
    connection = resume(stack.port, PUBLIC_ID, after)
    return connection, connection.head()[0]


def events_behind(stack: Stack, after: int) -> Reply:
    return get(stack.port, f"/v1/jobs/{PUBLIC_ID}/events", last_event_id=str(after))


def assert_refused(reply: Reply) -> None:
    assert (reply.status, reply.error()["code"]) == (400, "invalid_event_id")
    assert "beginning" in reply.error()["message"], "it says what to do"


def error_of(blocks: list[str]) -> str:
    return str(json.loads(blocks[-1].removeprefix("data: "))["error"]["code"])


def test_who_comes_back_after_the_error_of_a_dead_job_that_lives_again_misses_no_token(stack: Stack) -> None:
    job = ByHand(stack)
    for _ in range(MAX_DEATHS):
        job.claim()
        job.lose_worker()
    reader, _ = follow(stack, None)
    assert error_of(list(reader.events())) == "job_dead"
    assert reader.ids == [], "there is no token that it could go on behind"
    assert stack.start("retry", "dead", "retry", PUBLIC_ID).wait() == 0
    stack.start_worker("--model", MODEL, "--engine", "echo", "--token-delay-ms", "1")
    again, _ = follow(stack, None)
    assert text_of(list(again.events())) == "one two three"


def test_an_error_leaves_a_reader_with_the_id_of_its_last_token(stack: Stack) -> None:
    job = ByHand(stack)
    job.claim()
    job.say(1, 1)
    job.say(2, 4)
    reader, _ = follow(stack, 1)
    blocks = events_until(reader, 4)
    stack.redis.delete(NAMES.job(JOB_ID))
    blocks += reader.events()
    assert error_of(blocks) == "queue_unavailable"
    assert reader.ids == [4]


def test_an_id_inside_of_an_entry_is_refused_and_one_at_its_end_is_exact(stack: Stack) -> None:
    job = ByHand(stack)
    job.claim()
    for first, last in ((1, 1), (2, 5), (6, 9)):
        job.say(first, last)
    assert_refused(events_behind(stack, 3))
    job.finish(9)
    for after in (2, 3, 4, 6, 8):
        assert_refused(events_behind(stack, after))
    assert_refused(get(stack.port, f"/v1/jobs/{PUBLIC_ID}/events?starting_after=3"))
    for after, rest in ((0, range(1, 10)), (1, range(2, 10)), (5, range(6, 10)), (9, range(0))):
        reader, status = follow(stack, after)
        assert (status, text_of(list(reader.events())).split()) == (200, [f"t{number}" for number in rest])


def test_an_id_that_turns_out_to_be_inside_of_an_entry_ends_the_stream_with_an_error(stack: Stack) -> None:
    job = ByHand(stack)
    job.claim()
    job.say(1, 1)
    reader, status = follow(stack, 3)
    assert status == 200, "the job may yet come to an event with this id"
    job.say(2, 5)
    blocks = list(reader.events())
    assert (error_of(blocks), reader.ids) == ("invalid_event_id", [])
    assert stack.redis.hget(NAMES.job(JOB_ID), "void") is None, "it may be the reader's own mistake"


def test_an_id_beyond_the_last_of_a_finished_job_is_refused(stack: Stack) -> None:
    job = ByHand(stack)
    job.claim()
    job.say(1, 12)
    early, status = follow(stack, 500)
    assert status == 200
    job.finish(12)
    blocks = list(early.events())
    assert (error_of(blocks), early.ids) == ("invalid_event_id", [])
    for after in (16, 500):
        assert_refused(events_behind(stack, after))
    for after, rest in ((12, [13, 15]), (13, [15]), (14, [15]), (15, [])):
        reader, status = follow(stack, after)
        list(reader.events())
        assert (status, reader.ids) == (200, rest)


def test_a_reader_waits_while_tokens_that_it_has_are_generated_again(stack: Stack) -> None:
    job = ByHand(stack)
    job.claim()
    job.say(1, 2)
    reader, status = follow(stack, 5)
    for first, last in ((3, 4), (5, 5), (6, 8)):
        job.say(first, last)
    job.finish(8)
    blocks = list(reader.events())
    assert (status, text_of(blocks).split(), reader.ids) == (200, ["t6", "t7", "t8"], [8, 9, 11])


def test_a_job_that_succeeds_with_fewer_tokens_than_its_reader_has_took_another_course(stack: Stack) -> None:
    job = ByHand(stack)
    job.claim()
    for number in range(1, 7):
        job.say(number, number)
    reader, _ = follow(stack, 0)
    blocks = events_until(reader, 6)
    job.roll_back(4)
    job.say(5, 5)
    job.finish(5)
    blocks += reader.events()
    assert error_of(blocks) == "stream_diverged"
    assert reader.ids == sorted(set(reader.ids))
    assert reader.ids[-1] == 6, "none of the other course"
    assert_refused(events_behind(stack, 2))
    whole, status = follow(stack, None)
    assert (status, text_of(list(whole.events())).split()) == (200, [f"t{number}" for number in range(1, 6)])


def test_ids_of_a_job_that_was_started_over_are_refused_and_its_beginning_can_be_read(stack: Stack) -> None:
    job = ByHand(stack)
    job.claim()
    job.say(1, 1)
    job.say(2, 2)
    assert follow(stack, 1)[1] == 200
    stack.redis.hset(NAMES.job(JOB_ID), "void", "1")  # as REVIVE does with another prompt
    assert_refused(events_behind(stack, 1))
    job.finish(2)
    assert_refused(events_behind(stack, 1))
    for beginning in (None, 0):
        reader, status = follow(stack, beginning)
        assert (status, text_of(list(reader.events()))) == (200, " t1 t2")


@pytest.mark.parametrize("why", ["void", "inside of an entry"])
def test_a_client_whose_id_is_refused_and_who_stays_away_is_gone(stack: Stack, why: str) -> None:
    """Coming back called its departure off; being refused must not keep the job for nobody."""
    worker = echo_worker(stack)
    body = {"model": "echo", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "max_tokens": 100_000}
    client, job_id = open_stream(stack.port, {**body, "stream": True})
    events_until(client, 5)
    names, name = keys.model_keys("echo"), job_id.rpartition(".")[2]
    if why == "void":
        stack.redis.hset(names.job(name), "void", "1")
    else:
        stack.redis.xtrim(names.log(name), maxlen=0, approximate=False)
        last = int(stack.redis.hget(names.job(name), "n"))
        worker.kill()
        stack.redis.xadd(names.log(name), {"k": str(last + 10_000), "d": '{"t":[],"s":""}'}, id=f"0-{last + 10_000}")
    client.close()
    reply = get(stack.port, f"/v1/jobs/{job_id}/events", last_event_id="3")
    assert_refused(reply)
    wait_until(lambda: get(stack.port, f"/v1/jobs/{job_id}").json()["state"] == "cancelled", "it is cancelled")
