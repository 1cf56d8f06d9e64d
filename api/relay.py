"""Brings workers' events to the requests that wait for them: one subscription for the process, the logs behind it.

The channel is a hint. What it loses (a gap, the tail, a reconnect) is read from the token log; a stream that is silent
is looked after once a second. A request that leaves before its end cancels its job.
"""

import asyncio
import contextlib
from collections.abc import Iterable

import orjson
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from fastchat_q import keys
from fastchat_q.connection import TRANSIENT
from fastchat_q.events import TERMINAL_STATES, Delta, End, Event, Result, parse_line
from fastchat_q.jobs import Job
from fastchat_q.loops import AWAY, RECONNECT_S, check_cancelled, every, listen
from fastchat_q.queue import Queue
from fastchat_q.settings import Settings
from fastchat_q.tokens import entry_to_delta

log = structlog.get_logger()

CHECK_S = 1.0
"""Period of the look after silent streams, and how long a stream must be silent for it."""
SUBMIT_S = 10.0
"""A job that is not accepted by then is refused with 503."""
CHECK_BATCH = 256
"""Silent streams asked for in one round trip."""


class JobStream:
    """The events of one job, in order and each once, for one reader."""

    def __init__(self, job: Job, now: float) -> None:
        self.job = job
        self.seen = 0
        """Tokens received so far."""
        self.accepted = False
        """ENQUEUE has returned: from now on a missing job record means that Redis lost it."""
        self.ended = False
        self.place: int | None = None
        """Place in the queue, from 1; None: not waiting, or not known yet."""
        self.heard = now
        self.takes = 0
        """How often the reader has come for events."""
        self.reader: asyncio.Task[object] | None = None
        """The task that writes to the client, which a stalled client keeps waiting."""
        self.stalled = False
        self.waiting_s, self.takes_before = 0.0, 0
        self._events: list[Event] = []
        self._some = asyncio.Event()

    def feed(self, event: Event) -> bool:
        """Takes an event in, from the channel or the log. False: tokens before it are missing, read the log."""
        if self.ended:
            return True
        if isinstance(event, Delta):
            if event.n <= self.seen:
                return True
            if event.n - event.k != self.seen:
                return False
            self.seen = event.n
        else:
            if event.n > self.seen:
                return False
            self.ended = True
        self.place = None
        self._events.append(event)
        self._some.set()
        return True

    async def take(self, timeout_s: float | None = None) -> list[Event]:
        """All events that are there; waits for the first, at the most ``timeout_s`` (then the list is empty)."""
        self.takes += 1
        if not self._events:
            self._some.clear()
            if timeout_s is None:  # the hot path: a timeout costs as much as the rest of this function
                await self._some.wait()
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        await self._some.wait()
        events, self._events = self._events, []
        return events

    @property
    def backlog(self) -> int:
        """Events that the reader has not taken yet."""
        return len(self._events)

    def watch(self, period_s: float, limit_s: float) -> None:
        """Called every ``period_s``: gives a reader up that took nothing for ``limit_s`` while events wait for it."""
        moved = self.takes != self.takes_before or not self.backlog
        self.takes_before = self.takes
        self.waiting_s = 0.0 if moved else self.waiting_s + period_s
        if self.waiting_s >= limit_s and self.reader is not None and not self.stalled:
            self.stalled = True
            self.reader.cancel()

    async def collect(self) -> tuple[list[Event], End]:
        """Everything, once the job has ended."""
        events: list[Event] = []
        while True:
            events += await self.take()
            if isinstance(last := events[-1], End):
                return events, last


class Relay:
    """Submits jobs and routes their events. `run` must be running."""

    def __init__(self, redis: "Redis", blocking: "Redis", api_id: str, settings: Settings) -> None:
        self._redis, self._blocking = redis, blocking
        self._queue = Queue(redis)
        self._inbox = keys.inbox(api_id)
        self._settings = settings
        self._streams: dict[str, JobStream] = {}
        self._behind: dict[str, JobStream] = {}
        self._some_behind = asyncio.Event()
        self._left: asyncio.Queue[Job] = asyncio.Queue()

    async def submit(self, job: Job) -> JobStream:
        """Enqueues a job and returns its stream; whoever calls this also calls `leave`.

        Raises:
            QueueFullError: nothing was stored.
            redis.RedisError, TimeoutError: the server is away; if it took the job all the same, the job is cancelled
                when it is back.
        """
        stream = JobStream(job, self._now())
        self._streams[job.id] = stream  # before it is enqueued: tokens can be faster than the reply
        try:
            async with asyncio.timeout(SUBMIT_S):
                place = await self._queue.enqueue(
                    job,
                    inbox=self._inbox,
                    deadline_s=self._settings.deadline_s,
                    max_waiting=self._settings.max_waiting,
                )
        except BaseException as error:
            del self._streams[job.id]
            if isinstance(error, (*AWAY, asyncio.CancelledError)):
                self._left.put_nowait(job)  # it may have been accepted: only the reply is missing
            raise
        stream.accepted = True
        if not stream.seen and not stream.ended:
            stream.place = place or None
        return stream

    def leave(self, stream: JobStream) -> None:
        """The reader is gone: forgets the stream, and cancels the job unless it has ended. Never blocks."""
        if self._streams.pop(stream.job.id, None) is not None and not stream.ended:
            self._left.put_nowait(stream.job)

    async def settled(self, timeout_s: float) -> None:
        """Returns when all jobs that were left are cancelled, or after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._left.join()
        except TimeoutError:
            log.warning("not all left jobs could be cancelled: they run to their end", jobs=self._left.qsize())

    async def run(self) -> None:
        """The relay's loops, for ever."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._listen())
            loops.create_task(self._catch_up_those_behind())
            loops.create_task(every(CHECK_S, self._check_silent, "silent streams"))
            loops.create_task(every(CHECK_S, self._watch_readers, "stalled clients"))
            loops.create_task(self._cancel_those_left())

    async def _listen(self) -> None:
        async for message in listen(self._blocking, self._inbox):
            if message is None:  # (re)subscribed: anything may have been missed
                self._fall_behind(self._streams.values())
                continue
            now = self._now()
            for line in message.split(b"\n"):
                try:
                    job_id, event = parse_line(line)
                except ValueError:
                    log.warning("foreign message on the inbox", channel=self._inbox)
                    continue
                stream = self._streams.get(job_id)
                if stream is not None:
                    stream.heard = now
                    if not stream.feed(event):
                        self._fall_behind([stream])

    def _fall_behind(self, streams: Iterable[JobStream]) -> None:
        for stream in streams:
            if stream.accepted:  # the others are looked after when they are, and silent
                self._behind[stream.job.id] = stream
        if self._behind:
            self._some_behind.set()

    async def _catch_up_those_behind(self) -> None:
        while True:
            check_cancelled()
            await self._some_behind.wait()
            self._some_behind.clear()
            behind = list(self._behind.values())
            self._behind.clear()
            try:
                for start in range(0, len(behind), CHECK_BATCH):
                    await self._catch_up(behind[start : start + CHECK_BATCH])
            except AWAY:
                await asyncio.sleep(RECONNECT_S)
                self._fall_behind(stream for stream in behind if stream.job.id in self._streams)

    async def _check_silent(self) -> None:
        now = self._now()
        silent = [s for s in self._streams.values() if s.accepted and not s.ended and now - s.heard >= CHECK_S]
        for start in range(0, len(silent), CHECK_BATCH):
            await self._catch_up(silent[start : start + CHECK_BATCH])

    async def _watch_readers(self) -> None:
        for stream in list(self._streams.values()):
            stream.watch(CHECK_S, self._settings.stalled_client_s)

    async def _catch_up(self, streams: list[JobStream]) -> None:
        """Reads record, log and place of some jobs in one round trip, and feeds what their streams have not seen."""
        pipe = self._redis.pipeline(transaction=False)
        for stream in streams:
            names, job = keys.model_keys(stream.job.model), stream.job
            pipe.xrange(names.log(job.id), min=f"(0-{stream.seen}")
            pipe.hmget(names.job(job.id), ["state", "n", "reason", "result"])
            pipe.zrank(names.waiting(job.lane), job.id)
            pipe.zcard(names.waiting("hi"))
        replies = await pipe.execute()
        for stream, at in zip(streams, range(0, len(replies), 4), strict=True):
            entries, record, rank, before = replies[at : at + 4]
            for entry_id, fields in entries:
                stream.feed(entry_to_delta(entry_id, fields))
            end = _end(record)
            if end is not None and not stream.feed(end):
                self._fall_behind([stream])  # its last tokens came between the reads
            if rank is not None and not stream.seen:
                stream.place = rank + 1 + (before if stream.job.lane == "lo" else 0)
            else:
                stream.place = None

    async def _cancel_those_left(self) -> None:
        while True:
            check_cancelled()
            job = await self._left.get()
            while True:
                try:
                    before = await self._queue.cancel(job.model, job.id, "client disconnected")
                    log.info("cancelled", job=job.id, model=job.model, state=before)
                    break
                except TRANSIENT:
                    check_cancelled()
                    await asyncio.sleep(RECONNECT_S)
                except RedisError:  # trying again would not help, and keep the others waiting
                    log.exception("cannot cancel", job=job.id, model=job.model)
                    break
            self._left.task_done()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _end(record: list[bytes | None]) -> End | None:
    """The terminal event that a job record stands for, if it has ended; a job without a record is lost."""
    state, n, reason, result = record
    if state is None:
        return End(0, "lost", "the job record is gone", None)
    if state.decode() not in TERMINAL_STATES:
        return None
    decoded = Result.from_dict(orjson.loads(result)) if result else None
    return End(int(n or 0), state.decode(), (reason or b"").decode(), decoded)
