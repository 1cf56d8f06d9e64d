"""Sends an engine's outputs to the queue: one EMIT a window for all jobs, first tokens and ends at once."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from fastchat_q.connection import TRANSIENT
from fastchat_q.errors import JobFailedError
from fastchat_q.events import Piece, Result, merged
from fastchat_q.loops import check_cancelled
from fastchat_q.queue import Claim, Finish
from fastchat_q.tokens import Chunk, Status, append

log = structlog.get_logger()

WINDOW_S = 0.02
"""Tokens of one job that come within this time share an event: at 50 events a second no reader sees a difference."""
WINDOW_A_JOB_S = 0.0006
MAX_WINDOW_S = 0.04
"""With many jobs the window is longer: an event costs worker, Redis and API together about 0.15 ms, which is then spent
at most a quarter of the time; until this longest window, at 25 events a second."""
RETRY_S = 0.2


@dataclass(slots=True)
class _Pending:
    claim: Claim
    n: int
    pieces: list[Piece]
    finish: Finish | None
    urgent: bool = False


class Publisher:
    """Never more than one call under way; what comes meanwhile goes into the next one.

    What is urgent (a first token, an end) goes without the rest, which keeps its window: with many streams something is
    urgent at nearly every step, and would take a token of each of them along.

    ``on_lost`` is told of claims that are no longer ours: cancelled, or taken over by somebody else.
    ``on_sent`` is told of each chunk that was taken: when the call was sent that extended the lease (time.monotonic),
    and whether anybody was listening.
    ``on_refused`` is told that claims were dropped which are still ours: somebody has to hand them back.
    ``redis`` should not resend by itself: what is forgotten meanwhile would be sent again.
    """

    def __init__(
        self,
        redis: "Redis",
        model: str,
        on_lost: Callable[[Claim], None],
        on_sent: Callable[[Claim, float, bool], None],
        on_refused: Callable[[str], None],
    ) -> None:
        self._redis = redis
        self._model = model
        self._on_lost, self._on_sent, self._on_refused = on_lost, on_sent, on_refused
        self._pending: dict[str, _Pending] = {}
        self._sending: list[_Pending] = []
        self._some = asyncio.Event()
        self._urgent = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, claim: Claim, n: int, pieces: Sequence[Piece], finish: Finish | None, urgent: bool) -> None:
        """Queues pieces that bring the job to ``n``, and its end if it came."""
        pending = self._pending.get(claim.job_id)
        if pending is None or pending.claim is not claim:  # what is left of an earlier claim of this job is void
            pending = self._pending[claim.job_id] = _Pending(claim, n, list(pieces), finish)
        else:
            pending.n, pending.finish = n, finish
            pending.pieces += pieces
        self._some.set()
        self._idle.clear()
        if urgent or finish is not None:
            pending.urgent = True
            self._urgent.set()

    def forget(self, claim: Claim) -> None:
        """Drops what is not sent yet of a claim, and sends nothing of it again."""
        pending = self._pending.get(claim.job_id)
        if pending is not None and pending.claim is claim:
            del self._pending[claim.job_id]
        self._sending = [p for p in self._sending if p.claim is not claim]

    def job_ids(self) -> set[str]:
        """Jobs of which something is not known to have arrived."""
        return self._pending.keys() | {p.claim.job_id for p in self._sending}

    async def flushed(self) -> None:
        """Returns when everything has been sent."""
        await self._idle.wait()

    async def run(self) -> None:
        """The loop; ends only by cancellation."""
        loop = asyncio.get_running_loop()
        last, window_s = 0.0, WINDOW_S
        while True:
            check_cancelled()
            await self._some.wait()
            rest = last + window_s - loop.time()
            if rest > 0 and not self._urgent.is_set():
                await self._wait_urgent(rest)
            all_of_it = not self._urgent.is_set() or loop.time() - last >= window_s
            self._urgent.clear()
            pending = self._pending
            self._pending = {} if all_of_it else {i: p for i, p in pending.items() if not p.urgent}
            self._sending = [p for i, p in pending.items() if i not in self._pending]
            if not self._pending:
                self._some.clear()
            if self._sending:
                if all_of_it:
                    last = loop.time()
                    window_s = min(MAX_WINDOW_S, max(WINDOW_S, WINDOW_A_JOB_S * len(self._sending)))
                await self._deliver()
                self._sending = []
            if not self._pending:
                self._idle.set()

    async def _wait_urgent(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._urgent.wait()

    async def _deliver(self) -> None:
        """Sends a batch until Redis took it: a repeated call finds its own tokens and adds none."""
        first = time.monotonic()
        while True:
            check_cancelled()
            chunks = [Chunk(p.claim, p.n, merged(p.pieces)) for p in self._sending if p.pieces]
            finishes = [p.finish for p in self._sending if p.finish is not None]
            sent = time.monotonic()
            try:
                answer = await append(self._redis, self._model, chunks, finishes)
                break
            except TRANSIENT as error:
                log.warning("emit failed, trying again", jobs=len(self._sending), error=str(error))
                await asyncio.sleep(RETRY_S)
            except RedisError:
                log.exception("emit refused", jobs=[p.claim.job_id for p in self._sending])
                for p in self._sending:
                    self._on_lost(p.claim)
                self._on_refused("tokens refused")
                return
        for chunk, status in zip(chunks, answer.chunks, strict=True):
            if status is Status.GAP:
                log.error("tokens missing in the log", job=chunk.claim.job_id, n=chunk.n)
                self._on_refused("tokens missing in the log")
            if status in (Status.LOST, Status.GAP):
                self._lost(chunk.claim)
            elif status is Status.DAMAGED:
                self._give_up(chunk)
            else:  # a duplicate is an earlier call of this loop, whose reply was lost
                self._on_sent(chunk.claim, first if status is Status.DUPLICATE else sent, status is not Status.UNHEARD)
        for finish, end in zip(finishes, answer.finishes, strict=True):
            if isinstance(end, RedisError):  # its lease runs out, for that is counted: no try without end
                log.error("end refused", job=finish.claim.job_id, error=str(end))
            elif end is Status.GAP and finish.claim.job_id not in self._pending:
                log.error("ended without all its tokens: it is claimed anew", job=finish.claim.job_id, n=finish.n)
                self._on_refused("ended without all its tokens")

    def _give_up(self, chunk: Chunk) -> None:
        """Ends a job whose log takes nothing more, here and now: another try could not write either."""
        claim, n = chunk.claim, chunk.n - chunk.k
        log.error("log or record damaged", job=claim.job_id, n=n)
        self._lost(claim)
        error = JobFailedError(f"The token log is damaged: it takes nothing behind token {n}.", code="log_incomplete")
        self.add(claim, n, (), Finish(claim, n, "failed", "log_incomplete", Result.from_error(error)), urgent=True)

    def _lost(self, claim: Claim) -> None:
        self.forget(claim)
        self._on_lost(claim)
