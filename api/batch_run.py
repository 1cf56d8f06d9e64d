"""Drives a batch whose input is good: keeps a window of its lines in the queue, and writes what they came to.

All that it holds is the window and the segment to come. It may be killed at any point: the last segment says which
lines have no answer yet, and a line that is enqueued again finds its own job.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from fastchat_q import blobs, keys
from fastchat_q.abilities import check_can_do
from fastchat_q.batches import Batch, Batches
from fastchat_q.errors import FastchatQError, JobFailedError
from fastchat_q.events import Delta, End
from fastchat_q.files import Files, object_key
from fastchat_q.jobs import Job
from fastchat_q.ledger import Ledger, Outcome
from fastchat_q.loops import AWAY, check_cancelled
from fastchat_q.queue import Accepted, Queue, Terms
from fastchat_q.registry import Registry
from fastchat_q.settings import Settings
from fastchat_q.storage import AlreadyExistsError, MissingObjectError

from . import answers
from .admission import resolve
from .batch_jobs import cancel_jobs, discard, ended_jobs, existing
from .batch_lines import (
    Lines,
    RawLine,
    answer_line,
    as_batch_job,
    asked,
    envelope,
    error_line,
    expired_line,
    job_id,
    lines_at,
    max_line,
)
from .catalog import Catalog
from .limits import Limits
from .media import Images
from .remote_images import Fetcher
from .render import View

log = structlog.get_logger()

COMMIT_LINES = 1000
COMMIT_BYTES = 8 * 1024 * 1024
COMMIT_S = 1.0
MAX_COMMIT_S = 15.0
COMMIT_PART = 60
"""A segment is written when it has so many lines or bytes, or is so old: a second at first, and a sixtieth of the age
of the batch later on, so that one which takes a day has thousands of segments, not a hundred thousand. Until then the
answers are in the queue, which loses them no sooner than anything else."""
ENQUEUE_AT_A_TIME = 64
FETCH_AT_A_TIME = 16
"""Lines with images from elsewhere that are prepared side by side."""
REFUSED_S = 1.0
"""A queue that took nothing is left alone for so long."""
NO_MEMORY = "Redis is full (maxmemory): it takes nothing new until jobs have ended, or it is given more."
ADOPT_AT_A_TIME = 256
LOOK_S = 1.0
"""Lease, cancellation and the share of the window are looked at this often."""
MIN_POLL_S, BUSY_POLL_S, MAX_POLL_S = 0.02, 0.2, 0.5
A_POLL = 32
"""Answers are looked for as often as it takes to find so many, between the bounds; the last of them is for idleness."""
CANCEL_GRACE_S = 10
"""Running jobs of a cancelled batch may end within this time."""
BLOB_TTL_S = 3600.0
"""Images of a line are kept so long; every tick stores those of lines without an answer anew."""
PART_LOST = "part_lost"


class SupersededError(Exception):
    """Somebody else drives this batch, or has ended it."""


@dataclass(slots=True)
class Flight:
    """A line in the queue."""

    line: RawLine
    """Without its bytes."""
    custom_id: str
    model: str
    view: View


@dataclass(frozen=True, slots=True)
class Prepared:
    """A line on its way into the queue."""

    line: RawLine
    flight: Flight
    job: Job
    terms: Terms
    images: Images | None
    """Not yet fetched, nor stored."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What driving batches takes."""

    redis: "Redis"
    queue: Queue
    catalog: Catalog
    batches: Batches
    files: Files
    settings: Settings
    fetcher: Fetcher | None = None
    clock: Callable[[], float] = time.time


class Run:
    """One tick's work on one batch."""

    def __init__(self, tools: Tools, batch: Batch, nonce: str) -> None:
        self._redis, self._queue, self._catalog, self._batches = tools.redis, tools.queue, tools.catalog, tools.batches
        self._settings, self._fetcher, self._clock, self._nonce = tools.settings, tools.fetcher, tools.clock, nonce
        self._limits = Limits(tools.redis)
        self.batch = batch
        self._id, self._endpoint = batch.manifest.id, batch.manifest.endpoint
        self._caller = batch.manifest.who()
        self._ledger = Ledger(self._batches.storage, self._id)
        self._key = object_key(batch.manifest.input_file_id)
        head = batch.head
        self._lines = Lines(self._batches.storage, self._key, max_line(self._settings), head.line, head.offset)
        self._flights: dict[str, Flight] = {}
        self._bytes = 0
        self._again: list[RawLine] = []
        """Lines that are to be enqueued before further ones are read."""
        self._output: list[bytes] = []
        self._errors: list[bytes] = []
        self._answered: list[tuple[str, str]] = []
        """Model and id of jobs whose answers are in the segment to come."""
        self._usage = [0, 0]
        self._segment_bytes = self._num_expired = 0
        self._segment_began = self._looked = time.monotonic()
        self._window, self._window_bytes = 1, 1
        self._trouble = batch.trouble
        self._stopping = False
        """Nothing goes into the queue any more."""
        self._input_gone = False
        self._refused_until = 0.0

    async def run(self, until: float) -> bool:
        """Works until that time (time.monotonic); whether all is done, and the ledger closed.

        Raises:
            SupersededError: another process is further.
        """
        try:
            return await self._work(until)
        except MissingObjectError as error:
            if str(error) != self._key:
                raise
            return await self._give_up()

    async def _work(self, until: float) -> bool:
        await self._look()
        self._again = [line async for line in lines_at(self._batches.storage, self._key, self.batch.head.pending)]
        poll_s = MIN_POLL_S
        while True:
            check_cancelled()
            now = time.monotonic()
            if now - self._looked >= LOOK_S:
                await self._look()
            if self.batch.cancelling is not None:
                return await self._cancel()
            if self._clock() >= self.batch.manifest.expires_at:
                return await self._expire()
            some = min(A_POLL, max(self._window // 4, 1))
            moved = await self._fill()
            moved += await self._collect()
            if not self._flights and not self._again and self._lines.done:
                await self._commit(self._outcome())
                return True
            if now >= until:
                if self._answered:
                    await self._commit()
                return False
            if self._is_due(now):
                await self._commit()
            if moved >= ENQUEUE_AT_A_TIME:
                continue
            poll_s = (
                min(max(poll_s * some / moved, MIN_POLL_S), BUSY_POLL_S) if moved else min(poll_s * 1.5, MAX_POLL_S)
            )
            await asyncio.sleep(poll_s)

    async def _look(self) -> None:
        """Keeps the lease, and sees what became of the batch and its share of the window meanwhile."""
        self._looked = time.monotonic()
        if not await self._batches.keep(self._id, self._nonce):
            raise SupersededError
        num_open = max(len(await self._batches.open_ids()), 1)
        self._window = max(self._settings.batch_window // num_open, 1)
        self._window_bytes = self._settings.batch_window_bytes // num_open
        self.batch = replace(self.batch, trouble=self._trouble)
        if not await self._batches.show(self.batch):
            await self._reload()

    async def _reload(self) -> None:
        """What clients see is further than this: the batch was cancelled, or ended by somebody else."""
        found = await self._batches.load(self._id)
        if found.ended is not None or found.head.seq != self.batch.head.seq or found.head.closed:
            raise SupersededError
        self.batch = replace(self.batch, cancelling=found.cancelling)

    # What goes into the queue

    async def _fill(self) -> int:
        """Enqueues further lines, as far as the window goes; returns how many were taken, or answered at once."""
        if time.monotonic() < self._refused_until:
            return 0
        prepared: list[Prepared] = []
        num_answered = num_to_fetch = 0
        room = min(self._window - len(self._flights), ENQUEUE_AT_A_TIME)
        while len(prepared) + num_answered < room and num_to_fetch < FETCH_AT_A_TIME:
            if self._bytes >= self._window_bytes and (self._flights or prepared):
                break
            line = self._again.pop() if self._again else await self._lines.next()
            if line is None:
                break
            self._bytes += line.size
            one = await self._prepared(line)
            if one is None:
                num_answered += 1
            else:
                prepared.append(one)
                num_to_fetch += bool(one.images and one.images.named)
        return num_answered + (await self._enqueue(prepared) if prepared else 0)

    async def _prepared(self, line: RawLine) -> Prepared | None:
        """The job of a line, its images apart; None: the line is answered with an error at once."""
        found = envelope(line, self._endpoint)
        try:
            what = asked(line, found, self._endpoint, self._settings)
            job, view = as_batch_job(what, self._id, line.number, found.model)
            model = found.model
            if self._catalog.alias(model) is not None:
                model = await resolve(self._catalog, self._queue, self._caller.tenant, model, job.id)
                job, view = job.model_copy(update={"model": model}), replace(view, slug=keys.slug(model))
            card = self._catalog.card(model)
            if card is not None:
                check_can_do(card, job, what.spelt)
        except FastchatQError as error:
            self._bytes -= line.size
            self._fail(line.number, found.custom_id, "", error)
            return None
        left_s = max(self.batch.manifest.expires_at - self._clock(), 1.0)
        terms = Terms(
            tenant=self._caller.tenant,
            weight=self._caller.weight,
            max_queued=self._caller.max_queued or 0,
            max_parallel=self._caller.max_parallel or 0,
            max_waiting=self._settings.max_waiting,
            queue_deadline_s=left_s,
            deadline_s=left_s,
            keep_s=max(self._settings.result_ttl_s, left_s),
            detached=True,
            view=view.to_json(),
        )
        return Prepared(line, Flight(line._replace(raw=b""), found.custom_id, model, view), job, terms, what.images)

    async def _enqueue(self, prepared: Sequence[Prepared]) -> int:
        """Returns how many lines the queue took, or are answered by now; the others are to be tried again."""
        ready, refused = await self._with_images(prepared)
        try:
            outcomes: Sequence[Accepted | FastchatQError] = (
                await self._queue.enqueue_many([(one.job, one.terms) for one in ready]) if ready else ()
            )
        except OutOfMemoryError:  # those that were accepted find their jobs the next time
            refused, ready, outcomes = [*refused, *ready], [], ()
        self._trouble = NO_MEMORY if refused else ""
        for one, outcome in zip(ready, outcomes, strict=True):
            if isinstance(outcome, Accepted):
                self._flights[one.job.id] = one.flight
            else:
                refused.append(one)
                self._trouble = outcome.message
        for one in refused:
            self._again.append(one.line)
            self._bytes -= one.line.size
        if len(refused) == len(prepared):
            self._refused_until = time.monotonic() + REFUSED_S
        return len(prepared) - len(refused)

    async def _with_images(self, prepared: Sequence[Prepared]) -> tuple[list[Prepared], list[Prepared]]:
        """Lines whose images are where workers find them, and those for whose images Redis has no room."""
        ready, refused = [one for one in prepared if one.images is None], []
        some = [one for one in prepared if one.images is not None]
        for one, found in zip(
            some, await asyncio.gather(*map(self._store_images, some), return_exceptions=True), strict=True
        ):
            if isinstance(found, OutOfMemoryError):
                refused.append(one)
            elif isinstance(found, FastchatQError):
                self._bytes -= one.line.size
                self._fail(one.line.number, one.flight.custom_id, "", found)
            elif isinstance(found, BaseException):
                raise found
            else:
                ready.append(replace(one, job=found))
        return ready, refused

    async def _store_images(self, one: Prepared) -> Job:
        """Fetches and stores a line's images; returns its job with their digests."""
        job, images = one.job, one.images
        assert images is not None
        if self._fetcher is not None:
            job = await images.fetch(job, self._fetcher)
        await blobs.store(self._redis, job.model, images.blobs, BLOB_TTL_S)
        return job

    # What comes out of it

    async def _collect(self) -> int:
        """Takes the answers of jobs that have ended; returns how many."""
        ended = await ended_jobs(self._redis, self._jobs())
        for number, job in enumerate(ended):
            flight = self._flights.pop(job.job_id)
            self._bytes -= flight.line.size
            end = job.end
            lost = end is None or _lost_a_part(end)
            if end is not None and not lost and not (self._stopping and end.state == "cancelled"):
                self._take(flight, end, job.events)
            elif self._stopping:
                self._answered.append((flight.model, job.job_id))
                self._leave(flight)
            else:
                await discard(self._redis, [(flight.model, job.job_id)])
                await self._read_again(flight.line)
            if number % ENQUEUE_AT_A_TIME == ENQUEUE_AT_A_TIME - 1:
                await asyncio.sleep(0)
        return len(ended)

    def _take(self, flight: Flight, end: End, events: Sequence[Delta]) -> None:
        number, job_id = flight.line.number, flight.view.job_id
        if end.state != "dead":  # those an operator may want to look into
            self._answered.append((flight.model, job_id))
        answered_by = keys.public_job_id(flight.model, job_id)
        error = flight.view.failure(end)
        if end.state == "expired":
            self._expired(number, flight.custom_id)
        elif error is not None:
            self._fail(number, flight.custom_id, answered_by, error)
        else:
            try:
                body = answers.whole(flight.view, events, end)
            except Exception:
                log.exception("cannot render", batch=self._id, line=number)
                self._fail(number, flight.custom_id, answered_by, JobFailedError("The answer could not be rendered."))
                return
            if end.result is not None and end.result.usage is not None:
                self._usage[0] += end.result.usage.prompt_tokens
                self._usage[1] += end.result.usage.completion_tokens
            self._add(self._output, answer_line(self._id, number, flight.custom_id, answered_by, body))

    async def _read_again(self, line: RawLine) -> None:
        """Redis lost the job of a line."""
        place = (line.number, line.offset, line.size)
        self._again += [one async for one in lines_at(self._batches.storage, self._key, (place,))]

    def _fail(self, number: int, custom_id: str, answered_by: str, error: FastchatQError) -> None:
        self._add(self._errors, error_line(self._id, number, custom_id, answered_by, error))

    def _expired(self, number: int, custom_id: str) -> None:
        self._num_expired += 1
        self._add(self._errors, expired_line(self._id, number, custom_id))

    def _outcome(self) -> Outcome:
        """Of a batch whose last line has its answer."""
        return "expired" if self.batch.head.expired + self._num_expired else "completed"

    def _add(self, lines: list[bytes], line: bytes) -> None:
        lines.append(line)
        self._segment_bytes += len(line)

    # What is written

    def _is_due(self, now: float) -> bool:
        count = len(self._output) + len(self._errors)
        if not count:
            return False
        validated = self.batch.validated
        age_s = self._clock() - validated.at if validated else 0.0
        longest_s = min(max(COMMIT_S, age_s / COMMIT_PART), MAX_COMMIT_S)
        return count >= COMMIT_LINES or self._segment_bytes >= COMMIT_BYTES or now - self._segment_began >= longest_s

    async def _commit(self, closed: Outcome = "") -> None:
        """Writes the segment: from here on its lines are answered, and their jobs may go.

        Raises:
            SupersededError: somebody else wrote it.
        """
        head = self.batch.head
        flights = [flight.line for flight in self._flights.values()]
        places = sorted([(line.number, line.offset, line.size) for line in (*flights, *self._again)])
        output, errors = b"".join(self._output), b"".join(self._errors)
        after = replace(
            head,
            seq=head.seq + 1,
            completed=head.completed + len(self._output),
            failed=head.failed + len(self._errors),
            expired=head.expired + self._num_expired,
            line=self._lines.number,
            offset=self._lines.offset,
            pending=() if closed else tuple(places),
            prompt_tokens=head.prompt_tokens + self._usage[0],
            completion_tokens=head.completion_tokens + self._usage[1],
            closed=closed,
            closed_at=int(self._clock()) if closed else 0,
            output_bytes=len(output),
            error_bytes=len(errors),
        )
        try:
            await self._ledger.commit(after, output, errors)
        except AlreadyExistsError as error:
            raise SupersededError from error
        answered, self._answered = self._answered, []
        used, self._usage = sum(self._usage), [0, 0]
        self._output, self._errors, self._segment_bytes, self._num_expired = [], [], 0, 0
        self._segment_began = time.monotonic()
        self.batch = replace(self.batch, head=after, trouble=self._trouble)
        with contextlib.suppress(*AWAY):  # once at the most: who dies here has not charged
            await self._limits.charge(self._caller, used)
        await discard(self._redis, answered)
        if not await self._batches.show(self.batch):
            await self._reload()

    # How it stops early

    async def _cancel(self) -> bool:
        """What waits ends at once, what runs within `CANCEL_GRACE_S`; the rest stays without an answer."""
        assert self.batch.cancelling is not None
        over = float(self.batch.cancelling.at + CANCEL_GRACE_S)
        await self._adopt()
        await cancel_jobs(self._redis, self._jobs(), running=False)
        while await self._collect() or self._flights:
            check_cancelled()
            if self._clock() >= over:
                await cancel_jobs(self._redis, self._jobs(), running=True)
                over = float("inf")
            if time.monotonic() - self._looked >= LOOK_S:
                await self._look()
            await asyncio.sleep(MIN_POLL_S)
        await self._commit("cancelled")
        return True

    async def _expire(self) -> bool:
        """What has no answer yet gets an error line."""
        await self._adopt()
        await cancel_jobs(self._redis, self._jobs(), running=True)
        while self._flights:  # each of them has ended by now
            check_cancelled()
            await self._collect()
        while (line := await self._lines.next()) is not None:
            self._expired(line.number, envelope(line, self._endpoint).custom_id)
            if self._segment_bytes >= COMMIT_BYTES // 8:
                await self._commit()
                await self._look()
        await self._commit(self._outcome())
        return True

    async def _give_up(self) -> bool:
        """The input is gone, and with it what its lines asked for: the batch ends with the answers there are."""
        log.error("the input of a batch is gone", batch=self._id, file=self.batch.manifest.input_file_id)
        self._stopping = self._input_gone = True
        await self._end_orphans()
        await cancel_jobs(self._redis, self._jobs(), running=True)
        while self._flights:  # each of them has ended by now
            check_cancelled()
            await self._collect()
        await self._commit("cancelled" if self.batch.cancelling else "failed")
        return True

    async def _end_orphans(self) -> None:
        """Ends jobs that an earlier tick enqueued; their models are known from lines that cannot be read any more."""
        head = self.batch.head
        numbers: Sequence[int] = [number for number, _, _ in head.pending]
        following, models = head.line, await Registry(self._redis).known_models()
        while True:
            names = {job_id(self._id, number) for number in numbers} - self._flights.keys()
            pairs = [(model, name) for model in models for name in names]
            there = await existing(self._redis, pairs)
            jobs = {name: model for (model, name), is_there in zip(pairs, there, strict=True) if is_there}
            await cancel_jobs(self._redis, jobs, running=True)
            if following > head.line and not jobs:
                return
            numbers, following = range(following, following + ADOPT_AT_A_TIME), following + ADOPT_AT_A_TIME

    async def _adopt(self) -> None:
        """Takes over jobs that an earlier tick enqueued: their answers may be there.

        Those are the lines that its last segment names, and some behind it, as far as there are jobs of them.
        """
        self._stopping = True
        while True:
            named, flights = bool(self._again), []
            for _ in range(ADOPT_AT_A_TIME):
                line = self._again.pop() if self._again else None if named else await self._lines.next()
                if line is None:
                    break
                prepared = await self._prepared(line)
                if prepared is not None:
                    flights.append(prepared.flight)
            there = await existing(self._redis, [(flight.model, flight.view.job_id) for flight in flights])
            for flight, is_there in zip(flights, there, strict=True):
                if is_there:
                    self._flights[flight.view.job_id] = flight
                    self._bytes += flight.line.size
                else:
                    self._leave(flight)
            if not named and not any(there):
                return

    def _leave(self, flight: Flight) -> None:
        """A line that nothing was made of."""
        if self.batch.cancelling is None and not self._input_gone:
            self._expired(flight.line.number, flight.custom_id)

    def _jobs(self) -> dict[str, str]:
        return {job_id: flight.model for job_id, flight in self._flights.items()}


def _lost_a_part(end: End) -> bool:
    """Whether an image of the job was not there any more, because nobody drove the batch for so long."""
    error = end.result.error if end.result else None
    return bool(error and error.get("code") == PART_LOST)
