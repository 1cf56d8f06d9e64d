"""What is in the queues, for the person on call: queues in figures, jobs in the order of service, dead letters.

It reads in slices, a bounded number of them, and never walks over all keys. It changes nothing.
"""

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from redis.asyncio import Redis

from . import keys
from .choices import JobFilter
from .events import TERMINAL_STATES
from .queue import eta_s, position
from .records import JobRecord, Place, Standing, iso, milliseconds, number, read_records, text
from .registry import Registration, Registry, capacity_of

SLICE = 200
LOOK_AT = 20_000
"""Jobs of a model that a listing with a filter looks at before it gives up."""
OLDEST_AMONG = 64
"""The longest wait is looked for among so many jobs whose clocks run out first."""


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """One model's queue in figures."""

    model: str
    slug: str
    mode: str
    """``open``, ``paused`` or ``draining``."""
    waiting: dict[str, int]
    """Jobs in line, for each lane."""
    delayed: int
    parked: int
    running: int
    live: int
    """Jobs that have not ended."""
    workers: int
    slots: int
    oldest_wait_s: float
    service_ms: int | None
    """Measured mean time of a job in a slot; None: nothing was measured."""
    eta_s: float | None
    """Estimated seconds until all that waits has been served; None: not known."""
    ended: dict[str, int]
    """Jobs that ended in each state, ever."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"object": "queue", **asdict(self)}


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry of the dead letters with its job."""

    record: JobRecord
    died_ms: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.record.to_dict(), "died_at": iso(self.died_ms), "last_worker": self.record.last_worker}


@dataclass(frozen=True, slots=True)
class Listing:
    """Jobs that were asked for. ``complete``: no further one would have fitted."""

    jobs: list[JobRecord]
    complete: bool


async def known_models(redis: "Redis") -> list[str]:
    """Names of the models that a worker served within the last 24 hours."""
    return sorted(await Registry(redis).known_models())


async def find_model(redis: "Redis", name_or_slug: str) -> str | None:
    """The model's name; also of a model that the registry has forgotten and whose queue is still there."""
    for model in await known_models(redis):
        if name_or_slug in (model, keys.slug(model)):
            return model
    names = keys.model_keys(name_or_slug)
    there = await redis.exists(names.live, names.dead, names.stat, names.mode)
    return name_or_slug if there else None


async def find_job(redis: "Redis", public_or_bare_id: str) -> tuple[str, str] | None:
    """(model or slug, bare id) of a job: a public id names its queue, a bare one is looked for in all known ones."""
    parsed = keys.parse_public_job_id(public_or_bare_id)
    candidates = [parsed] if parsed else [(model, public_or_bare_id) for model in await known_models(redis)]
    pipe = redis.pipeline(transaction=False)
    for model, job_id in candidates:
        pipe.exists(keys.model_keys(model).job(job_id))
    found = await pipe.execute() if candidates else []
    return next((candidate for candidate, there in zip(candidates, found, strict=True) if there), None)


async def queue_statuses(redis: "Redis", models: Iterable[str]) -> list[QueueStatus]:
    """Queues in figures: two round trips for the registry, and two for each."""
    registrations = await Registry(redis).workers()
    return [await _queue_status(redis, model, registrations) for model in models]


async def queue_status(redis: "Redis", model: str) -> QueueStatus:
    """One queue in figures."""
    [status] = await queue_statuses(redis, [model])
    return status


async def _queue_status(redis: "Redis", model: str, registrations: Iterable[Registration]) -> QueueStatus:
    names = keys.model_keys(model)
    pipe = redis.pipeline(transaction=False)
    pipe.time()
    pipe.get(names.mode)
    pipe.zcard(names.delay)
    pipe.zcard(names.lease)
    pipe.zcard(names.live)
    pipe.hgetall(names.stat)
    pipe.hkeys(names.queued)
    pipe.zrange(names.live, 0, OLDEST_AMONG - 1)
    for lane in keys.ALL_LANES:
        pipe.zcard(names.waiting(lane))
    time, mode, delayed, running, live, stat, tenants, first, *lines = await pipe.execute()
    for tenant in tenants:
        pipe.zcard(names.parked(tenant.decode()))
    for job_id in first:
        pipe.hmget(names.job(job_id.decode()), ["state", "enq_ms"])
    replies = await pipe.execute() if tenants or first else []
    parked, rows = sum(replies[: len(tenants)]), replies[len(tenants) :]
    now_ms = milliseconds(time)
    waits = [now_ms - int(enqueued) for state, enqueued in rows if state == b"queued" and enqueued]
    workers, slots = capacity_of(registrations, model)
    service_ms = number(stat.get(b"service_ms"))
    waiting = dict(zip(keys.ALL_LANES, lines, strict=True))
    all_waiting = sum(lines) + delayed + parked
    return QueueStatus(
        model=model,
        slug=keys.slug(model),
        mode=text(mode) or "open",
        waiting=waiting,
        delayed=delayed,
        parked=parked,
        running=running,
        live=live,
        workers=workers,
        slots=slots,
        oldest_wait_s=max(waits, default=0) / 1000,
        service_ms=service_ms,
        eta_s=eta_s(all_waiting, service_ms, slots, paused=mode == b"paused") if all_waiting else 0.0,
        ended={state: number(stat.get(state.encode())) or 0 for state in sorted(TERMINAL_STATES)},
    )


async def live_jobs(
    redis: "Redis", model: str, limit: int, which: JobFilter | None = None, tenant: str | None = None
) -> Listing:
    """Jobs that have not ended: those that run, then the lines in the order of service, then who waits beside them."""
    standings: set[Standing | None] = _STANDINGS[which]

    def fits(record: JobRecord) -> bool:
        return (
            record.state in ("queued", "running")
            and record.place.standing in standings
            and tenant in (None, record.tenant)
        )

    found: dict[str, JobRecord] = {}
    looked_at = 0
    async for places in _places(redis, model, standings):
        looked_at += len(places)
        for record in await read_records(redis, model, places):
            if record.id in found or not fits(record):  # a job may move on while it is being looked for
                continue
            if len(found) == limit:
                return Listing(list(found.values()), complete=False)
            found[record.id] = record
        if looked_at >= LOOK_AT:
            return Listing(list(found.values()), complete=False)
    return Listing(list(found.values()), complete=True)


async def dead_letters(redis: "Redis", model: str) -> AsyncIterator[DeadLetter]:
    """The dead letters whose jobs are still kept, newest first."""
    names, end = keys.model_keys(model), "+"
    while entries := await redis.xrevrange(names.dead, end, "-", count=SLICE):
        died = {fields[b"j"].decode(): int(sid.split(b"-")[0]) for sid, fields in entries if b"j" in fields}
        for record in await read_records(redis, model, [(job_id, Place()) for job_id in died]):
            if record.state == "dead":
                yield DeadLetter(record, died[record.id])
        end = "(" + entries[-1][0].decode()


_STANDINGS: dict[JobFilter | None, set[Standing | None]] = {
    None: {None, "line", "delayed", "parked"},
    "running": {None},
    "queued": {"line", "delayed", "parked"},
    "delayed": {"delayed"},
    "parked": {"parked"},
}


async def _places(
    redis: "Redis", model: str, standings: set[Standing | None]
) -> AsyncIterator[list[tuple[str, Place]]]:
    names = keys.model_keys(model)
    sources: list[tuple[str, Callable[[int, float], Place]]] = []
    if None in standings:
        sources.append((names.lease, lambda _rank, _score: Place()))
    if "line" in standings:
        interactive = await redis.zcard(names.waiting("hi"))
        sources += [(names.waiting(lane), _in_line(lane, interactive)) for lane in ("sus", "hi", "lo")]
    if "delayed" in standings:
        sources.append((names.delay, lambda _rank, score: Place("delayed", retry_at_ms=int(score))))
    if "parked" in standings:
        tenants: Iterable[bytes] = sorted(await redis.hkeys(names.queued))  # type: ignore[misc]
        sources += [(names.parked(tenant.decode()), lambda _rank, _score: Place("parked")) for tenant in tenants]
    for name, place in sources:
        start = 0
        while entries := await redis.zrange(name, start, start + SLICE - 1, withscores=True):
            yield [(job_id.decode(), place(start + i, score)) for i, (job_id, score) in enumerate(entries)]
            start += SLICE


def _in_line(lane: str, interactive: int) -> Callable[[int, float], Place]:
    return lambda rank, _score: Place("line", position(lane, rank, interactive))
