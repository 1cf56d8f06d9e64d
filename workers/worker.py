"""The worker: takes a slot, then claims, then generates, then finishes. One loop a duty; nothing calls a worker."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
from redis.exceptions import RedisError

from fastchat_q import keys
from fastchat_q.connection import TRANSIENT
from fastchat_q.errors import FastchatQError, InvalidRequestError, JobFailedError, RetryableError
from fastchat_q.events import Piece
from fastchat_q.loops import AWAY, PreemptedError, check_cancelled, every, listen, unless
from fastchat_q.queue import LEASE_MS, REAP_S, RECONCILE_S, Claim, Queue
from fastchat_q.registry import HEARTBEAT_S, ModelCard, Registration, Registry, process_id
from fastchat_q.sentinel import FOLLOW_S, follow_master

from .active import Active, Links
from .claimer import Claimer
from .engines.base import FEWER_AT_A_TIME, Ended, Engine, Output, Request
from .line import Line
from .publisher import Publisher
from .record import finish_of, read_request
from .slots import Slots
from .turns import Turns
from .watch import PERIOD_S, Watch

log = structlog.get_logger()

RENEW_S = 3.0
FENCE_S = LEASE_MS / 1000 - 1
"""A claim whose lease was not extended for so long is dropped before somebody else gets the job."""
ABANDONED_S = 15.0
"""A job whose API server is gone for so long is cancelled: nobody is left to read it."""
MAX_STEPS_AHEAD = 64
"""Steps whose outputs the event loop has not taken yet; then the engine waits, so that heartbeats get their turn."""
HAND_BACK_S = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker puts up with.

    Args:
        drain_s: on stop, running jobs may go on this long; then they are handed back.
        stall_s: a job that gets no token for so long is tried again.
        hung_s: an engine that makes no step for so long ends the process. None: as ``stall_s``.
        batch_reserve: the part of the slots that the batch lane may not hold.
        tenant_headroom: the part of the slots that a tenant leaves free to others that came lately.
    """

    drain_s: float = 30.0
    stall_s: float = 60.0
    hung_s: float | None = None
    batch_reserve: float = 0.25
    tenant_headroom: float = 0.125


class Worker:
    """Serves the models of one engine: they share its slots, and each has a queue.

    Args:
        links: clients of the queue's server.
        engine: loaded, not started; its slots are the concurrency limit.
        worker_id: None: made here.
        supervisor: pid of the process that starts this one again; 0: none.
    """

    def __init__(
        self, links: Links, engine: Engine, limits: Limits, worker_id: str | None = None, supervisor: int = 0
    ) -> None:
        self.id = worker_id or process_id("w")
        self._links = links
        self._registry = Registry(links.commands)
        self._engine = engine
        self._limits = limits
        self._slots = Slots(engine.slots, limits.batch_reserve, limits.tenant_headroom)
        self._watch = Watch(engine, limits.stall_s, limits.hung_s)
        self._active: dict[str, Active] = {}
        self._ahead = threading.Semaphore(MAX_STEPS_AHEAD)
        self._stopping, self._hurry = asyncio.Event(), asyncio.Event()
        cards = engine.cards
        self._registration = Registration.of_this_process(self.id, cards[0], engine.slots, supervisor, cards[1:])
        self._turns = Turns([card.name for card in cards], self._running)
        self._lines = [self._line(card) for card in cards]

    def stop(self) -> None:
        """Claims nothing more, lets running jobs end within the limit, and hands the rest back; again: at once."""
        (self._hurry if self._stopping.is_set() else self._stopping).set()

    async def run(self) -> None:
        """Serves until it is stopped, then drains.

        Raises:
            RuntimeError: the engine died; its cause is the engine's error. The process should end.
            ExceptionGroup: a loop failed; of an EngineHungError: the engine's thread cannot be ended.
        """
        loop = asyncio.get_running_loop()
        self._engine.start(
            sink=lambda outputs: self._hand_over(loop, outputs),
            on_death=lambda: _threadsafe(loop, self._stopping.set),
        )
        async with asyncio.TaskGroup() as duties:
            loops = [
                *(duties.create_task(line.publisher.run()) for line in self._lines),
                duties.create_task(every(HEARTBEAT_S, self._announce, "heartbeat")),
                duties.create_task(every(RENEW_S, self._renew, "renew")),
                duties.create_task(every(REAP_S, self._reap, "reap")),
                duties.create_task(every(RECONCILE_S, self._reconcile, "reconcile")),
                duties.create_task(every(REAP_S, self._cancel_abandoned, "abandoned jobs")),
                duties.create_task(every(FOLLOW_S, self._follow_master, "sentinel")),
                duties.create_task(self._keep_watch()),
                duties.create_task(self._follow_hints()),
            ]
            models = ",".join(line.model for line in self._lines)
            log.info("serving", worker=self.id, model=models, slots=self._engine.slots)
            async with asyncio.TaskGroup() as claiming:
                for line in self._lines:
                    claiming.create_task(line.claimer.run())
            if self._engine.failure is None:
                await self._drain()
            for task in loops:
                task.cancel()
        if self._engine.failure is not None:
            raise RuntimeError("the engine died") from self._engine.failure
        await asyncio.to_thread(self._engine.stop)  # it may be waiting for this loop to take its outputs

    def _line(self, card: ModelCard) -> Line:
        """Everything that is there once for each model."""
        links = self._links
        once = Queue(links.once)
        publisher = Publisher(
            links.once, card.name, self._lost, self._sent, on_refused=lambda why: line.claimer.doubt(why)
        )
        claimer = Claimer(
            once,
            Queue(links.blocking),
            card.name,
            self.id,
            self._slots,
            lambda: [active.claim.lane for active in self._active.values()],
            self._turns,
            known=lambda: self._active.keys() | publisher.job_ids(),
            ready=lambda: not (self._watch.slow or self._engine.trouble),
            begin=lambda claims, sent: self._begin_all(line, claims, sent),
            freed=asyncio.Event(),
            stopping=self._stopping,
        )
        line = Line(card, Queue(links.commands), once, claimer, publisher)
        return line

    def _running(self, model: str) -> int:
        return sum(active.line.model == model for active in self._active.values())

    async def _begin_all(self, line: Line, claims: list[Claim], sent: float) -> None:
        for claim in claims:
            self._take(line, claim, sent)
        for claim in claims:
            await self._begin(claim)

    def _take(self, line: Line, claim: Claim, sent: float) -> None:
        before = self._active.get(claim.job_id)
        if before is not None:  # lost without our noticing, and ours again
            self._lost(before.claim)
        self._active[claim.job_id] = Active(
            claim, line, claim.n, time.monotonic(), sent, self._watch.awake_s, self._engine.steps
        )

    async def _begin(self, claim: Claim) -> None:
        """Hands a claimed job to the engine, with the tokens that an earlier attempt logged."""
        active = self._active.get(claim.job_id)
        if active is None or active.claim is not claim:
            return  # cancelled while those before it were begun
        request: Request | None = None
        failure: FastchatQError | None = None
        try:
            request = await read_request(self._links.commands, active)
        except FastchatQError as error:
            failure = error
        except TRANSIENT as error:  # it cannot be begun now
            log.warning("could not read the job", job=claim.job_id, error=str(error))
        except (KeyError, TypeError, ValueError, RedisError) as error:  # somebody else wrote into its log, or over it
            failure = JobFailedError(f"The token log is damaged: {error!r}.", code="log_incomplete")
        if self._active.get(claim.job_id) is not active:
            return  # lost while it was read
        if failure is not None:
            self._end(active, (), Ended(error=failure))
        elif request is not None:
            self._engine.submit(request)
        else:  # it cannot be begun here and now: that is nobody's fault
            self._lost(claim)
            active.line.claimer.doubt("job not read")

    def _hand_over(self, loop: asyncio.AbstractEventLoop, outputs: list[Output]) -> None:
        """On the engine's thread: passes a step's outputs on, and waits when the loop is far behind."""
        self._ahead.acquire()
        _threadsafe(loop, self._on_outputs, outputs)

    def _on_outputs(self, outputs: list[Output]) -> None:
        self._ahead.release()
        running, refused = len(self._active), Counter[str]()
        for output in outputs:
            active = self._active.get(output.ticket.partition(" ")[0])
            if active is None or active.ticket != output.ticket:
                continue  # cancelled or lost meanwhile, and perhaps claimed anew
            for piece in output.pieces:
                active.n += piece.k
            if output.pieces:
                self._watch.given(active)
            if output.ended is not None:
                if output.ended.error is not None and output.ended.error.code in FEWER_AT_A_TIME:
                    refused[output.ended.error.code] += 1
                self._end(active, output.pieces, output.ended)
            else:
                urgent, active.emitted = not active.emitted, True
                active.line.publisher.add(active.claim, active.n, output.pieces, None, urgent)
        for code, count in refused.items():
            self._slots.shrink(running, count, time.monotonic(), FEWER_AT_A_TIME[code])
            log.warning("fewer jobs at a time from now on", reason=code, slots=self._slots.now)

    def _end(self, active: Active, pieces: tuple[Piece, ...], ended: Ended) -> None:
        finish = finish_of(active, ended)
        if ended.error is not None and not isinstance(ended.error, InvalidRequestError):
            log.error(finish.state, job=active.claim.job_id, error=str(ended.error))
        active.line.publisher.add(active.claim, active.n, pieces, finish, urgent=True)
        took = round(time.monotonic() - active.since, 3)
        log.info(
            "done",
            job=active.claim.job_id,
            model=active.line.model,
            tokens=active.n,
            seconds=took,
            reason=finish.reason,
        )
        self._free(active.claim.job_id)

    def _free(self, job_id: str) -> None:
        self._active.pop(job_id, None)
        for line in self._lines:
            line.claimer.freed.set()

    def _lost(self, claim: Claim) -> None:
        """The job is cancelled, or somebody else's by now: stop at once and say nothing more of it."""
        active = self._active.get(claim.job_id)
        if active is not None and active.claim is claim:
            log.info("dropped", job=claim.job_id, tokens=active.n)
            active.line.publisher.forget(claim)
            self._engine.cancel(active.ticket)
            self._free(claim.job_id)

    def _sent(self, claim: Claim, sent: float, heard: bool) -> None:
        active = self._active.get(claim.job_id)
        if active is not None and active.claim is claim:
            active.alive_at = max(active.alive_at, sent)
            active.unheard_since = None if heard else active.unheard_since or time.monotonic()

    async def _cancel_abandoned(self) -> None:
        for active in list(self._active.values()):
            if active.unheard_since is not None and time.monotonic() - active.unheard_since > ABANDONED_S:
                log.info("abandoned", job=active.claim.job_id, tokens=active.n)
                claim, line = active.claim, active.line
                state = await line.queue.cancel(line.model, claim.job_id, "its API server is gone", fence=claim.fence)
                if state == "heard":  # somebody came back between two tokens
                    active.unheard_since = None
                else:
                    self._lost(claim)

    async def _keep_watch(self) -> None:
        """Needs no Redis: it is what a worker does about itself while it cannot reach anybody.

        Raises:
            EngineHungError: see `Watch.check_engine`.
        """
        while True:
            self._watch.tick()
            self._fence()
            self._watch.check_engine()
            for active in [a for a in self._active.values() if self._watch.stalled(a)]:
                self._engine.cancel(active.ticket)
                stalled = RetryableError(f"The job got no token for {self._limits.stall_s:g} s.", code="stalled")
                self._end(active, (), Ended(error=stalled))
            self._slots.grow(time.monotonic())
            await asyncio.sleep(PERIOD_S)

    def _fence(self) -> None:
        """Drops what may be somebody else's by now, though nobody could tell us."""
        for active in list(self._active.values()):
            if time.monotonic() - active.alive_at > FENCE_S:
                log.warning("lease not extended in time", job=active.claim.job_id)
                self._lost(active.claim)
                active.line.claimer.doubt("lease not extended in time")

    async def _follow_hints(self) -> None:
        async for hint in listen(self._links.blocking, keys.worker_channel(self.id)):
            verb, _, job_id = (hint or b"").decode(errors="replace").partition(" ")
            active = self._active.get(job_id)
            if verb == "cancel" and active is not None:
                self._lost(active.claim)

    async def _announce(self) -> None:
        at = self._registration.at(len(self._active), self._slots.now, self._stopping.is_set())
        await self._registry.announce(replace(at, reason=self._engine.trouble))

    async def _renew(self) -> None:
        """Not for an engine that hangs: its jobs go to somebody else."""
        if self._watch.silent:
            return
        await asyncio.gather(*(self._renew_line(line) for line in self._lines))  # each in time, whatever the others do

    async def _renew_line(self, line: Line) -> None:
        sent, claims = time.monotonic(), self._claims(line)
        for claim in await line.renew(claims) if claims else ():
            self._lost(claim)
        for claim in claims:
            active = self._active.get(claim.job_id)
            if active is not None and active.claim is claim:
                active.alive_at = max(active.alive_at, sent)

    def _claims(self, line: Line) -> list[Claim]:
        return [active.claim for active in self._active.values() if active.line is line]

    async def _follow_master(self) -> None:
        links = self._links
        await follow_master(links.commands, links.once, links.blocking)

    async def _reap(self) -> None:
        for line in self._lines:
            await line.reap()

    async def _reconcile(self) -> None:
        for line in self._lines:
            await line.reconcile()

    async def _drain(self) -> None:
        """Lets running jobs end within the limit, then hands the rest back with their tokens."""
        log.info("draining", worker=self.id, running=len(self._active), seconds=self._limits.drain_s)
        try:
            async with asyncio.timeout(self._limits.drain_s):
                await unless(self._hurry.wait(), self._all_ended())
        except (TimeoutError, PreemptedError, *AWAY):
            log.warning("handing back", jobs=len(self._active))
        try:
            async with asyncio.timeout(HAND_BACK_S):
                left = {line: self._claims(line) for line in self._lines}
                for active in list(self._active.values()):
                    self._engine.cancel(active.ticket)
                    self._free(active.claim.job_id)
                await asyncio.gather(*(line.hand_back(claims) for line, claims in left.items()))
                await self._registry.withdraw(self.id)
        except (TimeoutError, *AWAY) as error:
            log.warning("could not hand back: the leases will run out", error=str(error))

    async def _all_ended(self) -> None:
        await self._announce()
        check_cancelled()
        freed = self._lines[0].claimer.freed
        while self._active:
            freed.clear()
            await freed.wait()
        for line in self._lines:
            await line.publisher.flushed()


def _threadsafe(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """call_soon_threadsafe that tolerates a loop which closed while the engine finished its step."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise
