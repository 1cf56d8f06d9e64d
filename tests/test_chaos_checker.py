"""The chaos checker sees what it is there for: jobs are driven through the real scripts, then damaged by hand."""

from collections.abc import Callable

import pytest
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.events import Piece, Result, Usage
from fastchat_q.jobs import Job, Message, Sampling
from fastchat_q.queue import Claim, Finish, Queue, Terms
from fastchat_q.tokens import Chunk, append

from .chaos import MODEL, mutants
from .chaos.checker import Checker
from .chaos.observer import Observer
from .chaos.report import Report
from .chaos.transcript import BrokenStreamError, Transcript
from .chaos.wire import Event
from .servers import RedisServer

NAMES = keys.model_keys(MODEL)
JOB_ID = "01M7YSN24098N6EY5MJ6FR9HZN"
LENGTH = 4


def text(n: int, claim: Claim) -> str:
    return f"{n}/{LENGTH}:{claim.fence}:1 "


async def run_job(redis: "Redis", writer_of: Callable[[int, Claim], str] = text) -> Claim:
    """One job of four tokens, from the first to the last."""
    queue = Queue(redis)
    sampling = Sampling(max_tokens=LENGTH)
    job = Job(id=JOB_ID, model=MODEL, messages=(Message(role="user", content="{}"),), sampling=sampling)
    await queue.enqueue(job, Terms(inbox=keys.inbox("t")))
    [claim] = (await queue.claim(MODEL, "w-1", running=0, lanes=[("hi", 1)], nonce="aa")).claims
    for n in range(1, LENGTH + 1):
        await append(redis, MODEL, [Chunk(claim, n, (Piece((n,), writer_of(n, claim)),))])
    result = Result("length", Usage(claim.attempt, LENGTH))
    await append(redis, MODEL, [], [Finish(claim, LENGTH, "succeeded", "length", result)])
    return claim


async def verdict(redis: "Redis", server: RedisServer, *transcripts: Transcript) -> set[str]:
    """The kinds of violations that the checker finds."""
    report = Report(0, 0, None)
    observer = Observer(server.url, report)
    await observer.sweep(redis)
    observer.ends[JOB_ID][keys.inbox("t")] = 1
    checker = Checker(report, observer, transcripts)
    await checker.check_redis(redis)
    checker.check([], [])
    return {violation.what for violation in report.violations}


def transcript(said: str, end: str = "done") -> Transcript:
    seen = Transcript("test", "read", "sk", LENGTH, keys.public_job_id(MODEL, JOB_ID))
    seen.take_text(said)
    seen.end = end
    return seen


async def test_a_job_that_went_well_violates_nothing(redis: "Redis", redis_server: RedisServer) -> None:
    claim = await run_job(redis)
    whole = transcript("".join(text(n, claim) for n in range(1, LENGTH + 1)))
    assert await verdict(redis, redis_server, whole) == set()


async def test_two_writers_that_take_turns_are_seen(redis: "Redis", redis_server: RedisServer) -> None:
    await run_job(redis, lambda n, _: f"{n}/{LENGTH}:{'2-bb' if n == 2 else '1-aa'}:1 ")
    assert "writers interleave in a log" in await verdict(redis, redis_server)


async def test_a_wrong_token_is_seen(redis: "Redis", redis_server: RedisServer) -> None:
    await run_job(redis, lambda n, claim: text(2 if n == 3 else n, claim))
    assert "a log has a gap, or a wrong token" in await verdict(redis, redis_server)


async def test_a_lost_log_entry_is_seen(redis: "Redis", redis_server: RedisServer) -> None:
    await run_job(redis)
    await redis.xdel(NAMES.log(JOB_ID), "0-2")
    assert "a log has a gap, or a wrong token" in await verdict(redis, redis_server)


async def test_a_transcript_that_lacks_the_last_token_is_seen(redis: "Redis", redis_server: RedisServer) -> None:
    claim = await run_job(redis)
    short = transcript("".join(text(n, claim) for n in range(1, LENGTH)))
    assert "a transcript ended, and the log goes on" in await verdict(redis, redis_server, short)


async def test_a_terminal_state_that_changes_is_seen(redis: "Redis", redis_server: RedisServer) -> None:
    await run_job(redis)
    report = Report(0, 0, None)
    observer = Observer(redis_server.url, report)
    await observer.sweep(redis)
    await redis.hset(NAMES.job(JOB_ID), "state", "cancelled")  # type: ignore[misc]
    await observer.sweep(redis)
    assert [violation.what for violation in report.violations] == ["a terminal state changed"]


async def test_what_is_left_in_redis_is_seen(redis: "Redis", redis_server: RedisServer) -> None:
    await run_job(redis)
    await redis.persist(NAMES.log(JOB_ID))
    await redis.hset(NAMES.running, "default", 1)  # type: ignore[misc]
    await redis.zadd(NAMES.lease, {"GHOST": 1})
    assert await verdict(redis, redis_server) == {
        "a key has no TTL",
        "a log has no TTL",
        "the counter of running jobs is not back to 0",
        "a line is not empty",
    }


@pytest.mark.parametrize(
    "event",
    [
        Event(None, "[DONE]"),
        Event(3, '{"choices":[{"delta":{"content":"1/4:1-aa:1 "},"finish_reason":null}]}'),
        Event(2, '{"choices":[{"delta":{"content":"2/4:1-aa:1 "},"finish_reason":null}]}'),
        Event(4, "[DONE]"),
        Event(1, '{"error":{"code":"job_dead"}}'),
    ],
)
def test_a_client_sees_events_that_do_not_continue_what_it_has(event: Event) -> None:
    seen = Transcript("test", "read", "sk", LENGTH, "chaos.X")
    with pytest.raises(BrokenStreamError):
        seen.feed(event)


@pytest.mark.parametrize("name", sorted(mutants.MUTANTS))
def test_mutations_apply_to_the_scripts_as_they_are(name: str) -> None:
    for script, change in mutants.MUTANTS[name].items():
        assert mutants.mutated(script, *change).source.count(change[1]) >= 1
