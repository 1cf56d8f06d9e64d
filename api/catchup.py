"""Reads from records and logs what streams have missed, and mends what Redis itself has lost.

Redis loses what it has acknowledged when it restarts without its data, or when a failover promotes a replica that
lagged. Then the tokens that a client has are the truth: a job that is gone is submitted again behind them, a log that
is shorter gets them back. What cannot be continued ends with an error; nothing begins a second time in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from fastchat_q import blobs, keys
from fastchat_q.connection import TRANSIENT
from fastchat_q.errors import FastchatQError, InvalidRequestError, JobFailedError
from fastchat_q.events import TERMINAL_STATES, Delta, End, Result
from fastchat_q.queue import Queue, eta_s, position
from fastchat_q.records import number
from fastchat_q.tokens import entry_to_delta, read

from .stream import INVALID_EVENT_ID, JobStream

log = structlog.get_logger()

PAGE = 256
"""Log entries read for a stream at a time."""
MAX_SHORT_READS = 3
"""A job has ended, and its log still lacks tokens: once can be chance, this often it is damage."""
MAX_SUBMISSIONS = 4
"""A job that vanishes more often than this is reported as lost."""
FIELDS = ("state", "n", "reason", "result", "lane", "keep_ms", "done_ms")


@dataclass(frozen=True, slots=True)
class _Found:
    """What is known of a job in one moment."""

    entries: list[Any]
    state: str | None
    n: int
    reason: str
    result: bytes | None
    lane: str | None
    rank: int | None
    keep_ms: int
    ended_ms: int | None


class CatchUp:
    """Called with streams, in batches; one round trip for all of them unless something must be mended.

    Args:
        slots: how many slots serve a model, by its name or slug.
    """

    def __init__(self, redis: "Redis", slots: Callable[[str], int]) -> None:
        self._redis = redis
        self._queue = Queue(redis)
        self._slots = slots

    async def __call__(self, streams: list[JobStream]) -> list[JobStream]:
        """Feeds what the streams have not seen; returns those that need another round."""
        pipe = self._redis.pipeline(transaction=False)
        seen = [stream.seen for stream in streams]
        models = list(dict.fromkeys(stream.model for stream in streams))
        for model in models:
            names = keys.model_keys(model)
            pipe.zcard(names.waiting("hi"))
            pipe.hget(names.stat, "service_ms")
            pipe.get(names.mode)
        for stream in streams:
            names = keys.model_keys(stream.model)
            pipe.xrange(names.log(stream.job_id), min=f"(0-{stream.seen}", count=PAGE)
            pipe.hmget(names.job(stream.job_id), list(FIELDS))
            pipe.zrank(names.waiting(stream.lane), stream.job_id)
        replies = await pipe.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, TRANSIENT):
                raise reply
        of_models, of_streams = replies[: 3 * len(models)], replies[3 * len(models) :]
        lines = {model: of_models[3 * i : 3 * i + 3] for i, model in enumerate(models)}
        again = []
        for i, stream in enumerate(streams):
            own = [*lines[stream.model], *of_streams[3 * i : 3 * i + 3]]
            error = next((reply for reply in own if isinstance(reply, RedisError)), None)
            if error is not None:  # asked again it would be the same, and keep the others waiting
                log.error("cannot read a job", job=stream.job_id, error=str(error))
                _diverge(stream)
                continue
            interactive, service_ms, mode, entries, record, rank = own
            state, n, reason, result, lane, keep_ms, done_ms = record
            found = _Found(
                entries,
                state.decode() if state else None,
                int(n or 0),
                (reason or b"").decode(),
                result,
                lane.decode() if lane else None,
                rank,
                int(keep_ms or 0),
                number(done_ms),
            )
            try:
                self._set_place(stream, found, interactive, number(service_ms), mode == b"paused")
                if await self._feed(stream, found, seen[i]):
                    again.append(stream)
            except (AttributeError, KeyError, TypeError, ValueError):  # somebody else wrote into its record or log
                log.exception("a job's record or log is damaged", job=stream.job_id)
                _diverge(stream)
        return again

    async def _feed(self, stream: JobStream, found: _Found, seen: int) -> bool:
        if found.state is None:
            return await self._submit_again(stream)
        if found.state in TERMINAL_STATES and len(found.entries) == PAGE:
            await self._keep(stream, found.keep_ms)
        if found.state not in TERMINAL_STATES and found.n < seen and stream.submission is not None:
            return await self._put_back(stream, found)
        for entry_id, fields in found.entries:
            delta = entry_to_delta(entry_id, fields)
            if not stream.feed(delta):
                return await self._go_round(stream, delta)
        end = _end(found)
        if end is not None:
            stream.over = True
            if stream.is_beyond(end):
                return await self._took_another_course(stream) if stream.seen > stream.start else _refuse(stream)
        if end is not None and not stream.feed(end):  # its last tokens came between the reads, or are on the next page
            stream.short_reads = 0 if found.entries else stream.short_reads + 1
            return stream.short_reads < MAX_SHORT_READS or _diverge(stream)
        return len(found.entries) == PAGE and not stream.ended

    def _set_place(
        self, stream: JobStream, found: _Found, interactive: int, service_ms: int | None, paused: bool
    ) -> None:
        stream.lane = found.lane or stream.lane
        if found.rank is None or stream.seen > stream.start:
            stream.place = stream.eta_s = None
            return
        stream.place = position(stream.lane, found.rank, interactive)
        stream.eta_s = eta_s(stream.place, service_ms, self._slots(stream.model), paused=paused)

    async def _submit_again(self, stream: JobStream) -> bool:
        """The record is gone: Redis lost it. The same job goes on behind the tokens that its client has."""
        submission = stream.submission
        if submission is not None and stream.submitted < MAX_SUBMISSIONS and not stream.over:
            stream.submitted += 1
            log.warning("job lost by redis, submitted again", job=stream.job_id, tokens=stream.seen)
            try:
                await blobs.store(self._redis, stream.model, submission.blobs, submission.terms.images_s)
                accepted = await self._queue.enqueue(submission.job, submission.terms, stream.entries() or ())
            except FastchatQError as error:  # others were faster and filled the queue
                log.warning("not accepted again", job=stream.job_id, error=error.message)
            else:
                if accepted.job_id == stream.job_id:
                    return True
        stream.give_up("lost", "the job record is gone")
        return False

    async def _keep(self, stream: JobStream, keep_ms: int) -> None:
        """The job has ended, and its reader is pages behind: its time to live begins anew."""
        names = keys.model_keys(stream.model)
        pipe = self._redis.pipeline(transaction=False)
        for name in (names.job(stream.job_id), names.log(stream.job_id)):
            pipe.pexpire(name, keep_ms)
        await pipe.execute()

    async def _put_back(self, stream: JobStream, found: _Found) -> bool:
        """The log has fewer tokens than its client: a failover lost them."""
        logged = await read(self._redis, stream.model, stream.job_id)
        lost = stream.entries(logged)
        if lost is None:  # written on meanwhile
            return await self._go_round(stream)
        if not lost:  # it is whole again
            return False
        have = logged[-1].n if logged else 0
        log.warning("log rolled back, tokens put back", job=stream.job_id, logged=have, tokens=stream.seen)
        await self._queue.restore(stream.model, stream.job_id, have, lost)
        return True

    async def _go_round(self, stream: JobStream, delta: Delta | None = None) -> bool:
        """The log was rolled back and has been written on meanwhile: in other pieces, but the same tokens?

        Args:
            delta: the entry that does not begin behind what the stream has.
        """
        if stream.submission is not None:
            rest = stream.ahead(await read(self._redis, stream.model, stream.job_id))
            if rest is not None:
                for behind in rest:
                    stream.feed(behind)
                return True
        elif delta is not None and delta.n - delta.k < stream.seen == stream.start:  # the reader says that it has it
            return _refuse(stream)
        return await self._took_another_course(stream)

    async def _took_another_course(self, stream: JobStream) -> bool:
        """Its reader has tokens that are not those of the log, under ids that nobody is to go on behind."""
        await self._queue.restore(stream.model, stream.job_id, stream.seen)
        return _diverge(stream)


def _diverge(stream: JobStream) -> bool:
    log.error("stream cannot be continued", job=stream.job_id, tokens=stream.seen)
    error = JobFailedError(
        "The queue lost tokens that you have received, and the answer took another course. Send the request again.",
        code="stream_diverged",
    )
    stream.give_up("failed", "diverged", error)
    return False


def _refuse(stream: JobStream) -> bool:
    error = InvalidRequestError(
        f"There is no going on behind the event id {stream.start}: it is none that an event of this job has had. Read "
        "the job from its beginning, without Last-Event-ID.",
        code=INVALID_EVENT_ID,
    )
    stream.give_up("failed", INVALID_EVENT_ID, error)
    return False


def _end(found: _Found) -> End | None:
    """The terminal event that a job record stands for, if it has ended."""
    if found.state not in TERMINAL_STATES or found.state is None:
        return None
    decoded = Result.from_dict(orjson.loads(found.result)) if found.result else None
    return End(found.n, found.state, found.reason, decoded, found.ended_ms)
