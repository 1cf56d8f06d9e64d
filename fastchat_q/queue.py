"""The job queue of all models: one method per transition, each one script call. It decides nothing; the scripts do."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from redis.asyncio import Redis

from . import keys, scripts
from .errors import FastchatQError, IdempotencyConflictError, QueueDrainingError, QueueFullError
from .events import Result
from .jobs import Job

LEASE_MS = 10_000
"""A claim lives this long after its last sign of life (EMIT or RENEW)."""
WARD_MS = 15_000
"""A worker that waits to run a suspect alone says so this often at the least."""
MAX_DEATHS = 4
"""Lost workers after which a job is dead: with 3, random worker crashes alone lose innocent jobs (measured)."""
KEEP_S = 120.0
"""How long a job is kept after its end, unless its client is expected to come back for it."""
MAX_RETRIES = 3
UNCOUNTED = -1
"""Tries that a worker may ask to repeat."""
REAP_S = 1.0
"""Every worker and every API server reaps this often."""
REAP_LIMIT = 32
RECONCILE_S = 5.0
"""Every worker and every API server looks at one slice of the jobs this often."""
RECONCILE_SLICE = 256
UNMEASURED_S = 5.0
"""What a wait is taken to be while no job has been measured."""
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
"""Bounds on a tenant's share: tags stay far from where floats lose whole numbers."""
DEAD_CONNECTION_S = 5.0
"""A blocking read that is late by so much will never return."""


LogEntry = tuple[int, int, bytes]
"""An entry of a token log: the count that it brings the job to, its tokens, and their payload."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How the queue is to treat a job: who it is for, what it may cost, how long it may take. Times in seconds."""

    inbox: str = ""
    """Channel that gets the job's events; empty: none."""
    tenant: str = "default"
    weight: float = 1.0
    """Share of this tenant among those that compete."""
    max_waiting: int = 2048
    """Bound on the lane's waiting jobs."""
    max_queued: int = 0
    """Bound on the tenant's waiting jobs of this model; 0: none."""
    max_parallel: int = 0
    """How many of the tenant's jobs of this model run at a time; 0: any number."""
    queue_deadline_s: float = 600.0
    """It must be started by then."""
    deadline_s: float = 3600.0
    """It must be done by then."""
    keep_s: float = KEEP_S
    """How long record and tokens are kept after the end."""
    keep_images: bool = False
    """Its images are kept as long: a later request may go on with them."""
    detached: bool = False
    """It goes on with nobody listening."""
    view: str = ""
    """JSON for whoever reads the job later."""
    idempotency: tuple[str, str] | None = None
    """Digests of the client's key and of its request."""
    slots: int = 0
    """Slots that serve the model now; 0: unknown."""

    @property
    def images_s(self) -> float:
        """How long its images are needed at the most."""
        return self.deadline_s + (self.keep_s if self.keep_images else 0.0)

    def __post_init__(self) -> None:
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:  # a tag of infinity would end fairness for all
            raise ValueError(f"weight {self.weight!r}: expected {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")


@dataclass(frozen=True, slots=True)
class Accepted:
    """What became of a request to enqueue."""

    job_id: str
    """The job's id; that of an earlier job if the idempotency key was seen before."""
    place: int
    """Place in the order of service, from 1; 0 for a job that was there already."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in a worker's hands. ``fence`` proves it in every later call; ``n`` tokens are in the log already."""

    job_id: str
    fence: str
    attempt: int
    n: int
    lane: str
    spec: bytes
    retries: int = 0
    """Tries that a worker asked to repeat."""


@dataclass(frozen=True, slots=True)
class Attached:
    """The answer to an ATTACH."""

    view: bytes
    """The job's `Terms.view`."""
    void: bool
    """Its reader has ids of events that are not those of the job any more, and was not attached."""


class Advice(IntEnum):
    """What CLAIM says beside the jobs."""

    NONE = 0
    AGAIN = 1
    PAUSED = 2
    EMPTY_FIRST = 3
    """A suspect waits for this worker: it is to claim nothing else until all that it runs has ended."""
    KEPT = 4
    """Jobs wait, but the slots that are free are kept for other tenants: claim again when another one is."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The answer to a CLAIM."""

    claims: list[Claim]
    advice: Advice


@dataclass(frozen=True, slots=True)
class Finish:
    """How a claim ends: after ``n`` tokens, in ``state``, with a result for the client."""

    claim: Claim
    n: int
    state: Literal["succeeded", "failed", "retry"]
    reason: str
    result: Result
    backoff_s: float = 0.0
    """Until the next try, if that is what it asks for."""
    counts: bool = True
    """That try is one of `MAX_RETRIES`."""


@dataclass(frozen=True, slots=True)
class Reaped:
    """What one REAP did, in jobs."""

    handed_back: int
    dead: int
    expired: int


class Queue:
    """Submits, claims and ends jobs. Raises ``redis.RedisError`` when the server is away."""

    def __init__(self, redis: "Redis") -> None:
        scripts.read_all()
        self._redis = redis

    async def enqueue(self, job: Job, terms: Terms, had: Sequence[LogEntry] = ()) -> Accepted:
        """Accepts a job: durable when this returns. Safe to call again with the same job.

        Args:
            had: of a job that Redis lost, what its client has of the log.

        Raises:
            QueueFullError: the lane or the tenant's share of it is full; nothing was stored.
            QueueDrainingError: the queue takes nothing at the moment; nothing was stored.
            IdempotencyConflictError: the idempotency key belongs to another request.
        """
        key_digest, _ = terms.idempotency or ("", "")
        is_new_key = bool(key_digest) and await self._reserve_key(job, terms, key_digest)
        reply = await self._call("enqueue", job.model, _enqueue_args(job, terms, had))
        try:
            return _accepted(job, terms, reply)
        except (QueueFullError, QueueDrainingError):
            if is_new_key:
                await self._redis.delete(keys.idempotent_model(terms.tenant, key_digest))
            raise

    async def enqueue_many(self, jobs: Sequence[tuple[Job, Terms]]) -> list[Accepted | FastchatQError]:
        """`enqueue` of many in one round trip; without idempotency keys. What is refused stands as its error.

        Raises:
            redis.RedisError: the server is away or refuses; some may have been accepted.
        """
        calls = [
            scripts.Call("enqueue", keys.model_keys(job.model).script_keys, _enqueue_args(job, terms))
            for job, terms in jobs
        ]
        outcomes: list[Accepted | FastchatQError] = []
        for (job, terms), reply in zip(jobs, await scripts.call_many(self._redis, calls), strict=True):
            if isinstance(reply, Exception):
                raise reply
            try:
                outcomes.append(_accepted(job, terms, reply))
            except (QueueFullError, QueueDrainingError) as error:
                outcomes.append(error)
        return outcomes

    async def claim(
        self,
        model: str,
        worker_id: str,
        *,
        running: int,
        lanes: Sequence[tuple[str, int]],
        nonce: str,
        headroom: int = 0,
    ) -> Taken:
        """Takes jobs: for each lane, in the order of service, as many as stand beside it, and no more than the largest.

        Args:
            running: jobs that the worker runs already.
            headroom: so many of its slots are kept from tenants that run more than their share, while others that came
                lately have nothing in line.
        """
        args: list[scripts.Arg] = [worker_id, running, LEASE_MS, nonce, WARD_MS, headroom]
        for lane, limit in lanes:
            args += (lane, limit)
        while True:
            code, *taken = await self._call("claim", model, args)
            if taken or code != Advice.AGAIN:
                return Taken([_claim(*fields) for fields in taken], Advice(code))

    async def wait(self, model: str, timeout_s: float) -> bool:
        """Blocks until a job may be there, at the most ``timeout_s`` seconds. Needs a blocking connection.

        Returns:
            Whether the bell rang.

        Raises:
            TimeoutError: the server did not even say that time is up: the connection is dead without being closed.
        """
        async with asyncio.timeout(timeout_s + DEAD_CONNECTION_S):
            return None is not await self._redis.blpop([keys.model_keys(model).bell], timeout=timeout_s)  # type: ignore[arg-type, misc]

    async def ring(self, model: str) -> None:
        """Passes a bell on that was taken for nothing, to a worker that can take a job."""
        await self._redis.rpush(keys.model_keys(model).bell, "1")  # type: ignore[misc]

    async def renew(self, model: str, claims: Sequence[Claim]) -> list[Claim]:
        """Extends the leases; returns the claims that are lost."""
        args: list[scripts.Arg] = [LEASE_MS]
        for claim in claims:
            args += (claim.job_id, claim.fence)
        alive = await scripts.call(self._redis, "renew", keys.model_keys(model).token_keys, args)
        return [claim for claim, ok in zip(claims, alive, strict=True) if not ok]

    async def release(self, model: str, claims: Sequence[Claim]) -> None:
        """Gives claims back to the head of their lane, with their tokens."""
        names = keys.model_keys(model).script_keys
        await scripts.call_many(self._redis, [scripts.Call("release", names, (c.job_id, c.fence)) for c in claims])

    async def disown(
        self, model: str, worker_id: str, reason: str, *, crashed: bool, known: Iterable[str] = ()
    ) -> tuple[int, int]:
        """Hands back what a worker is said to run and does not.

        Args:
            crashed: its process is gone: each of its jobs has lost a worker. Else: the reply to its CLAIM was lost.
            known: ids of jobs that it does run.

        Returns:
            How many jobs were handed back, and how many are dead now.
        """
        back, dead = await self._call("disown", model, (worker_id, int(crashed), reason, *known))
        return back, dead

    async def model_of_key(self, tenant: str, key_digest: str) -> str | None:
        """The slug of the model that the client's idempotency key was used for."""
        used_for: bytes | None = await self._redis.get(keys.idempotent_model(tenant, key_digest))
        return None if used_for is None else used_for.decode()

    async def is_known(self, model: str, tenant: str, key_digest: str) -> bool:
        """Whether the client's idempotency key has a job of this model."""
        names = keys.model_keys(model)
        known: bytes | None = await self._redis.get(names.idempotency(f"{tenant}:{key_digest}"))
        return known is not None and bool(await self._redis.exists(names.job(known.split()[0].decode())))

    async def cancel(
        self,
        model: str,
        job_id: str,
        reason: str,
        *,
        leaving: str = "",
        refused: bool = False,
        fence: str = "",
        tenant: str | None = None,
    ) -> str:
        """Ends a job for its client at once; returns the state before, or ``none``.

        Args:
            leaving: an inbox that is given up; then the job is cancelled only if nobody else listens or is to.
            refused: who left was told that there is no job: it need not go on with nobody listening.
            fence: of a claim that finds its job abandoned; then it is cancelled only if nobody listens at this moment,
                and the state is returned as ``heard`` or ``lost`` if it is not.
            tenant: whose job it must be; None: anybody's.
        """
        args = (job_id, reason, keys.WORKER_CHANNEL_PREFIX, leaving, fence, tenant or "", int(refused))
        before: bytes = await self._call("cancel", model, args)
        return before.decode()

    async def forget(self, model: str, job_id: str, *, tenant: str | None = None) -> str:
        """Deletes a job with all that was asked and answered; one that has not ended is cancelled.

        Args:
            tenant: whose job it must be; None: anybody's.

        Returns:
            The state before, or ``none``.
        """
        before: bytes = await self._call("forget", model, (job_id, tenant or "", keys.WORKER_CHANNEL_PREFIX))
        return before.decode()

    async def attach(
        self,
        model: str,
        job_id: str,
        inbox: str,
        tenant: str | None = None,
        after: int = 0,
        *,
        in_events: bool = False,
    ) -> Attached | None:
        """From now on the job's events go to ``inbox`` too, if it has not ended.

        Args:
            tenant: whose job it must be; None: anybody's.
            after: tokens that the reader says it has.
            in_events: they are events, of which an entry of the log may make several or none.

        Returns:
            None if there is no such job.
        """
        reply = await self._call("attach", model, (job_id, inbox, tenant or "", after, int(in_events)))
        return None if reply is None else Attached(reply[0], bool(reply[1]))

    async def restore(self, model: str, job_id: str, have: int, lost: Sequence[LogEntry] = ()) -> int:
        """Puts entries back behind token ``have`` that a failover lost and a client has; see ``lua/restore.lua``.

        Without any: they cannot be put back, for the log has others in their place. The ids of events are void then.
        """
        done: int = await self._call("restore", model, (job_id, have, *(part for entry in lost for part in entry)))
        return done

    async def reap(self, model: str) -> Reaped:
        """Hands back jobs of dead workers and expires late ones; bounded, and safe from anywhere at any time."""
        return Reaped(*await self._call("reap", model, (REAP_LIMIT,)))

    async def reconcile(self, model: str, jobs: int = RECONCILE_SLICE) -> int:
        """Makes lines, leases and entries agree with the next ``jobs`` records; returns how many things it mended."""
        mended: int = await self._call("reconcile", model, (jobs, LEASE_MS))
        return mended

    async def _reserve_key(self, job: Job, terms: Terms, key_digest: str) -> bool:
        """Whether the client's key is new; refuses one that is used for another model, whose keys no script sees."""
        name, mine = keys.idempotent_model(terms.tenant, key_digest), keys.slug(job.model)
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(name, mine, nx=True, px=_ms(terms.deadline_s + terms.keep_s))
        pipe.get(name)
        is_new, used_for = await pipe.execute()
        if used_for is not None and used_for.decode() != mine:
            raise IdempotencyConflictError
        return bool(is_new)

    async def _call(self, name: str, model: str, args: Sequence[scripts.Arg]) -> Any:
        return await scripts.call(self._redis, name, keys.model_keys(model).script_keys, args)


def _enqueue_args(job: Job, terms: Terms, had: Sequence[LogEntry] = ()) -> tuple[scripts.Arg, ...]:
    key_digest, body_digest = terms.idempotency or ("", "")
    return (
        job.id,
        job.lane,
        ("* " if terms.detached else "") + terms.inbox,
        job.to_spec(),
        terms.max_waiting,
        _ms(terms.queue_deadline_s),
        _ms(terms.deadline_s),
        MAX_DEATHS,
        terms.tenant,
        str(terms.weight),
        job.cost,
        terms.max_queued,
        terms.max_parallel,
        _ms(terms.keep_s),
        terms.view,
        f"{terms.tenant}:{key_digest}" if key_digest else "",
        body_digest,
        terms.slots,
        *(part for entry in had for part in entry),
    )


def _accepted(job: Job, terms: Terms, reply: Any) -> Accepted:
    verdict, *details = reply
    if verdict == b"new":
        return Accepted(job.id, details[0])
    if verdict == b"dup":
        return Accepted(details[0].decode(), 0)
    if verdict == b"conflict":
        raise IdempotencyConflictError
    if verdict == b"draining":
        raise QueueDrainingError(f"The queue of model {job.model!r} is being drained and takes nothing new.")
    raise _full(job, terms, *details)


def cancel_call(model: str, job_id: str, reason: str) -> scripts.Call:
    """The CANCEL of one job, whoever waits for it."""
    args = (job_id, reason, keys.WORKER_CHANNEL_PREFIX, "", "", "", 0)
    return scripts.Call("cancel", keys.model_keys(model).script_keys, args)


def finish_call(model: str, finish: Finish) -> scripts.Call:
    """The FINISH of one claim, to be sent behind the EMIT of its last tokens, in the same round trip."""
    usage = finish.result.usage
    args = (
        finish.claim.job_id,
        finish.claim.fence,
        finish.n,
        finish.state,
        finish.reason,
        finish.result.to_json(),
        usage.total_tokens if usage else 0,
        _ms(finish.backoff_s),
        MAX_RETRIES if finish.counts else UNCOUNTED,
    )
    return scripts.Call("finish", keys.model_keys(model).script_keys, args)


def position(lane: str, rank: int, interactive: int) -> int:
    """Place in the order of service, from 1, of the job with this rank in its lane's line.

    Args:
        interactive: how many jobs wait in the interactive lane; those of the batch lane come after them.
    """
    return rank + 1 + (interactive if lane == "lo" else 0)


def eta_s(jobs: int, service_ms: float | None, slots: int, *, paused: bool = False) -> float | None:
    """Seconds until ``slots`` slots have served ``jobs`` jobs of the measured mean duration.

    None: nothing was measured yet, nobody serves the model, or the queue is paused.
    """
    if service_ms is None or slots < 1 or paused:
        return None
    return round(jobs * service_ms / 1000 / slots, 1)


def _full(job: Job, terms: Terms, what: bytes, waiting: int, service_ms: int) -> QueueFullError:
    wait_s = eta_s(waiting, service_ms, max(terms.slots, 1)) or UNMEASURED_S
    if what == b"time":
        message = (
            f"The queue of model {job.model!r} is too long: {waiting} jobs wait, for about {wait_s:.0f} s, and "
            f"this one must start within {terms.queue_deadline_s:g} s. Retry later"
        )
    elif what == b"tenant":
        message = (
            f"You have {waiting} jobs waiting for model {job.model!r}, the limit is {terms.max_queued}. "
            "Retry when some are done"
        )
    else:
        message = (
            f"The queue of model {job.model!r} is full: {waiting} jobs wait, the limit is {terms.max_waiting}. "
            "Retry later"
        )
    return QueueFullError(message, wait_s, own=what == b"tenant")


def _claim(job_id: bytes, fence: bytes, attempt: int, n: int, lane: bytes, retries: int, spec: bytes) -> Claim:
    return Claim(job_id.decode(), fence.decode(), attempt, n, lane.decode(), spec, retries)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
