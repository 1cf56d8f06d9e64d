"""``fastchat-q worker --on-demand``: loads a model when a job for it comes, and unloads it when none comes any more.

Each loaded model is an ordinary worker in a process of its own, so that unloading gives all of its memory back, and the
crash of one leaves the others alone. This process looks at the queues, starts and drains those, and says in the
registry which models it would load. It decides by what the queues hold, and keeps nothing that a restart would lose.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import structlog
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.errors import JobFailedError, LoadFailedError
from fastchat_q.events import TERMINAL_STATES, Result
from fastchat_q.loops import AWAY, check_cancelled, every
from fastchat_q.queue import Finish, Queue
from fastchat_q.registry import Registration, Registry, State
from fastchat_q.sentinel import FOLLOW_S, follow_master
from fastchat_q.tokens import append

from .engine_process import LOOK_S, EngineProcess, Supervised
from .parent import Stop, run_with_redis

log = structlog.get_logger()

WATCH_S = 0.5
"""How often it looks at the queues."""
LOADING_TTL_MS = 15_000
"""How long nobody else loads a model after the last sign of life of who does."""
LOAD_BACKOFF_S = (5.0, 15.0, 60.0, 300.0)
"""A model that could not be loaded is left alone for so long."""
CRASH_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
KILLED_TRIES = 2
"""A load that a signal ended may have been bad luck: it is tried so often before jobs are refused."""
STABLE_S = 30.0
"""A model that was served for so long starts over at the shortest backoff."""
OVERFLOW_S = 5.0
"""A model that others serve with all their slots taken is loaded here too when jobs have waited for so long."""
REFUSED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Policy:
    """When models come and go.

    Args:
        keep_alive_s: a model that had nothing to do for so long is unloaded; infinity: never.
        max_loaded: models at a time.
        turn_s: how long a model that always has something to do keeps its place while another one waits for it.
    """

    keep_alive_s: float = 300.0
    max_loaded: int = 1
    turn_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What a queue holds at a moment."""

    live: int
    running: int
    delayed: int
    paused: bool
    ended: int
    """Jobs that ended, ever."""

    @property
    def waiting(self) -> int:
        """Jobs that a worker could begin now."""
        return 0 if self.paused else max(self.live - self.running - self.delayed, 0)

    @property
    def busy(self) -> bool:
        """Whether unloading the model would keep a job waiting."""
        return self.running + self.waiting > 0


@dataclass(slots=True, eq=False)
class Offer:
    """A model that may be loaded. All times are of time.monotonic."""

    engine: Supervised
    seen: Seen | None = None
    used_at: float = -math.inf
    """When it last had something to do."""
    waiting_since: float | None = None
    """Since when a job waits for it while it is not loaded."""
    served_since: float = 0.0
    failures: int = 0
    """Runs in a row that ended early."""
    retry_at: float = 0.0
    refuses: bool = False
    """It cannot be loaded: jobs that wait for it are told so."""
    unloading: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def model(self) -> str:
        """Its served name."""
        return self.engine.engine.card.name

    @property
    def state(self) -> State:
        """As the registry says."""
        return "serving" if self.engine.serving else self.engine.registration.state

    @property
    def in_memory(self) -> bool:
        """Whether it takes the room of a loaded model."""
        return self.state in ("loading", "serving", "draining")

    def said(self, state: State, reason: str = "") -> None:
        """What the registry is told from now on."""
        self.engine.registration = replace(
            self.engine.registration, state=state, reason=reason, retry_in_s=0, progress=0.0, phase=""
        )


def run(engines: Sequence[EngineProcess], policy: Policy, redis_url: str) -> None:
    """Serves models on demand until SIGTERM or SIGINT. No two of them have the same name."""
    run_with_redis(redis_url, lambda redis: OnDemand(engines, policy, redis).run())


class OnDemand:
    """The supervisor of several models' processes, of which few run at a time."""

    def __init__(self, engines: Sequence[EngineProcess], policy: Policy, redis: "Redis") -> None:
        self._policy = policy
        self._redis, self._queue, self._registry = redis, Queue(redis), Registry(redis)
        self._stop = Stop()
        self._group: asyncio.TaskGroup
        self._offers: list[Offer] = []
        for engine in engines:
            self._offers.append(self._offer(engine))

    def stop(self) -> None:
        """As SIGTERM."""
        self._stop.asked.set()

    async def run(self) -> int:
        """Runs until it is told to stop; returns the exit code."""
        self._stop.listen()
        async with asyncio.TaskGroup() as self._group:
            loops = [
                self._group.create_task(every(LOOK_S, self._speak, "registry")),
                self._group.create_task(every(WATCH_S, self._watch, "queues")),
                self._group.create_task(every(FOLLOW_S, lambda: follow_master(self._redis), "sentinel")),
            ]
            log.info("on demand", models=[offer.model for offer in self._offers], max_loaded=self._policy.max_loaded)
            await self._stop.asked.wait()
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            await asyncio.gather(*(self._end(offer) for offer in self._offers))
        return 0

    def _offer(self, engine: EngineProcess) -> Offer:
        def on_exit(code: int, reason: str) -> bool:
            if offer.state == "draining":
                return False  # it was about to be asked
            self._failed(offer, code, reason)
            return True

        offer = Offer(Supervised(engine, self._redis, on_exit, on_demand=True))
        return offer

    async def _end(self, offer: Offer) -> None:
        if offer.unloading is not None:
            await offer.unloading
        await offer.engine.stop(self._stop.hurry)
        await self._yield_load(offer)
        await offer.engine.say_goodbye()

    async def _speak(self) -> None:
        now = time.monotonic()
        for offer in self._offers:
            was_serving = offer.engine.serving
            if offer.state == "crashed":
                left = max(math.ceil(offer.retry_at - now), 0)
                offer.engine.registration = replace(offer.engine.registration, retry_in_s=left)
                if not left:
                    offer.said("idle", offer.engine.registration.reason)
            await offer.engine.speak()
            if offer.engine.serving and not was_serving:
                offer.served_since = offer.used_at = now
                log.info("loaded", model=offer.model)
                await self._yield_load(offer)

    async def _watch(self) -> None:
        """One look at the queues, and what follows from it."""
        now = time.monotonic()
        await self._look(now)
        for offer in self._offers:
            refuses = offer.refuses and offer.state == "crashed" and offer.seen is not None and offer.seen.waiting
            if refuses and not await self._elsewhere(offer):
                await self._refuse(offer)
            if offer.engine.serving and now - offer.served_since > STABLE_S:
                offer.failures = 0
            if offer.state == "loading" and not offer.engine.stuck:
                await self._redis.pexpire(keys.model_keys(offer.model).load, LOADING_TTL_MS)
            if offer.engine.serving and now - offer.used_at > self._policy.keep_alive_s:
                self._unload(offer, "nothing to do")
        waiting = [o for o in self._offers if o.waiting_since is not None and o.state == "idle" and o.retry_at <= now]
        for offer in sorted(waiting, key=lambda o: o.waiting_since or 0.0):
            await self._find_room(offer, now)

    async def _look(self, now: float) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for offer in self._offers:
            names = keys.model_keys(offer.model)
            pipe.zcard(names.live)
            pipe.zcard(names.lease)
            pipe.zcard(names.delay)
            pipe.get(names.mode)
            pipe.hmget(names.stat, sorted(TERMINAL_STATES))
        replies = await pipe.execute()
        for offer, start in zip(self._offers, range(0, len(replies), 5), strict=True):
            live, running, delayed, mode, ended = replies[start : start + 5]
            before = offer.seen
            seen = offer.seen = Seen(live, running, delayed, mode == b"paused", sum(int(n or 0) for n in ended))
            if seen.busy or (before is not None and seen.ended != before.ended):
                offer.used_at = now
            if offer.in_memory or not seen.waiting:
                offer.waiting_since = None
            elif offer.waiting_since is None:
                offer.waiting_since = now

    async def _find_room(self, offer: Offer, now: float) -> None:
        """Loads the model, or sees to it that it can be loaded soon."""
        others = await self._others(offer)
        serving = [other for other in others if other.state == "serving"]
        loading = any(other.state == "loading" and not other.on_demand and not other.reason for other in others)
        if loading or any(other.running < other.slots for other in serving):
            return
        overflow = bool(serving)
        if overflow and now - (offer.waiting_since or now) < OVERFLOW_S:
            return
        loaded = [other for other in self._offers if other.in_memory]
        if len(loaded) < self._policy.max_loaded:
            await self._load(offer)
        elif not overflow and not any(other.state == "draining" for other in loaded):
            self._make_room(loaded, now)

    def _make_room(self, loaded: list[Offer], now: float) -> None:
        """Unloads the model that was used the longest ago; one that has something to do only after its turn."""
        serving = sorted((other for other in loaded if other.engine.serving), key=lambda other: other.used_at)
        idle = [other for other in serving if other.seen is None or not other.seen.busy]
        had_its_turn = [other for other in serving if now - other.served_since > self._policy.turn_s]
        if victim := next(iter((*idle, *had_its_turn)), None):
            self._unload(victim, "another model needs its room")

    async def _load(self, offer: Offer) -> None:
        name, own = keys.model_keys(offer.model).load, offer.engine.registration.worker_id
        if not await self._redis.set(name, own, nx=True, px=LOADING_TTL_MS):
            return  # another worker loads it
        log.info("loading", model=offer.model, waiting=offer.seen.waiting if offer.seen else 0)
        offer.said("loading")
        offer.waiting_since, offer.refuses = None, False
        offer.engine.start(self._group)
        await offer.engine.announce()

    async def _yield_load(self, offer: Offer) -> None:
        """Others may load it, or need not wait for us."""
        name = keys.model_keys(offer.model).load
        try:
            if await self._redis.get(name) == offer.engine.registration.worker_id.encode():
                await self._redis.delete(name)  # between the two it may have run out: then two load it, no worse
        except AWAY as error:
            log.warning("could not give the load up: it will run out", error=str(error))

    def _unload(self, offer: Offer, why: str) -> None:
        log.info("unloading", model=offer.model, why=why)
        offer.said("draining")
        offer.engine.serving = False
        offer.unloading = self._group.create_task(self._drain(offer))

    async def _drain(self, offer: Offer) -> None:
        try:
            await offer.engine.announce()
        except AWAY as error:
            log.warning("redis is away", error=str(error))
        await offer.engine.stop(self._stop.hurry)
        offer.said("idle")
        log.info("unloaded", model=offer.model)
        try:
            await offer.engine.announce()
        except AWAY as error:
            log.warning("redis is away", error=str(error))

    def _failed(self, offer: Offer, code: int, reason: str) -> None:
        """A run ended by itself. One that served is loaded again for jobs that wait; one that did not may never be."""
        offer.failures += 1
        if offer.engine.serving:
            backoff = CRASH_BACKOFF_S[min(offer.failures, len(CRASH_BACKOFF_S)) - 1]
        elif code < 0 and not offer.engine.stuck and offer.failures < KILLED_TRIES:
            backoff = CRASH_BACKOFF_S[0]
        else:
            backoff, offer.refuses = LOAD_BACKOFF_S[min(offer.failures, len(LOAD_BACKOFF_S)) - 1], True
        offer.retry_at = time.monotonic() + backoff
        log.error("not served any more", model=offer.model, reason=reason, tried_again_in_s=backoff)
        self._group.create_task(self._yield_load(offer))

    async def _refuse(self, offer: Offer) -> None:
        """Ends the jobs that wait for a model which cannot be loaded: an answer now, and not one that never comes."""
        registration = offer.engine.registration
        left_s = max(math.ceil(offer.retry_at - time.monotonic()), 0)
        told = LoadFailedError(offer.model, registration.reason, left_s)
        error = JobFailedError(told.message, status=told.status, code=told.code, param="model")
        while True:
            check_cancelled()
            lanes = [(lane, REFUSED_AT_ONCE) for lane in keys.LANES]
            taken = await self._queue.claim(
                offer.model, registration.worker_id, running=0, lanes=lanes, nonce=secrets.token_hex(4)
            )
            if not taken.claims:
                return
            ends = [Finish(c, c.n, "failed", told.code or "", Result.from_error(error)) for c in taken.claims]
            await append(self._redis, offer.model, (), ends)
            log.warning("refused", model=offer.model, jobs=len(ends), reason=registration.reason)

    async def _elsewhere(self, offer: Offer) -> bool:
        """Whether somebody else serves the model, or would."""
        return any(other.serves or other.expects_jobs for other in await self._others(offer))

    async def _others(self, offer: Offer) -> list[Registration]:
        own = offer.engine.registration
        return [
            entry
            for entry in await self._registry.workers()
            if entry.card.name == offer.model and (entry.host, entry.supervisor) != (own.host, own.pid)
        ]
