"""Job records as one reads them: a frozen picture of a job, its place in the line and its history. It changes nothing.

The fields are those that ``lua/*.lua`` write; ``docs/redis-keys.md`` lists them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
from redis.asyncio import Redis

from . import keys
from .events import TERMINAL_STATES, End, Result
from .queue import eta_s, position
from .registry import Registry, capacity_of

ATTEMPTS_KEPT = 16
"""The history holds so many attempts; the same number stands in ``lua/transitions.lua``."""

Standing = Literal["line", "delayed", "parked"]

_FIELDS = (
    *("state", "lane", "tenant", "attempt", "deaths", "retries", "n", "worker", "cost", "reason", "result"),
    *("enq_ms", "start_ms", "done_ms", "start_by_ms", "deadline_ms"),
    *(f"{kind}{slot}" for slot in range(ATTEMPTS_KEPT) for kind in "ae"),
)
_LARGE_FIELDS = ("spec", "view")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job that has not ended stands, when it was looked for."""

    standing: Standing | None = None
    """``line``; ``delayed`` between two tries; ``parked`` while its tenant runs as many as it may; None: it runs."""
    position: int | None = None
    """Place in the order of service, from 1; of a job in line alone."""
    eta_s: float | None = None
    """Estimated seconds until it is started; None: not measured, paused, or nobody serves the model."""
    retry_at_ms: int | None = None
    """When a delayed job goes back to its line."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One claim of a job. ``outcome`` is how it ended: a state, or why the job was handed back."""

    number: int
    worker: str
    started_ms: int
    ended_ms: int | None = None
    outcome: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "attempt": self.number,
            "worker": self.worker,
            "started_at": iso(self.started_ms),
            "ended_at": iso(self.ended_ms),
            "outcome": self.outcome,
        }


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job at the moment ``read_ms``. All times are Redis server time in ms since 1970."""

    id: str
    """The bare id; `public_id` is the one that leaves the house."""
    model: str
    """The model's name; its slug if nobody remembers the name."""
    state: str
    lane: str
    tenant: str
    place: Place
    n: int
    """Tokens in the log."""
    cost: int
    """What it was taken to cost, in tokens."""
    worker: str | None
    """Who runs it, or ran it last before it ended."""
    attempt: int
    """Claims so far."""
    attempts: tuple[Attempt, ...]
    """The last `ATTEMPTS_KEPT` of them, oldest first."""
    deaths: int
    retries: int
    reason: str | None
    result: Result | None
    created_ms: int
    started_ms: int | None
    """When the latest attempt began."""
    ended_ms: int | None
    start_by_ms: int
    deadline_ms: int
    read_ms: int
    spec: bytes | None = None
    """The job as JSON, prompt included; only if asked for, and only while it is kept."""
    view: bytes | None = None
    """What `Terms.view` was; only if asked for."""

    @property
    def public_id(self) -> str:
        """``<slug>.<id>``."""
        return keys.public_job_id(self.model, self.id)

    @property
    def age_s(self) -> float:
        """Seconds since it was accepted."""
        return max(self.read_ms - self.created_ms, 0) / 1000

    @property
    def last_worker(self) -> str | None:
        """Who runs it or had it last, however that ended."""
        return self.worker or (self.attempts[-1].worker if self.attempts else None)

    def end(self) -> End | None:
        """The terminal event; None: it has not ended."""
        if self.state not in TERMINAL_STATES:
            return None
        return End(self.n, self.state, self.reason or "", self.result, self.ended_ms)

    def error(self) -> dict[str, Any] | None:
        """The OpenAI error object of a job that ended without success."""
        end = self.end()
        error = end.error() if end is not None else None
        body: dict[str, Any] | None = error.body()["error"] if error else None
        return body

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ISO-8601 times in UTC, plain numbers, no prompt."""
        usage = self.result.usage if self.result else None
        return {
            "id": self.public_id,
            "object": "job",
            "model": self.model,
            "state": self.state,
            "lane": self.lane,
            "tenant": self.tenant,
            "position": self.place.position,
            "eta_s": self.place.eta_s,
            "standing": self.place.standing,
            "retry_at": iso(self.place.retry_at_ms),
            "tokens": self.n,
            "worker": self.worker,
            "created_at": iso(self.created_ms),
            "started_at": iso(self.started_ms),
            "ended_at": iso(self.ended_ms),
            "start_by": iso(self.start_by_ms),
            "deadline": iso(self.deadline_ms),
            "attempts": [attempt.to_dict() for attempt in self.attempts],
            "deaths": self.deaths,
            "retries": self.retries,
            "reason": self.reason,
            "error": self.error(),
            "usage": usage.to_dict() if usage else None,
            "finish_reason": self.result.finish_reason if self.result else None,
        }


def iso(ms: int | None) -> str | None:
    """Milliseconds since 1970 as ISO-8601 in UTC: ``2026-01-31T12:00:00.000Z``."""
    if ms is None:
        return None
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def read_record(
    redis: "Redis", model_or_slug: str, job_id: str, *, whole: bool = False, slots: int | None = None
) -> JobRecord | None:
    """One job with its place in the line, in one round trip; None if there is no such job (any more).

    Args:
        job_id: the bare id.
        slots: that serve the model, if the caller knows; else the registry is asked for them if the job waits.
        whole: with ``spec`` and ``view``, which can be as large as a request may be.

    Raises:
        redis.RedisError: the server is away.
    """
    names = keys.model_keys(model_or_slug)
    fields = (*_FIELDS, *_LARGE_FIELDS) if whole else _FIELDS
    pipe = redis.pipeline(transaction=False)
    pipe.time()
    pipe.hmget(names.job(job_id), list(fields))
    pipe.zscore(names.delay, job_id)
    pipe.hget(names.stat, "service_ms")
    pipe.get(names.mode)
    pipe.zrange(keys.MODELS, 0, -1)
    for lane in keys.ALL_LANES:
        pipe.zrank(names.waiting(lane), job_id)
        pipe.zcard(names.waiting(lane))
    time, values, retry_at, service_ms, mode, models, *lines = await pipe.execute()
    row = dict(zip(fields, values, strict=True))
    if row["state"] is None:
        return None
    ranks = dict(zip(keys.ALL_LANES, lines[::2], strict=True))
    lengths = dict(zip(keys.ALL_LANES, lines[1::2], strict=True))
    lane = text(row["lane"]) or keys.LANES[0]
    rank = ranks.get(lane)
    if rank is not None:
        place_in_line = position(lane, rank, lengths["hi"])
        if slots is None:
            _, slots = capacity_of(await Registry(redis).workers(), model_or_slug)
        estimate = eta_s(place_in_line, number(service_ms), slots, paused=mode == b"paused")
        place = Place("line", place_in_line, estimate)
    elif retry_at is not None:
        place = Place("delayed", retry_at_ms=int(retry_at))
    else:
        place = Place("parked")
    return parse(model_named(model_or_slug, models), job_id, row, place, milliseconds(time))


async def read_records(redis: "Redis", model: str, places: Sequence[tuple[str, Place]]) -> list[JobRecord]:
    """Jobs whose places are known, without those that are gone, in one round trip: keep them to some hundred."""
    names = keys.model_keys(model)
    pipe = redis.pipeline(transaction=False)
    pipe.time()
    for job_id, _ in places:
        pipe.hmget(names.job(job_id), list(_FIELDS))
    time, *rows = await pipe.execute()
    read = (
        parse(model, job_id, dict(zip(_FIELDS, values, strict=True)), place, milliseconds(time))
        for (job_id, place), values in zip(places, rows, strict=True)
    )
    return [record for record in read if record is not None]


def parse(model: str, job_id: str, row: Mapping[str, bytes | None], place: Place, read_ms: int) -> JobRecord | None:
    """The hash of a job as a record; None if it has no state, for then there is no job."""
    state = text(row["state"])
    if state is None:
        return None
    attempt = number(row["attempt"]) or 0
    result = text(row["result"])
    return JobRecord(
        id=job_id,
        model=model,
        state=state,
        lane=text(row["lane"]) or keys.LANES[0],
        tenant=text(row["tenant"]) or "",
        place=place if state == "queued" else Place(),
        n=number(row["n"]) or 0,
        cost=number(row["cost"]) or 0,
        worker=text(row["worker"]) if state != "queued" else None,
        attempt=attempt,
        attempts=_attempts(attempt, row),
        deaths=number(row["deaths"]) or 0,
        retries=number(row["retries"]) or 0,
        reason=text(row["reason"]),
        result=Result.from_dict(orjson.loads(result)) if result else None,
        created_ms=number(row["enq_ms"]) or 0,
        started_ms=number(row["start_ms"]) if attempt else None,
        ended_ms=number(row["done_ms"]),
        start_by_ms=number(row["start_by_ms"]) or 0,
        deadline_ms=number(row["deadline_ms"]) or 0,
        read_ms=read_ms,
        spec=row.get("spec"),
        view=row.get("view"),
    )


def model_named(model_or_slug: str, models: Sequence[bytes]) -> str:
    """The name of a model, given its name or its slug and the names that the registry knows."""
    known = (name.decode() for name in models)
    return next((name for name in known if keys.slug(name) == model_or_slug), model_or_slug)


def milliseconds(time: tuple[int, int]) -> int:
    """The reply to TIME in ms."""
    return time[0] * 1000 + time[1] // 1000


def text(value: bytes | None) -> str | None:
    """A field; an empty one counts as absent."""
    return value.decode(errors="replace") if value else None


def number(value: bytes | None) -> int | None:
    """A field that holds a number; scripts may write it with a fraction."""
    return int(float(value)) if value else None


def _attempts(attempt: int, row: Mapping[str, bytes | None]) -> tuple[Attempt, ...]:
    kept = []
    for count in range(max(attempt - ATTEMPTS_KEPT, 0) + 1, attempt + 1):
        begun = (text(row[f"a{count % ATTEMPTS_KEPT}"]) or "").partition(" ")
        ended = (text(row[f"e{count % ATTEMPTS_KEPT}"]) or "").partition(" ")
        if not begun[0]:
            continue
        started_ms = int(begun[0])
        over = bool(ended[0]) and int(ended[0]) >= started_ms  # else it is the end of the attempt that had this slot
        kept.append(Attempt(count, begun[2], started_ms, int(ended[0]) if over else None, ended[2] if over else None))
    return tuple(kept)
