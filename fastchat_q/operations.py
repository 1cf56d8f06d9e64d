"""What the person on call does to queues and dead jobs: one function for each. It prints nothing."""

from collections.abc import Sequence
from typing import Literal

from redis.asyncio import Redis

from . import keys, scripts
from .errors import InvalidRequestError
from .jobs import Job

Mode = Literal["paused", "draining"]


async def revive(
    redis: "Redis",
    model: str,
    job_ids: Sequence[str],
    *,
    queue_deadline_s: float,
    deadline_s: float,
    keep_s: float,
    spec: str = "",
) -> list[bool]:
    """Gives dead jobs another life, with counters at zero; for each, whether it was dead.

    Args:
        keep_s: how long its answer is kept: nobody listens, so somebody has to come for it.
        spec: another one for the only job; with it the job starts over, else behind its last token.

    Raises:
        redis.RedisError: the server is away, or refuses (at maxmemory).
    """
    names = keys.model_keys(model).script_keys
    queue_deadline_ms, deadline_ms, keep_ms = (round(s * 1000) for s in (queue_deadline_s, deadline_s, keep_s))
    rest = (queue_deadline_ms, deadline_ms, spec, keep_ms)
    return await _each(redis, [scripts.Call("revive", names, (job_id, *rest)) for job_id in job_ids])


async def drop(redis: "Redis", model: str, job_ids: Sequence[str]) -> list[bool]:
    """Forgets dead jobs with their tokens; for each, whether it was dead."""
    names = keys.model_keys(model).script_keys
    return await _each(redis, [scripts.Call("drop", names, (job_id,)) for job_id in job_ids])


async def set_mode(redis: "Redis", model: str, mode: Mode) -> str | None:
    """Pauses or drains a queue; returns the mode before."""
    before = await redis.set(keys.model_keys(model).mode, mode, get=True)
    return before.decode() if before else None


async def resume(redis: "Redis", model: str) -> str | None:
    """Lifts pause and drain; returns the mode before. Workers of a paused queue look again by themselves."""
    before = await redis.getdel(keys.model_keys(model).mode)
    return before.decode() if before else None


def edited_spec(before: bytes, after: str) -> str:
    """The spec that replaces ``before``, as it is stored.

    Raises:
        InvalidRequestError: it is no job, or another one: id, model and lane stay as they are.
    """
    new = Job.from_spec(after)
    old = Job.from_spec(before)
    for field in ("id", "model", "lane"):
        was, now = getattr(old, field), getattr(new, field)
        if was != now:
            raise InvalidRequestError(f"{field}: cannot be changed (it was {was!r}, now {now!r}).", param=field)
    return new.to_spec()


async def _each(redis: "Redis", calls: Sequence[scripts.Call]) -> list[bool]:
    done: list[bool] = []
    for reply in await scripts.call_many(redis, calls):
        if isinstance(reply, Exception):
            raise reply
        done.append(bool(reply))
    return done
