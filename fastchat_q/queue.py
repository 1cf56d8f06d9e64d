"""The job queue of all models: one method per transition, each one script call. It decides nothing; the scripts do."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from redis.asyncio import Redis

from . import keys, scripts
from .errors import QueueFullError
from .events import Result
from .jobs import Job

LEASE_MS = 10_000
"""A claim lives this long after its last sign of life (EMIT or RENEW)."""
MAX_DEATHS = 4
"""Lost leases after which a job is dead: with 3, random worker crashes alone lose innocent jobs (measured)."""
REAP_S = 1.0
"""Every worker and every API server reaps this often."""
REAP_LIMIT = 32
DEAD_CONNECTION_S = 5.0
"""A blocking read that is late by so much will never return."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in a worker's hands. ``fence`` proves it in every later call; ``n`` tokens are in the log already."""

    job_id: str
    fence: str
    attempt: int
    n: int
    spec: bytes


@dataclass(frozen=True, slots=True)
class Finish:
    """How a claim ends: after ``n`` tokens, in ``state``, with a result for the client."""

    claim: Claim
    n: int
    state: Literal["succeeded", "failed"]
    reason: str
    result: Result


@dataclass(frozen=True, slots=True)
class Reaped:
    """What one REAP did, in jobs."""

    handed_back: int
    dead: int
    expired: int


class Queue:
    """Submits, claims and ends jobs. Raises ``redis.RedisError`` when the server is away."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis

    async def enqueue(self, job: Job, *, inbox: str, deadline_s: float, max_waiting: int) -> int:
        """Accepts a job: durable when this returns. Safe to call again with the same job.

        Args:
            inbox: channel that gets the job's events.
            deadline_s: seconds from now until the job expires, waiting or running.
            max_waiting: bound on the lane's waiting jobs.

        Returns:
            The place in the lane, from 1; 0 for a job that was there already.

        Raises:
            QueueFullError: the lane is full; nothing was stored.
        """
        args = (job.id, job.lane, inbox, job.to_spec(), max_waiting, round(deadline_s * 1000), MAX_DEATHS)
        verdict, detail = await scripts.call(self._redis, "enqueue", keys.model_keys(job.model).script_keys, args)
        if verdict == b"full":
            raise QueueFullError(
                f"The queue of model {job.model!r} is full: {detail} jobs wait, the limit is {max_waiting}. Retry later"
            )
        return int(detail) if verdict == b"new" else 0

    async def claim(
        self, model: str, worker_id: str, *, free: int, nonce: str, lanes: Sequence[str] = keys.LANES
    ) -> list[Claim]:
        """Takes up to ``free`` jobs, in the order of ``lanes``. May return none."""
        while True:
            more, *taken = await scripts.call(
                self._redis, "claim", keys.model_keys(model).script_keys, (worker_id, free, LEASE_MS, nonce, *lanes)
            )
            if taken or not more:
                return [Claim(i.decode(), f.decode(), attempt, n, spec) for i, f, attempt, n, spec in taken]

    async def wait(self, model: str, timeout_s: float) -> None:
        """Blocks until a job may be there, at the most ``timeout_s`` seconds. Needs a blocking connection.

        Raises:
            TimeoutError: the server did not even say that time is up: the connection is dead without being closed.
        """
        async with asyncio.timeout(timeout_s + DEAD_CONNECTION_S):
            await self._redis.blpop([keys.model_keys(model).bell], timeout=timeout_s)  # type: ignore[arg-type, misc]

    async def renew(self, model: str, claims: Sequence[Claim]) -> list[Claim]:
        """Extends the leases; returns the claims that are lost."""
        args: list[scripts.Arg] = [LEASE_MS]
        for claim in claims:
            args += (claim.job_id, claim.fence)
        alive = await scripts.call(self._redis, "renew", keys.model_keys(model).script_keys, args)
        return [claim for claim, ok in zip(claims, alive, strict=True) if not ok]

    async def release(self, model: str, claims: Sequence[Claim]) -> None:
        """Gives claims back to the head of their lane, with their tokens."""
        model_keys = keys.model_keys(model).script_keys
        await scripts.call_many(self._redis, [scripts.Call("release", model_keys, (c.job_id, c.fence)) for c in claims])

    async def cancel(self, model: str, job_id: str, reason: str) -> str:
        """Ends a job for its client at once; returns the state before, or ``none``."""
        args = (job_id, reason, keys.WORKER_CHANNEL_PREFIX)
        before: bytes = await scripts.call(self._redis, "cancel", keys.model_keys(model).script_keys, args)
        return before.decode()

    async def reap(self, model: str) -> Reaped:
        """Hands back jobs of dead workers and expires late ones; bounded, and safe from anywhere at any time."""
        return Reaped(*await scripts.call(self._redis, "reap", keys.model_keys(model).script_keys, (REAP_LIMIT,)))


def finish_call(model: str, finish: Finish) -> scripts.Call:
    """The FINISH of one claim, to be sent behind the EMIT of its last tokens, in the same round trip."""
    args = (
        finish.claim.job_id,
        finish.claim.fence,
        finish.n,
        finish.state,
        finish.reason,
        finish.result.to_json(),
    )
    return scripts.Call("finish", keys.model_keys(model).script_keys, args)
