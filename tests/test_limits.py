"""Requests and tokens a minute: the buckets against a real server, and what a client of a limited key sees."""

import asyncio
import itertools
import time
from typing import Any

import openai
import pytest
from fastchat_q.api.auth import KNOWN_S
from fastchat_q.api.limits import MAX_UNSETTLED, Limits, Reservation
from fastchat_q.api.media import Images
from fastchat_q.api.schemas import ChatRequest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from fastchat_q import keys, scripts
from fastchat_q.errors import QuotaError, RateLimitError
from fastchat_q.events import Usage
from fastchat_q.jobs import Job
from fastchat_q.tenants import Caller

from .http_client import Connection, post
from .stack import RedisServer, Stack, wait_until
from .test_keys import key_command, listed

MINUTE_US = 60_000_000
RECEIPT = -2
"""Where it is in a reply of LIMIT."""
numbers = itertools.count()


def caller(**limits: int) -> Caller:
    return Caller(key_id=f"key_{next(numbers)}", tenant="t", scopes=frozenset({"inference"}), **limits)


def request(characters: int = 4, **fields: Any) -> Job:
    return ChatRequest(model="m", messages=[{"role": "user", "content": "x" * characters}], **fields).to_job(Images())


async def test_a_minutes_worth_of_requests_passes_at_once_and_the_next_is_told_when(redis: "Redis") -> None:
    limits, who = Limits(redis), caller(rpm=3)
    left = [(await limits.reserve(who, request())).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    with pytest.raises(RateLimitError) as refused:
        await limits.reserve(who, request())
    error = refused.value
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.retry_after_s == 20
    assert error.headers["x-ratelimit-limit-requests"] == "3"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"][:2] in ("1m", "59", "58")
    assert not [name for name in error.headers if "tokens" in name]


async def test_tokens_are_reserved_by_estimate_and_a_refusal_takes_nothing(redis: "Redis") -> None:
    limits, who = Limits(redis), caller(rpm=10, tpm=1000)
    first = await limits.reserve(who, request(400, max_tokens=500))
    assert first.tokens == 600
    assert first.headers["x-ratelimit-remaining-tokens"] == "400"
    with pytest.raises(RateLimitError, match="1000 tokens per minute, the request needs about 600") as refused:
        await limits.reserve(who, request(400, max_tokens=500))
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "9"
    assert 11 <= (refused.value.retry_after_s or 0) <= 12


async def test_settling_gives_back_what_was_not_used_and_charges_what_was_used_beyond(redis: "Redis") -> None:
    who = caller(tpm=1000)
    receipt = (await reserve(redis, who, 600))[RECEIPT]
    assert await settle(redis, who, 600, 100, receipt) in range(900, 902)
    receipt = (await reserve(redis, who, 200))[RECEIPT]
    assert await settle(redis, who, 200, 500, receipt) in range(400, 403)


async def test_more_than_a_minutes_worth_needs_a_full_bucket_and_is_paid_off_later(redis: "Redis") -> None:
    who = caller(tpm=100)
    verdict, *_, receipt, _ = await reserve(redis, who, 5000)
    assert verdict == 0
    assert await settle(redis, who, 5000, 300, receipt) == 0
    verdict, wait_us, *_ = await reserve(redis, who, 1)
    assert verdict == 2
    assert wait_us == pytest.approx(2 * MINUTE_US + MINUTE_US / 100, rel=0.01)


async def test_a_bucket_vanishes_when_it_is_full_again(redis: "Redis") -> None:
    who = caller(rpm=1)
    await reserve(redis, who, 0)
    assert 59_000 < await redis.pttl(keys.rate_limit(who.key_id)) <= 60_000
    who = caller(tpm=100)
    receipt = (await reserve(redis, who, 50))[RECEIPT]
    await settle(redis, who, 50, 0, receipt)
    assert not await redis.exists(keys.rate_limit(who.key_id))


async def test_a_caller_without_limits_costs_no_round_trip() -> None:
    limits = Limits(None)  # type: ignore[arg-type]
    reservation = await limits.reserve(caller(), request())
    limits.settle(reservation, Usage(1, 1))
    assert reservation.headers == {}
    assert limits._unsettled.empty()


def test_settlements_beyond_the_bound_are_dropped_without_an_error() -> None:
    limits, reservation = Limits(None), Reservation(caller(tpm=1))  # type: ignore[arg-type]
    for _ in range(2 * MAX_UNSETTLED):
        limits.settle(reservation, Usage(0, 0))
    assert limits._unsettled.qsize() == MAX_UNSETTLED


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tpm=st.integers(1, 10**6),
    calls=st.lists(st.tuples(st.integers(0, 2 * 10**6), st.integers(0, 2 * 10**6)), min_size=1, max_size=12),
    settle_at_once=st.booleans(),
)
def test_whatever_is_asked_the_bucket_never_lets_more_through_than_a_minutes_worth(
    redis_server: RedisServer, tpm: int, calls: list[tuple[int, int]], settle_at_once: bool
) -> None:
    key_id, source = f"key_{next(numbers)}", scripts.script("limit").source
    names = (keys.rate_limit(key_id), keys.token_use(key_id))
    taken, unsettled = 0, []
    with redis_server.client() as client:
        began = client.time()
        for asked, used in calls:
            verdict, wait, _, _, left, until_full, receipt, _ = client.eval(
                source, 2, *names, "reserve", 0, tpm, asked, 0
            )
            reserved = min(asked, tpm)
            seconds = client.time()[0] - began[0] + 1
            assert 0 <= left <= tpm
            assert until_full >= 0
            if verdict:
                assert verdict == 2
                assert wait > 0
                continue
            taken += reserved
            assert taken <= tpm + tpm * seconds / 60 + 1
            if settle_at_once:
                used = min(used, reserved)
                left = client.eval(source, 2, *names, "settle", 0, tpm, asked, 0, used, receipt, 0)[4]
                taken -= reserved - used
                assert left >= tpm - taken - 1
            else:
                unsettled.append((asked, used, receipt))
        for asked, used, receipt in unsettled:
            left = client.eval(source, 2, *names, "settle", 0, tpm, asked, 0, used, receipt, 0)[4]
            assert 0 <= left <= tpm


async def test_what_has_run_off_is_not_given_back_a_second_time(redis: "Redis") -> None:
    who = caller(tpm=60_000)
    receipt = (await reserve(redis, who, 60_000))[RECEIPT]
    later = receipt - 59_000_000  # as if 59 s had passed since: one second's worth is left to give back
    assert await settle(redis, who, 60_000, 0, later) in range(950, 1300)


@pytest.mark.parametrize(
    "content", ["x" * 40, [{"type": "text", "text": "x" * 30}, {"type": "text", "text": "x" * 10}]]
)
def test_an_estimate_is_a_quarter_of_the_characters_and_the_completion(content: Any) -> None:
    message = {"role": "user", "content": content}
    assert ChatRequest(model="m", messages=[message, message]).to_job(Images()).cost == 20 + 256
    assert ChatRequest(model="m", messages=[message], max_tokens=5).to_job(Images()).cost == 10 + 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_sees_its_limits_and_gets_back_what_it_did_not_use(echo_stack: Stack, stream: bool) -> None:
    headers = {"authorization": f"Bearer {echo_stack.make_key('--rpm', '2', '--tpm', '1000')}"}
    body = {"model": "echo", "max_tokens": 500, "stream": stream, "messages": [{"role": "user", "content": "a b c"}]}
    reply = post(echo_stack.port, body, headers=headers)
    assert reply.status == 200
    assert reply.headers["x-ratelimit-limit-requests"] == "2"
    assert reply.headers["x-ratelimit-remaining-requests"] == "1"
    assert reply.headers["x-ratelimit-limit-tokens"] == "1000"
    assert reply.headers["x-ratelimit-remaining-tokens"] == "498"
    [bucket] = echo_stack.redis.keys(keys.rate_limit("*"))
    wait_until(lambda: float(echo_stack.redis.hget(bucket, "t") or 0) - now_us(echo_stack) < 2_000_000, "it is settled")
    assert int(post(echo_stack.port, body, headers=headers).headers["x-ratelimit-remaining-tokens"]) >= 480
    reply = post(echo_stack.port, body, headers=headers)
    assert reply.status == 429
    assert reply.error()["code"] == "rate_limit_exceeded"
    assert 1 <= int(reply.headers["retry-after"]) <= 30
    assert reply.headers["x-ratelimit-reset-requests"]
    echo_stack.redis.delete(bucket)


def test_a_request_that_never_became_a_job_gives_its_tokens_back(echo_stack: Stack) -> None:
    headers = {"authorization": f"Bearer {echo_stack.make_key('--tpm', '1000')}"}
    body = {"model": "nonsense", "max_tokens": 1000, "messages": [{"role": "user", "content": "hi"}]}
    assert post(echo_stack.port, body, headers=headers).status == 404
    assert not echo_stack.redis.keys(keys.rate_limit("*"))


def test_a_client_that_leaves_keeps_its_reservation_for_a_minute(echo_stack: Stack) -> None:
    connection = Connection(echo_stack.port)
    headers = {"authorization": f"Bearer {echo_stack.make_key('--tpm', '100000')}"}
    body = {"model": "echo", "max_tokens": 50_000, "ignore_eos": True, "messages": [{"role": "user", "content": "hi"}]}
    connection.send(body, headers=headers)
    wait_until(lambda: echo_stack.running("echo") == 1, "the job runs")
    connection.close()
    wait_until(lambda: echo_stack.live("echo") == 0, "it is cancelled")
    [bucket] = echo_stack.redis.keys(keys.rate_limit("*"))
    assert float(echo_stack.redis.hget(bucket, "t") or 0) - now_us(echo_stack) > 20_000_000
    echo_stack.redis.delete(bucket)


async def test_a_quota_is_taken_down_by_what_was_used_and_has_no_end_of_its_own(redis: "Redis") -> None:
    limits, who = Limits(redis), caller(token_quota=1000)
    first = await limits.reserve(who, request(400, max_tokens=500))
    assert (first.of_quota, first.headers) == (600, {})
    second = await limits.reserve(who, request(400, max_tokens=5000))
    assert second.of_quota == 400, "no more than was left"
    with pytest.raises(QuotaError) as refused:
        await limits.reserve(who, request())
    error = refused.value
    assert (error.status, error.type, error.code) == (429, "insufficient_quota", "insufficient_quota")
    assert error.retry_after_s is None
    assert error.headers["x-should-retry"] == "false"
    for reservation, used in ((first, 100), (second, 0)):
        limits.settle(reservation, Usage(used, 0))
    settling = asyncio.create_task(limits.run())
    await limits.settled(10)
    settling.cancel()
    assert await redis.get(keys.token_use(who.key_id)) == b"100"
    assert await redis.ttl(keys.token_use(who.key_id)) == -1
    assert (await limits.reserve(who, request(400, max_tokens=5000))).of_quota == 900


async def test_a_quota_that_is_used_up_is_said_before_a_rate_and_nothing_is_taken(redis: "Redis") -> None:
    limits, who = Limits(redis), caller(rpm=1, token_quota=10)
    await limits.reserve(who, request(max_tokens=10))
    with pytest.raises(QuotaError) as refused:
        await limits.reserve(who, request(max_tokens=10))
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
    other = caller(rpm=1, token_quota=1000)
    await limits.reserve(other, request(max_tokens=10))
    with pytest.raises(RateLimitError):
        await limits.reserve(other, request(max_tokens=10))
    assert await redis.get(keys.token_use(other.key_id)) == b"11"


async def test_requests_at_once_share_one_quota(redis: "Redis") -> None:
    limits, who = Limits(redis), caller(token_quota=100)
    tries = await asyncio.gather(
        *[limits.reserve(who, request(max_tokens=9)) for _ in range(50)], return_exceptions=True
    )
    taken = [one.of_quota for one in tries if isinstance(one, Reservation)]
    assert sum(taken) == 100
    assert sum(isinstance(one, QuotaError) for one in tries) == 50 - len(taken) == 40


def test_a_key_whose_quota_is_used_up_is_refused_until_it_is_raised(echo_stack: Stack) -> None:
    key = echo_stack.make_key("--token-quota", "0.02k")
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "echo", "messages": [{"role": "user", "content": "one two three four five"}]}
    used = 0
    for stream in (False, True, False, False):
        reply = post(echo_stack.port, {**body, "stream": stream}, headers=headers)
        if reply.status == 429:
            break
        used += 10 if stream else reply.json()["usage"]["total_tokens"]
        wait_until(lambda: quota_of(echo_stack, key)["tokens_used"] == used, "it is settled")  # noqa: B023
    error = reply.error()
    assert (reply.status, error["type"], error["code"]) == (429, "insufficient_quota", "insufficient_quota")
    assert "retry-after" not in reply.headers
    shown = quota_of(echo_stack, key)
    assert (shown["limits"]["tokens"], shown["tokens_left"]) == (20, 0)
    with openai.OpenAI(base_url=f"{echo_stack.base}/v1", api_key=key, max_retries=5) as client:
        began = time.monotonic()
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**body)
        assert refused.value.code == "insufficient_quota"
        assert time.monotonic() - began < 3, "it did not try again"
    raised = key_command(echo_stack, "quota", shown["id"], "+1k")
    assert raised.stdout == f"{shown['id']} (test) has a quota of 1020 tokens, {used} used\n"
    wait_until(lambda: post(echo_stack.port, body, headers=headers).status == 200, "it is let in again", KNOWN_S + 10)
    assert key_command(echo_stack, "quota", shown["id"], "none", "--json").returncode == 0
    assert quota_of(echo_stack, key)["tokens_left"] is None
    assert key_command(echo_stack, "revoke", shown["id"]).returncode == 0
    assert not echo_stack.redis.exists(keys.token_use(shown["id"]))


@pytest.mark.parametrize("wrong", ["0", "many", "-5", "1x", "9" * 17])
def test_what_is_no_quota_is_refused(echo_stack: Stack, wrong: str) -> None:
    refused = key_command(echo_stack, "create", "--name", "x", f"--token-quota={wrong}")
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)


def quota_of(stack: Stack, key: str) -> dict[str, Any]:
    """The key as ``key ls`` shows it."""
    return next(row for row in listed(stack) if row["key_hint"][-4:] == key[-4:])


def now_us(stack: Stack) -> int:
    seconds, microseconds = stack.redis.time()
    return int(seconds) * 1_000_000 + int(microseconds)


async def reserve(redis: "Redis", who: Caller, tokens: int) -> list[int]:
    args = ("reserve", who.rpm or 0, who.tpm or 0, tokens, who.token_quota or 0)
    reply: list[int] = await scripts.call(redis, "limit", names_of(who), args)
    return reply


async def settle(redis: "Redis", who: Caller, reserved: int, used: int, receipt: int) -> int:
    """Tokens left after it."""
    args = ("settle", who.rpm or 0, who.tpm or 0, reserved, 0, used, receipt, 0)
    return int((await scripts.call(redis, "limit", names_of(who), args))[4])


def names_of(who: Caller) -> tuple[str, str]:
    return keys.rate_limit(who.key_id), keys.token_use(who.key_id)
