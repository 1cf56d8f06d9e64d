"""The worker: takes a slot, then claims, then generates, then finishes. One loop a duty; nothing calls a worker."""

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.errors import FastchatQError, InvalidRequestError, JobFailedError
from fastchat_q.events import Result
from fastchat_q.jobs import Job
from fastchat_q.loops import AWAY, PreemptedError, every, listen, unless
from fastchat_q.queue import REAP_S, Claim, Queue
from fastchat_q.registry import HEARTBEAT_S, Registration, Registry, process_id
from fastchat_q.tokens import read

from .engines.base import Ended, Engine, Output, Request
from .publisher import Outcome, Publisher

log = structlog.get_logger()

RENEW_S = 3.0
IDLE_POLL_S = 1.0
"""How long an idle worker sleeps when no bell wakes it."""
RETRY_S = 0.5
ABANDONED_S = 15.0
"""A job whose API server is gone for so long is cancelled: nobody is left to read it."""
MAX_STEPS_AHEAD = 64
"""Steps whose outputs the event loop has not taken yet; then the engine waits, so that heartbeats get their turn."""


@dataclass(slots=True)
class Active:
    """A claimed job: one slot. ``n`` counts its tokens, those of earlier attempts included."""

    claim: Claim
    n: int
    since: float
    emitted: bool = False
    unheard_since: float | None = None
    """Since when nobody listens to its tokens."""

    @property
    def ticket(self) -> str:
        """The engine's name for this claim."""
        return f"{self.claim.job_id} {self.claim.fence}"


class Worker:
    """Serves one model from one engine.

    Args:
        redis: for commands.
        blocking: for blocking reads and subscriptions.
        engine: loaded, not started; its slots are the concurrency limit.
        drain_s: on stop, running jobs may go on this long; then they are handed back.
    """

    def __init__(self, redis: "Redis", blocking: "Redis", engine: Engine, drain_s: float) -> None:
        self.id = process_id("w")
        self._model = engine.card.name
        self._redis, self._blocking = redis, blocking
        self._queue, self._bells = Queue(redis), Queue(blocking)
        self._registry = Registry(redis)
        self._engine = engine
        self._drain_s = drain_s
        self._active: dict[str, Active] = {}
        self._ahead = threading.Semaphore(MAX_STEPS_AHEAD)
        self._slot_freed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._publisher = Publisher(redis, self._model, self._lost, self._sent)
        self._registration = Registration.of_this_process(self.id, engine.card, engine.slots)

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until ``stop`` is set, then drains.

        Raises:
            ExceptionGroup: a loop failed, or the engine died; the process should end.
        """
        loop = asyncio.get_running_loop()
        self._engine.start(
            sink=lambda outputs: self._hand_over(loop, outputs),
            on_death=lambda: _threadsafe(loop, self._stopping.set),
        )
        async with asyncio.TaskGroup() as duties:
            loops = [
                duties.create_task(self._publisher.run()),
                duties.create_task(every(HEARTBEAT_S, self._announce, "heartbeat")),
                duties.create_task(every(RENEW_S, self._renew, "renew")),
                duties.create_task(every(REAP_S, self._reap, "reap")),
                duties.create_task(every(REAP_S, self._cancel_abandoned, "abandoned jobs")),
                duties.create_task(self._follow_hints()),
                duties.create_task(_forward(stop, self._stopping)),
            ]
            log.info("serving", worker=self.id, model=self._model, slots=self._engine.slots)
            await self._claim_until_stopped()
            if self._engine.failure is None:
                await self._drain()
            for task in loops:
                task.cancel()
        if self._engine.failure is not None:
            raise RuntimeError("the engine died") from self._engine.failure
        await asyncio.to_thread(self._engine.stop)  # it may be waiting for this loop to take its outputs

    async def _claim_until_stopped(self) -> None:
        while not self._stopping.is_set():
            free = self._engine.slots - len(self._active)
            try:
                if free <= 0:
                    self._slot_freed.clear()
                    await self._or_stopping(self._slot_freed.wait())
                    continue
                claims = await self._queue.claim(self._model, self.id, free=free, nonce=secrets.token_hex(4))
                for claim in claims:
                    self._take(claim)
                for claim in claims:
                    await self._begin(claim)
                if len(claims) < free:
                    await self._or_stopping(self._bells.wait(self._model, IDLE_POLL_S))
            except AWAY as error:
                log.warning("claim failed, trying again", error=str(error))
                await asyncio.sleep(RETRY_S)

    def _take(self, claim: Claim) -> None:
        before = self._active.get(claim.job_id)
        if before is not None:  # lost without our noticing, and ours again
            self._lost(before.claim)
        self._active[claim.job_id] = Active(claim, claim.n, time.monotonic())

    async def _begin(self, claim: Claim) -> None:
        """Hands a claimed job to the engine, with the tokens that an earlier attempt logged."""
        active = self._active.get(claim.job_id)
        if active is None or active.claim is not claim:
            return  # cancelled while those before it were begun
        try:
            job = Job.from_spec(claim.spec)
            prior: tuple[int, ...] = ()
            if claim.n:
                deltas = await read(self._redis, self._model, claim.job_id)
                prior = tuple(token for delta in deltas for token in delta.ids)
                if len(prior) != claim.n:
                    raise JobFailedError(
                        f"The token log holds {len(prior)} of {claim.n} tokens.", code="log_incomplete"
                    )
                log.info("resuming", job=claim.job_id, attempt=claim.attempt, tokens=claim.n)
        except FastchatQError as error:
            self._end(active, (), "", Ended(error=error))
        except AWAY as error:  # it cannot be begun now: its lease runs out, and it is claimed anew
            log.warning("could not read the log", job=claim.job_id, error=str(error))
            self._lost(claim)
        else:
            self._engine.submit(Request(job, active.ticket, prior))

    def _hand_over(self, loop: asyncio.AbstractEventLoop, outputs: list[Output]) -> None:
        """On the engine's thread: passes a step's outputs on, and waits when the loop is far behind."""
        self._ahead.acquire()
        _threadsafe(loop, self._on_outputs, outputs)

    def _on_outputs(self, outputs: list[Output]) -> None:
        self._ahead.release()
        for output in outputs:
            active = self._active.get(output.ticket.partition(" ")[0])
            if active is None or active.ticket != output.ticket:
                continue  # cancelled or lost meanwhile, and perhaps claimed anew
            active.n += len(output.ids)
            if output.ended is not None:
                self._end(active, output.ids, output.text, output.ended)
            else:
                urgent, active.emitted = not active.emitted, True
                self._publisher.add(active.claim, active.n, output.ids, output.text, None, urgent)

    def _end(self, active: Active, ids: tuple[int, ...], text: str, ended: Ended) -> None:
        if ended.error is not None:
            reason = ended.error.code or ended.error.type
            outcome = Outcome(False, reason, Result.from_error(ended.error))
            if not isinstance(ended.error, InvalidRequestError):
                log.error("failed", job=active.claim.job_id, error=str(ended.error))
        else:
            reason = ended.finish_reason or "stop"
            outcome = Outcome(True, reason, Result(finish_reason=ended.finish_reason, usage=ended.usage))
        self._publisher.add(active.claim, active.n, ids, text, outcome, urgent=True)
        took = round(time.monotonic() - active.since, 3)
        log.info("done", job=active.claim.job_id, model=self._model, tokens=active.n, seconds=took, reason=reason)
        self._free(active.claim.job_id)

    def _free(self, job_id: str) -> None:
        self._active.pop(job_id, None)
        self._slot_freed.set()

    def _lost(self, claim: Claim) -> None:
        """The job is cancelled, or somebody else's by now: stop at once and say nothing more of it."""
        active = self._active.get(claim.job_id)
        if active is not None and active.claim is claim:
            log.info("dropped", job=claim.job_id, tokens=active.n)
            self._publisher.forget(claim)
            self._engine.cancel(active.ticket)
            self._free(claim.job_id)

    def _sent(self, claim: Claim, heard: bool) -> None:
        active = self._active.get(claim.job_id)
        if active is not None and active.claim is claim:
            active.unheard_since = None if heard else active.unheard_since or time.monotonic()

    async def _cancel_abandoned(self) -> None:
        for active in list(self._active.values()):
            if active.unheard_since is not None and time.monotonic() - active.unheard_since > ABANDONED_S:
                log.info("abandoned", job=active.claim.job_id, tokens=active.n)
                await self._queue.cancel(self._model, active.claim.job_id, "its API server is gone")
                self._lost(active.claim)

    async def _follow_hints(self) -> None:
        async for hint in listen(self._blocking, keys.worker_channel(self.id)):
            verb, _, job_id = (hint or b"").decode().partition(" ")
            active = self._active.get(job_id)
            if verb == "cancel" and active is not None:
                self._lost(active.claim)

    async def _announce(self) -> None:
        await self._registry.announce(self._registration.at(len(self._active), self._stopping.is_set()))

    async def _renew(self) -> None:
        if self._active:
            for claim in await self._queue.renew(self._model, [a.claim for a in self._active.values()]):
                self._lost(claim)

    async def _reap(self) -> None:
        reaped = await self._queue.reap(self._model)
        if reaped.handed_back or reaped.dead or reaped.expired:
            log.info("reaped", handed_back=reaped.handed_back, dead=reaped.dead, expired=reaped.expired)

    async def _drain(self) -> None:
        """Lets running jobs end within the limit, then hands the rest back with their tokens."""
        log.info("draining", worker=self.id, running=len(self._active), seconds=self._drain_s)
        try:
            async with asyncio.timeout(self._drain_s):
                await self._announce()
                while self._active:
                    self._slot_freed.clear()
                    await self._slot_freed.wait()
                await self._publisher.flushed()
        except (TimeoutError, *AWAY):
            log.warning("handing back", jobs=len(self._active))
        try:
            async with asyncio.timeout(5.0):
                left = list(self._active.values())
                for active in left:
                    self._engine.cancel(active.ticket)
                    self._free(active.claim.job_id)
                await self._publisher.flushed()
                if left:
                    await self._queue.release(self._model, [active.claim for active in left])
                await self._registry.withdraw(self.id)
        except (TimeoutError, *AWAY) as error:
            log.warning("could not hand back: the leases will run out", error=str(error))

    async def _or_stopping(self, awaitable: Awaitable[object]) -> None:
        """Waits for ``awaitable`` or for the worker to stop, whichever comes first."""
        with contextlib.suppress(PreemptedError):
            await unless(self._stopping.wait(), awaitable)


async def _forward(source: asyncio.Event, target: asyncio.Event) -> None:
    await source.wait()
    target.set()


def _threadsafe(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """call_soon_threadsafe that tolerates a loop which closed while the engine finished its step."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise
