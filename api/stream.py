"""The events of one job for one reader: in order, each once, and never more than a bounded number waiting.

A reader that is slower than the job gets its events from the token log, page by page, as it comes for them: what does
not fit here is dropped, and fetched when there is room.
"""

import asyncio
import contextlib
import io
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastchat_q.errors import FastchatQError
from fastchat_q.events import Delta, End, Event, Piece, Result, Usage, encode_payload
from fastchat_q.jobs import Job
from fastchat_q.queue import LogEntry, Terms

from .parts import is_inside
from .render import ENDING_IDS

INVALID_EVENT_ID = "invalid_event_id"
"""Code of the error that answers an id which cannot be continued behind."""
MAX_BACKLOG = 256
"""Events that wait for the reader at the most."""


class EventId(NamedTuple):
    """Of the m-th event that the entry makes which brings the tokens to n, as ``n.m``: where an entry can make more
    events than it has tokens, and an event depends on all those before. Elsewhere an id is a count of tokens.
    """

    n: int
    m: int


@dataclass(frozen=True, slots=True)
class Submission:
    """What is needed to submit a job once more, if Redis loses it."""

    job: Job
    terms: Terms
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    """Its images, by digest."""


class JobStream:
    """One reader's view of a job.

    Args:
        model: served name, or its slug.
        after: tokens that the reader has already.
        submission: of a job that this process has submitted; None for one that is only followed.
        now: of the event loop's clock.
        drained: called when the reader has taken everything and more is in the log.
    """

    def __init__(
        self,
        model: str,
        job_id: str,
        after: int,
        submission: Submission | None,
        now: float,
        drained: Callable[["JobStream"], None],
    ) -> None:
        self.model, self.job_id, self.submission = model, job_id, submission
        self.start = self.seen = after
        """Tokens received so far, those before ``start`` included."""
        self.view = b""
        """What the job record says of how its answer looks, for a job that is only followed."""
        self.accepted = False
        """The queue has the job: from now on a missing record means that Redis lost it."""
        self.ended = False
        self.over = False
        """The job has ended, though its end may not be read yet."""
        self.lane: str = submission.job.lane if submission else "hi"
        self.place: int | None = None
        """Place in the queue, from 1; None: not waiting, or not known yet."""
        self.eta_s: float | None = None
        """Estimated seconds until it is served."""
        self.usage: Usage | None = None
        """What the job used, once it has ended."""
        self.heard = now
        self.full = False
        """Events were dropped because the reader is slow; they are in the log."""
        self.submitted = 1
        self.short_reads = 0
        """How often in a row the log of the ended job lacked tokens."""
        self.reader: asyncio.Task[object] | None = None
        """The task that writes to the client, which a stalled client keeps waiting."""
        self.stalled = False
        self._takes = self._takes_before = 0
        self._waiting_s = 0.0
        self._events: list[Event] = []
        self._some = asyncio.Event()
        self._drained = drained
        self._ids = array("Q")
        self._text = io.StringIO()
        self._marks = array("Q")  # (n, tokens, characters) at the end of each event
        self._rich: dict[int, bytes] = {}  # by n, what is more than ids and text

    def feed(self, event: Event) -> bool:
        """Takes an event in, from the channel or the log. False: it does not follow what was there, read the log."""
        if self.ended or self.full:
            return True
        if len(self._events) >= MAX_BACKLOG:
            self.full = True
            return True
        if isinstance(event, Delta):
            if event.n <= self.seen:
                return True
            if event.n - event.k != self.seen and not (self.seen == self.start and is_inside(event, self.seen)):
                return False
            self.seen = event.n
            if self.submission is not None:
                self._ids.extend(event.ids)
                self._text.write(event.said)
                self._marks.extend((event.n, len(self._ids), self._text.tell()))
                if not event.is_plain:
                    self._rich[event.n] = encode_payload(event.pieces)
        else:
            if event.n > self.seen or self.is_beyond(event):
                return False
            self.over = True
            self.usage = event.result.usage if event.result else None
            self._end(event)
            return True
        self.place = None
        self._events.append(event)
        self._some.set()
        return True

    def give_up(self, state: str, reason: str, error: FastchatQError | None = None) -> None:
        """Ends it for its reader, with an error; the job may go on."""
        if not self.ended:
            self._end(End(self.seen, state, reason, Result.from_error(error) if error else None))

    def is_beyond(self, end: End) -> bool:
        """The job succeeded with fewer tokens than its reader has, or says that it has."""
        last_id = end.n if self.seen > self.start else end.n + ENDING_IDS
        return end.state == "succeeded" and self.seen > last_id

    async def take(self, timeout_s: float | None = None) -> list[Event]:
        """All events that are there; waits for the first, at the most ``timeout_s`` (then the list is empty)."""
        self._takes += 1
        if not self._events:
            if self.full:
                self.full = False
                self._drained(self)
            self._some.clear()
            if timeout_s is None:  # the hot path: a timeout costs as much as the rest of this function
                await self._some.wait()
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        await self._some.wait()
        events, self._events = self._events, []
        return events

    async def collect(self) -> tuple[list[Event], End]:
        """Everything, once the job has ended."""
        events: list[Event] = []
        while True:
            events += await self.take()
            if isinstance(last := events[-1], End):
                return events, last

    @property
    def backlog(self) -> int:
        """Events that the reader has not taken yet."""
        return len(self._events)

    def entries(self, logged: Sequence[Delta] = ()) -> list[LogEntry] | None:
        """What was received behind ``logged``, as the log had it; None if it was something else.

        In the same pieces: a client that comes back with the id of any of its events gets the exact rest.
        """
        mine, said = tuple(self._ids), self._text.getvalue()
        ids, text = _flat(logged)
        if mine[: len(ids)] != ids or not said.startswith(text):
            return None
        found: list[LogEntry] = []
        at, have, read = logged[-1].n if logged else 0, len(ids), len(text)
        for n, count, length in zip(self._marks[::3], self._marks[1::3], self._marks[2::3], strict=True):
            if n > at:
                payload = self._rich.get(n) or encode_payload([Piece(mine[have:count], said[read:length])])
                found.append((n, n - at, payload))
                at, have, read = n, count, max(length, read)
        return found

    def ahead(self, logged: Sequence[Delta]) -> Sequence[Delta] | None:
        """What the whole log has beyond what was received; None if they differ."""
        mine, said = tuple(self._ids), self._text.getvalue()
        ids, text = _flat(logged)
        if ids[: len(mine)] != mine or not text.startswith(said):
            return None
        behind = [delta for delta in logged if delta.n > self.seen]
        if not behind or behind[0].n - behind[0].k == self.seen:
            return behind
        if not all(delta.is_plain for delta in logged):  # an event that the reader has in part cannot be cut
            return None
        rest = ids[len(mine) :]
        return [Delta(len(ids), len(rest), (Piece(rest, text[len(said) :]),))]

    def watch(self, period_s: float, limit_s: float) -> None:
        """Called every ``period_s``: gives a reader up that took nothing for ``limit_s`` while events wait for it."""
        moved = self._takes != self._takes_before or not self.backlog
        self._takes_before = self._takes
        self._waiting_s = 0.0 if moved else self._waiting_s + period_s
        if self._waiting_s >= limit_s and self.reader is not None and not self.stalled:
            self.stalled = True
            self.reader.cancel()

    def _end(self, end: End) -> None:
        self.ended = True
        self.place = None
        self._events.append(end)
        self._some.set()


def _flat(deltas: Sequence[Delta]) -> tuple[tuple[int, ...], str]:
    """All ids and all that is said, whatever the entries they are in."""
    return tuple([token for delta in deltas for token in delta.ids]), "".join([delta.said for delta in deltas])
