"""What a batch asks of the queue: which of its jobs have ended and how, to end those that wait, to forget the rest."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import orjson
from redis.asyncio import Redis

from fastchat_q import keys, scripts
from fastchat_q.events import TERMINAL_STATES, Delta, End, Result
from fastchat_q.queue import cancel_call
from fastchat_q.records import number, text
from fastchat_q.tokens import entry_to_delta

AT_A_TIME = 256
CANCELLED = "batch cancelled"


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that has ended."""

    job_id: str
    end: End | None
    """None: there is no such job (any more), or its tokens are not all there: Redis lost something."""
    events: Sequence[Delta] = ()


async def ended_jobs(redis: "Redis", jobs: Mapping[str, str]) -> list[EndedJob]:
    """Those of some jobs (id -> model) that do not wait or run any more, some hundred at the most: two round trips."""
    by_model: dict[str, list[str]] = {}
    for job_id, model in jobs.items():
        by_model.setdefault(model, []).append(job_id)
    found: list[EndedJob] = []
    for model, ids in by_model.items():
        scores = await redis.zmscore(keys.model_keys(model).live, ids)
        over = [job_id for job_id, score in zip(ids, scores, strict=True) if score is None]
        if over:
            found += await _read(redis, model, over[:AT_A_TIME])
    return found


async def _read(redis: "Redis", model: str, ids: Sequence[str]) -> list[EndedJob]:
    names = keys.model_keys(model)
    pipe = redis.pipeline(transaction=False)
    for job_id in ids:
        pipe.hmget(names.job(job_id), ["state", "n", "reason", "result"])
        pipe.xrange(names.log(job_id))
    replies = await pipe.execute()
    found = []
    for job_id, (state, n, reason, result), entries in zip(ids, replies[::2], replies[1::2], strict=True):
        if state is None:
            found.append(EndedJob(job_id, None))
        elif state.decode() in TERMINAL_STATES:
            events = [entry_to_delta(entry_id, fields) for entry_id, fields in entries]
            count = number(n) or 0
            whole = (events[-1].n if events else 0) == count
            outcome = Result.from_dict(orjson.loads(result)) if result else None
            end = End(count, state.decode(), text(reason) or "", outcome)
            found.append(EndedJob(job_id, end if whole or end.state != "succeeded" else None, events))
    return found


async def existing(redis: "Redis", jobs: Sequence[tuple[str, str]]) -> list[bool]:
    """Of which jobs (model, id) Redis knows."""
    pipe = redis.pipeline(transaction=False)
    for model, job_id in jobs:
        pipe.exists(keys.model_keys(model).job(job_id))
    return [bool(there) for there in await pipe.execute()] if jobs else []


async def cancel_jobs(redis: "Redis", jobs: Mapping[str, str], *, running: bool) -> None:
    """Ends jobs (id -> model).

    Args:
        running: those that run, too.
    """
    calls: list[scripts.Call] = []
    for model in set(jobs.values()):
        ids = [job_id for job_id, its in jobs.items() if its == model]
        leases = await redis.zmscore(keys.model_keys(model).lease, ids)
        some = [job_id for job_id, lease in zip(ids, leases, strict=True) if running or lease is None]
        calls += [cancel_call(model, job_id, CANCELLED) for job_id in some]
    for start in range(0, len(calls), AT_A_TIME):
        for reply in await scripts.call_many(redis, calls[start : start + AT_A_TIME]):
            if isinstance(reply, Exception):
                raise reply


async def discard(redis: "Redis", jobs: Iterable[tuple[str, str]]) -> None:
    """Forgets jobs (model, id) that have ended, with their tokens."""
    pipe = redis.pipeline(transaction=False)
    for model, job_id in jobs:
        names = keys.model_keys(model)
        pipe.unlink(names.job(job_id), names.log(job_id))
    if len(pipe):
        await pipe.execute()
