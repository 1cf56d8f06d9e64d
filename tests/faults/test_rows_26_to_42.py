"""Bodies, records and streams that make no sense; no worker, rolling restarts, very many jobs."""

import asyncio
import json
import signal
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from fastchat_q import keys
from fastchat_q.connection import connect
from fastchat_q.jobs import Job
from fastchat_q.queue import REAP_LIMIT, Queue, Taken, Terms
from tests.http_client import get, post
from tests.stack import Stack, wait_until
from tests.streams import ENDLESS, LONG, WORDS, echo_worker

from .kit import Recorder, assert_log_is, assert_queue_is_clean, frozen

SLOW_US = 20_000
MANY = 20_000
CALLS = 100_000


def slow_calls(stack: Stack) -> dict[bytes, float]:
    """Commands and scripts that block Redis for longer than 20 ms as a rule: now and then the machine stops a process.

    What was called once or twice has no rule.
    """
    took: dict[bytes, list[int]] = {}
    for entry in stack.redis.slowlog_get(CALLS):
        took.setdefault(b" ".join(entry["command"].split()[:2]), []).append(entry["duration"])
    medians = {call: statistics.median(times) for call, times in took.items() if len(times) >= 3}
    assert any(call.startswith(b"EVALSHA") for call in medians), "something is measured"
    return {call: median for call, median in medians.items() if median > SLOW_US}


def watch_calls(stack: Stack) -> None:
    stack.redis.config_set("slowlog-max-len", CALLS)
    stack.redis.config_set("slowlog-log-slower-than", 0)
    stack.redis.slowlog_reset()


def question(text: str) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], "max_tokens": 1}


def test_row_26_a_body_of_8_mb_is_413_and_one_of_1_mb_does_not_hold_redis_up(stack: Stack) -> None:
    echo_worker(stack)
    watch_calls(stack)
    raw = json.dumps(question("x" * 8_000_000)).encode()
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(raw), raw)
    unsized = post(stack.port, chunks, headers={"content-length": None, "transfer-encoding": "chunked"})
    for reply in (post(stack.port, raw), unsized):
        assert (reply.status, reply.error()["code"]) == (413, "request_too_large")
        assert "1048576" in reply.error()["message"]
    assert stack.job_keys("echo") == [], "nothing came to Redis"
    body = question("x" * 1_048_000)
    assert 1024 * 1024 - 1000 < len(json.dumps(body)) <= 1024 * 1024
    for _ in range(10):
        assert post(stack.port, body).status == 200
    assert slow_calls(stack) == {}


def test_row_27_foreign_entries_and_broken_records_are_dropped_and_the_worker_lives(stack: Stack) -> None:
    worker = echo_worker(stack)
    names = keys.model_keys("echo")
    with frozen(worker.pid):
        for fields in ({"x": "y", "j": "nobody"}, {"j": ""}, {b"\xff": b"\x00\xff"}):
            stack.redis.xadd(names.stream("hi"), fields)
        broken = [Recorder(stack.port) for _ in range(3)]
        wait_until(lambda: stack.live("echo") == 3, "they are queued")
        records = stack.records("echo")
        for name, spec in zip(records, ("{not json", "[]", '{"id":"x","model":7}'), strict=True):
            stack.redis.hset(name, "spec", spec)
        stack.redis.publish(keys.inbox("nobody"), "what")
        for channel in stack.redis.pubsub_channels(keys.inbox("*")):
            stack.redis.publish(channel, b"no line\n\xff\n" + b"a b c d")
    for name in records:
        wait_until(lambda name=name: stack.redis.hget(name, "state") == "failed", "it fails alone")
    for stream in broken:
        stream.close()
    fine = Recorder(stack.port)
    assert fine.finish().split() == WORDS
    assert worker.alive
    assert_queue_is_clean(stack, "echo")


DAMAGED: list[tuple[str, Callable[[Any, str], object]]] = [
    ("a foreign entry", lambda redis, name: redis.xadd(name, {"x": "y"}, id="0-100000")),
    ("a foreign entry that was deleted again", lambda redis, name: redis.xdel(name, redis.xadd(name, {"x": "y"}))),
    ("an entry without tokens", lambda redis, name: redis.xadd(name, {"k": 0, "d": '{"t":[],"s":""}'}, id="0-100000")),
    ("another type", lambda redis, name: (redis.delete(name), redis.set(name, "what"))),
]


def test_row_27_a_damaged_log_of_a_running_job_ends_that_job_and_holds_no_neighbour_up(stack: Stack) -> None:
    worker = echo_worker(stack)
    names = keys.model_keys("echo")
    neighbours = [Recorder(stack.port) for _ in range(3)]
    victims = [Recorder(stack.port, ENDLESS) for _ in DAMAGED]
    for stream in (*neighbours, *victims):
        stream.wait_words(20)
    for stream, (_, damage) in zip(victims, DAMAGED, strict=True):
        damage(stack.redis, names.log(str(stream.job_id)))
    for stream, (what, _) in zip(victims, DAMAGED, strict=True):
        record = names.job(str(stream.job_id))
        wait_until(lambda record=record: stack.redis.hget(record, "state") == "failed", f"{what}: it fails", 3)
        with pytest.raises(AssertionError, match=r"log_incomplete|stream_diverged"):
            stream.finish()
        assert stack.redis.hmget(record, "reason", "deaths", "attempt") == ["log_incomplete", "0", "1"], what
    for stream in neighbours:
        assert stream.finish().split() == WORDS
        assert stream.longest_pause_s() < 3
        assert_log_is(stack, "echo", stream)
        assert stack.redis.hmget(names.job(str(stream.job_id)), "deaths", "attempt") == ["0", "1"]
    assert worker.alive
    assert_queue_is_clean(stack, "echo")


def test_row_27_a_log_that_is_damaged_before_its_first_token_ends_its_job_and_no_other(stack: Stack) -> None:
    """A claim of a job without tokens does not read its log."""
    worker = echo_worker(stack)
    names = keys.model_keys("echo")
    with frozen(worker.pid):
        victim = Recorder(stack.port)
        wait_until(lambda: stack.live("echo") == 1, "it is queued")
        [record] = [name for name in stack.job_keys("echo") if ":j:" in name]
        stack.redis.xadd(names.log(record.rpartition(":")[2]), {"x": "y"})
    wait_until(lambda: stack.redis.hget(record, "state") == "failed", "it fails")
    with pytest.raises(AssertionError, match=r"500|log_incomplete|stream_diverged"):
        victim.finish()
    assert stack.redis.hmget(record, "reason", "deaths", "attempt") == ["log_incomplete", "0", "1"]
    assert Recorder(stack.port).finish().split() == WORDS
    assert_queue_is_clean(stack, "echo")


def test_row_27_a_log_that_is_overwritten_between_two_attempts_ends_its_job(stack: Stack) -> None:
    first = echo_worker(stack, "--drain-s", "0.2")
    victim = Recorder(stack.port)
    victim.wait_words(20)
    assert first.stop() == 0
    names = keys.model_keys("echo")
    record, name = names.job(str(victim.job_id)), names.log(str(victim.job_id))
    stack.redis.delete(name)
    stack.redis.set(name, "what")
    echo_worker(stack)
    wait_until(lambda: stack.redis.hget(record, "state") == "failed", "it fails")
    with pytest.raises(AssertionError, match=r"log_incomplete|stream_diverged"):
        victim.finish()
    assert stack.redis.hmget(record, "reason", "deaths", "attempt") == ["log_incomplete", "0", "2"]
    assert_queue_is_clean(stack, "echo")


@pytest.mark.parametrize("ghost", [False, True], ids=["alone", "beside-a-record-that-is-none"])
def test_row_27_a_worker_whose_tokens_redis_refuses_hands_its_jobs_back_and_no_lease_runs_out(
    stack: Stack, ghost: bool
) -> None:
    names = keys.model_keys("echo")
    if ghost:
        stack.redis.set(names.job("GHOST"), "what")
        stack.redis.zadd(names.lease, {"GHOST": 2**50})
    echo_worker(stack)
    streams = [Recorder(stack.port) for _ in range(3)]
    for stream in streams:
        stream.wait_words(20)
    stack.redis.execute_command("ACL", "SETUSER", "default", "-publish")
    try:
        records = [names.job(str(stream.job_id)) for stream in streams]
        wait_until(lambda: all(stack.redis.hget(record, "e1") for record in records), "they are handed back", 5)
    finally:
        stack.redis.execute_command("ACL", "SETUSER", "default", "+publish")
    for stream, record in zip(streams, records, strict=True):
        assert stream.finish().split() == WORDS
        assert_log_is(stack, "echo", stream)
        assert stack.redis.hget(record, "deaths") == "0"
    stack.redis.delete(names.job("GHOST"))
    stack.redis.zrem(names.lease, "GHOST")
    assert_queue_is_clean(stack, "echo")


def test_row_33_without_a_worker_a_request_is_503_at_once_and_an_unknown_model_404(stack: Stack) -> None:
    worker = echo_worker(stack)
    assert worker.stop() == 0
    wait_until(lambda: get(stack.port, "/readyz").status == 503, "not ready")
    reply = post(stack.port, LONG)
    assert (reply.status, reply.error()["code"]) == (503, "no_worker")
    assert reply.headers["retry-after"]
    assert post(stack.port, {**LONG, "model": "other"}).status == 404
    assert stack.live("echo") == 0


def test_row_38_a_rolling_restart_of_two_workers_under_load_fails_no_stream(stack: Stack) -> None:
    old = [echo_worker(stack, "--drain-s", "0.2") for _ in range(2)]
    streams = [Recorder(stack.port) for _ in range(8)]
    for stream in streams:
        stream.wait_words(20)
    for worker in old:
        echo_worker(stack, "--drain-s", "0.2")
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert not stack.registered(worker.pid)
        streams.append(Recorder(stack.port))
    for stream in streams:
        assert stream.finish().split() == WORDS
        assert_log_is(stack, "echo", stream)
        record = keys.model_keys("echo").job(str(stream.job_id))
        assert stack.redis.hget(record, "deaths") == "0", "handed over, not lost"
    assert_queue_is_clean(stack, "echo")


async def test_row_42_with_very_many_live_jobs_no_script_holds_redis_up(stack: Stack) -> None:
    """20 000 live jobs, 2 000 of them running with a lease that is over."""
    redis = connect(stack.server.url)
    queue, names = Queue(redis), keys.model_keys("many")
    watch_calls(stack)

    async def submit(first: int) -> None:
        for number in range(first, first + MANY // 16):
            job = Job(id=f"J{number:025}", model="many", messages=LONG["messages"])
            await queue.enqueue(job, Terms(max_waiting=MANY))

    async def take(worker: str) -> Taken:
        return await queue.claim("many", worker, running=0, lanes=[("hi", 64)], nonce=worker)

    await asyncio.gather(*(submit(first) for first in range(0, MANY, MANY // 16)))
    assert stack.live("many") == MANY
    while await redis.zcard(names.lease) < 2000:
        assert (await take("w-1")).claims
    claimed = await redis.zrange(names.lease, 0, -1)
    await redis.zadd(names.lease, dict.fromkeys(claimed, 1))
    reaped = 0
    while (done := (await queue.reap("many")).handed_back) > 0:
        assert done <= REAP_LIMIT
        reaped += done
    assert reaped == len(claimed)
    for last in range(MANY - 5, MANY):
        assert len((await take(f"w-{last}")).claims) == 64
        await queue.cancel("many", f"J{last:025}", "test")
    assert slow_calls(stack) == {}
    await redis.aclose()
