"""Requests and tokens a minute, and tokens ever: an estimate is reserved before a job exists, and settled later.

A reservation that is never settled (the process died, the client left) runs off within a minute; of a quota it is used.
"""

import asyncio
import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import structlog
from redis.asyncio import Redis

from fastchat_q import keys, scripts
from fastchat_q.errors import QuotaError, RateLimitError
from fastchat_q.events import Usage
from fastchat_q.jobs import Job
from fastchat_q.loops import AWAY, check_cancelled
from fastchat_q.tenants import Caller

log = structlog.get_logger()

MAX_UNSETTLED = 10_000
"""Settlements that may wait while Redis is away; more are dropped, and those reservations run off."""
NO_QUOTA = 3
"""A verdict of limit.lua."""
NOTHING = Usage(0, 0)
"""The usage of a request that never became a job."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a request has taken from its key's buckets."""

    caller: Caller
    tokens: int = 0
    receipt: int = 0
    of_quota: int = 0
    """Tokens that were taken of the key's quota: at the most what was left."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """``x-ratelimit-*`` for the response; empty for a key without limits."""


class Limits:
    """The buckets of all keys. `run` must be running for settlements to be sent."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        self._unsettled: asyncio.Queue[tuple[Reservation, int]] = asyncio.Queue(MAX_UNSETTLED)

    async def reserve(self, caller: Caller, job: Job) -> Reservation:
        """Takes one request and what the job may cost. No round trip for a caller without limits.

        Raises:
            RateLimitError: a bucket has too little; nothing was taken.
            QuotaError: the key's quota is used up; nothing was taken.
            redis.RedisError: the server is away.
        """
        return await self._reserve(caller, 0 if caller.tpm is None and caller.token_quota is None else job.cost)

    async def admit_batch(self, caller: Caller) -> Reservation:
        """Takes one request for a batch: its lines are no requests, and their tokens are those of a quota alone.

        Raises:
            RateLimitError, QuotaError, redis.RedisError: as `reserve`.
        """
        return await self._reserve(caller, 0)

    async def charge(self, caller: Caller, used: int) -> None:
        """Tokens of a quota that were used without a reservation: the batch that crosses the line is finished."""
        if caller.token_quota is not None and used:
            args = ("settle", 0, 0, 0, caller.token_quota, used, 0, 0)
            await scripts.call(self._redis, "limit", _keys(caller), args)

    async def _reserve(self, caller: Caller, tokens: int) -> Reservation:
        if caller.rpm is None and caller.tpm is None and caller.token_quota is None:
            return Reservation(caller)
        args = ("reserve", caller.rpm or 0, caller.tpm or 0, tokens, caller.token_quota or 0)
        verdict, wait, *state, receipt, of_quota = await scripts.call(self._redis, "limit", _keys(caller), args)
        headers = _headers(caller, *state)
        if verdict == NO_QUOTA:
            raise QuotaError(
                f"You exceeded your current quota: this API key ({caller.key_id}) has used up its "
                f"{caller.token_quota} tokens. Ask the operator to raise it, with: fastchat-q key quota",
                headers=headers,
            )
        if verdict:
            limit, unit = (caller.rpm, "requests") if verdict == 1 else (caller.tpm, "tokens")
            asked = f", the request needs about {tokens}" if verdict == 2 else ""
            raise RateLimitError(
                f"Rate limit reached for this API key ({caller.key_id}): {limit} {unit} per minute{asked}. "
                f"Please try again in {_duration(wait)}.",
                retry_after_s=math.ceil(wait / 1e6),
                headers=headers,
            )
        return Reservation(caller, tokens, receipt, of_quota, headers)

    def settle(self, reservation: Reservation, usage: Usage | None) -> None:
        """Replaces the estimate by what was really used; None: not known, so the estimate stays. Never blocks."""
        caller = reservation.caller
        if usage is None or (caller.tpm is None and caller.token_quota is None):
            return
        with contextlib.suppress(asyncio.QueueFull):
            self._unsettled.put_nowait((reservation, usage.total_tokens))

    async def settled(self, limit_s: float) -> None:
        """Waits until all settlements are sent, so long at the most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._unsettled.join()

    async def run(self) -> None:
        """Sends settlements, for ever."""
        while True:
            reservation, used = await self._unsettled.get()
            caller = reservation.caller
            asked = ("settle", caller.rpm or 0, caller.tpm or 0, reservation.tokens, caller.token_quota or 0)
            args = (*asked, used, reservation.receipt, reservation.of_quota)
            try:
                await scripts.call(self._redis, "limit", _keys(caller), args)
            except AWAY as error:
                log.warning("cannot settle tokens: the estimate stays", key=caller.key_id, error=str(error))
            self._unsettled.task_done()
            check_cancelled()


def _keys(caller: Caller) -> tuple[str, str]:
    return keys.rate_limit(caller.key_id), keys.token_use(caller.key_id)


def _headers(caller: Caller, requests: int, requests_us: int, tokens: int, tokens_us: int) -> dict[str, str]:
    """In OpenAI's spelling: https://platform.openai.com/docs/guides/rate-limits"""
    headers = {}
    for unit, limit, left, reset_us in (
        ("requests", caller.rpm, requests, requests_us),
        ("tokens", caller.tpm, tokens, tokens_us),
    ):
        if limit is not None:
            headers[f"x-ratelimit-limit-{unit}"] = str(limit)
            headers[f"x-ratelimit-remaining-{unit}"] = str(left)
            headers[f"x-ratelimit-reset-{unit}"] = _duration(reset_us)
    return headers


def _duration(microseconds: int) -> str:
    """Such as ``20ms``, ``8.64s``, ``6m0s``."""
    milliseconds = math.ceil(microseconds / 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:g}s"
    minutes, seconds = divmod(math.ceil(milliseconds / 1000), 60)
    return f"{minutes}m{seconds}s"
