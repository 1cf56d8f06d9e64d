"""Brings workers' events to the requests that wait for them: one subscription for the process, the logs behind it.

The channel is a hint. What it loses (a gap, the tail, a reconnect) is read from the token log; a stream that is silent
is looked after once a second, and so is one whose reader is slow.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import structlog
from redis.asyncio import Redis

from fastchat_q import blobs, keys
from fastchat_q.errors import InvalidRequestError, JobNotFoundError
from fastchat_q.events import parse_line
from fastchat_q.jobs import Job
from fastchat_q.loops import AWAY, RECONNECT_S, check_cancelled, every, listen
from fastchat_q.queue import Queue, Terms
from fastchat_q.settings import Settings

from .catchup import CatchUp
from .departures import Departures
from .stream import INVALID_EVENT_ID, JobStream, Submission

log = structlog.get_logger()

CHECK_S = 1.0
"""Period of the look after silent streams, and how long a stream must be silent for it."""
SUBMIT_S = 10.0
"""A job that is not accepted by then is refused with 503."""
CHECK_BATCH = 256
"""Streams looked after in one round trip."""


class Relay:
    """Submits jobs and routes their events. `run` must be running."""

    def __init__(
        self, redis: "Redis", blocking: "Redis", api_id: str, settings: Settings, slots: Callable[[str], int]
    ) -> None:
        self._redis = redis
        self._blocking = blocking
        self._queue = Queue(redis)
        self._inbox = keys.inbox(api_id)
        self._settings = settings
        self._streams: dict[str, list[JobStream]] = {}
        self._behind: dict[JobStream, None] = {}
        self._some_behind = asyncio.Event()
        self._catch_up = CatchUp(redis, slots)
        self._departures = Departures(self._queue, self._inbox, self._streams.__contains__)

    async def submit(self, job: Job, terms: Terms, images: Mapping[str, bytes] = MappingProxyType({})) -> JobStream:
        """Enqueues a job and returns its stream; whoever calls this also calls `leave`.

        With an idempotency key that was seen before, the stream is that of the earlier job, from its beginning.

        Args:
            images: of the job, by digest.

        Raises:
            QueueFullError, QueueDrainingError, IdempotencyConflictError: nothing was stored.
            redis.RedisError, TimeoutError: the server is away; if it took the job all the same, the job is cancelled
                when it is back.
        """
        terms = replace(terms, inbox=self._inbox)
        stream = self._open(
            job.model, job.id, 0, Submission(job, terms, images)
        )  # first: tokens can be faster than the reply
        try:
            async with asyncio.timeout(SUBMIT_S):
                await blobs.store(self._redis, job.model, images, terms.images_s)
                accepted = await self._queue.enqueue(job, terms)
                if accepted.job_id != job.id:
                    self._close(stream)
                    stream = self._open(job.model, accepted.job_id, 0, None)
                    await self._attach(stream, terms.tenant, 0)
                    return stream
        except BaseException as error:
            self._close(stream)
            if isinstance(error, (*AWAY, asyncio.CancelledError)):
                self._departures.refused(job.model, job.id)  # it may have been accepted: only the reply is missing
            raise
        stream.accepted = True
        if not stream.seen and not stream.ended:
            stream.place = accepted.place or None
        return stream

    async def follow(
        self, model: str, job_id: str, after: int, tenant: str | None, *, whole: bool = False, in_events: bool = False
    ) -> JobStream:
        """The stream of a job, behind its first ``after`` tokens; whoever calls this also calls `leave`.

        Args:
            after: tokens that the reader has, or events, where these are counted otherwise.
            tenant: whose job it must be; None: anybody's.
            whole: the stream begins with the first token all the same.
            in_events: ``after`` counts events, of which an entry of the log may make several or none.

        Raises:
            JobNotFoundError: there is no such job, or it is somebody else's.
            InvalidRequestError: its tokens are not those any more that the reader has.
            redis.RedisError, TimeoutError: the server is away.
        """
        stream = self._open(model, job_id, 0 if whole else after, None)
        try:
            async with asyncio.timeout(SUBMIT_S):
                await self._attach(stream, tenant, after, in_events=in_events)
        except BaseException:
            self._close(stream)
            raise
        return stream

    def leave(self, stream: JobStream, grace_s: float) -> None:
        """The reader is gone. After ``grace_s`` the job is cancelled, unless it has ended or somebody reads it."""
        is_read = any(other.accepted for other in self._streams.get(stream.job_id, ()) if other is not stream)
        if self._close(stream) and not stream.over and not is_read:
            self._departures.after(grace_s, stream.model, stream.job_id)

    async def settled(self, timeout_s: float) -> None:
        """Returns when all jobs that were left at once are cancelled, or after ``timeout_s``.

        Clients within their grace may come back to another server; if none does, the workers notice.
        """
        await self._departures.settled(timeout_s)

    async def run(self) -> None:
        """The relay's loops, for ever."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._listen())
            loops.create_task(self._catch_up_those_behind())
            loops.create_task(every(CHECK_S, self._check_silent, "silent streams"))
            loops.create_task(every(CHECK_S, self._watch_readers, "stalled clients"))
            loops.create_task(self._departures.run())

    def _open(self, model: str, job_id: str, after: int, submission: Submission | None) -> JobStream:
        stream = JobStream(model, job_id, after, submission, self._now(), lambda s: self._fall_behind([s]))
        self._streams.setdefault(job_id, []).append(stream)
        return stream

    def _close(self, stream: JobStream) -> bool:
        streams = self._streams.get(stream.job_id, [])
        if stream not in streams:
            return False
        streams.remove(stream)
        if not streams:
            del self._streams[stream.job_id]
        return True

    async def _attach(self, stream: JobStream, tenant: str | None, after: int, *, in_events: bool = False) -> None:
        """From now on its events come here; those before are in the log. ``after``: what its reader has."""
        attached = await self._queue.attach(
            stream.model, stream.job_id, self._inbox, tenant, after, in_events=in_events
        )
        if attached is None:
            raise JobNotFoundError(keys.public_job_id(stream.model, stream.job_id))
        if attached.void:
            raise InvalidRequestError(
                "The job was started over, or its answer took another course, since it had the event with this id. "
                "Read it from its beginning, without Last-Event-ID.",
                code=INVALID_EVENT_ID,
            )
        stream.view = attached.view
        stream.accepted = True
        self._departures.called_off(stream.job_id)
        self._fall_behind([stream])

    async def _listen(self) -> None:
        async for message in listen(self._blocking, self._inbox):
            if message is None:  # (re)subscribed: anything may have been missed
                self._fall_behind(self._all())
                continue
            now = self._now()
            for line in message.split(b"\n") if message else ():  # empty: somebody asks whether we listen
                try:
                    job_id, event = parse_line(line)
                except ValueError:
                    log.warning("foreign message on the inbox", channel=self._inbox)
                    continue
                for stream in self._streams.get(job_id, ()):
                    stream.heard = now
                    if not stream.feed(event):
                        self._fall_behind([stream])

    def _fall_behind(self, streams: Iterable[JobStream]) -> None:
        for stream in streams:
            if stream.accepted and not stream.full:  # else looked after when silent, or when its reader comes
                self._behind[stream] = None
        if self._behind:
            self._some_behind.set()

    async def _catch_up_those_behind(self) -> None:
        while True:
            check_cancelled()
            await self._some_behind.wait()
            self._some_behind.clear()
            behind = list(self._behind)
            self._behind.clear()
            try:
                await self._catch_up_all(behind)
            except AWAY:
                await asyncio.sleep(RECONNECT_S)
                self._fall_behind(stream for stream in behind if stream.job_id in self._streams)

    async def _check_silent(self) -> None:
        now = self._now()
        await self._catch_up_all(
            [s for s in self._all() if s.accepted and not s.ended and not s.full and now - s.heard >= CHECK_S]
        )

    async def _catch_up_all(self, streams: list[JobStream]) -> None:
        for start in range(0, len(streams), CHECK_BATCH):
            self._fall_behind(await self._catch_up(streams[start : start + CHECK_BATCH]))

    async def _watch_readers(self) -> None:
        for stream in self._all():
            stream.watch(CHECK_S, self._settings.stalled_client_s)

    def _all(self) -> list[JobStream]:
        return [stream for streams in self._streams.values() for stream in streams]

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
