"""``fastchat-q worker``: a light process that keeps the engine's process running and speaks for it while it cannot.

It loads no model and imports no torch, so that what kills an engine (a segfault, the kernel's out-of-memory killer, a
hung device) leaves somebody who hands its jobs back at once, says why, and starts it again.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog
from redis.asyncio import Redis

from fastchat_q.connection import connect
from fastchat_q.loops import AWAY, check_cancelled, every
from fastchat_q.queue import LEASE_MS, Queue
from fastchat_q.registry import ModelCard, Registration, Registry, process_id
from fastchat_q.sentinel import FOLLOW_S, follow_master
from fastchat_q.supervisor import Child, PassedOn, how_it_ended

log = structlog.get_logger()

LOOK_S = 1.0
KILL_AFTER_S = 10.0
"""What a child may take on top of its draining: it hands its jobs back."""
RETRY_S = 0.2
FAREWELL_S = 2.0
"""When it stops, it does not wait longer than this for Redis."""
EXIT_CONFIGURATION = 2
SAYS_WHY = (signal.SIGABRT,)
"""Signals before which a process usually says what is wrong; of the others its last line tells nothing."""
PREFIX = "fastchat-q: "


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """How to start an engine's process.

    Args:
        command: the argv for a worker id.
        environment: added to this process's own.
        card: what is known of the model before it is loaded.
        drain_s: how long it may drain.
        stall_s: how long it may be without a heartbeat, once it serves.
    """

    command: Callable[[str], Sequence[str]]
    environment: Mapping[str, str]
    card: ModelCard
    slots: int
    drain_s: float
    stall_s: float


def run(engine: EngineProcess, redis_url: str) -> None:
    """Keeps it running until SIGTERM or SIGINT.

    Raises:
        SystemExit: code 2: its first start failed for a setting (its own message is on stderr).
    """
    code = asyncio.run(_run(engine, redis_url))
    if code:
        raise SystemExit(code)


async def _run(engine: EngineProcess, redis_url: str) -> int:
    redis = connect(redis_url)
    try:
        return await Parent(engine, redis).run()
    finally:
        await redis.aclose()


class Parent:
    """The supervisor of one engine's process. Each of its runs is a worker with an id of its own."""

    def __init__(self, engine: EngineProcess, redis: "Redis") -> None:
        self._engine = engine
        self._redis, self._queue, self._registry = redis, Queue(redis), Registry(redis)
        self._stopping, self._hurry = asyncio.Event(), asyncio.Event()
        self._child = Child("engine", self._command, PassedOn(), engine.environment, self._on_exit)
        self._worker_id = ""
        self._serving = False
        self._missed = 0
        self._exit_code = 0
        self._group: asyncio.TaskGroup
        own = Registration.of_this_process(process_id("s"), engine.card, engine.slots)
        self._registration = replace(own, state="loading", supervisor=own.pid)

    async def run(self) -> int:
        """Runs until it is told to stop; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        async with asyncio.TaskGroup() as self._group:
            self._child.start(self._group)
            loops = [
                self._group.create_task(every(LOOK_S, self._speak, "registry")),
                self._group.create_task(every(FOLLOW_S, lambda: follow_master(self._redis), "sentinel")),
            ]
            await self._stopping.wait()
            for task in loops:
                task.cancel()
            await self._stop_child()
            await self._say_goodbye()
        return self._exit_code

    def _stop(self) -> None:
        (self._hurry if self._stopping.is_set() else self._stopping).set()

    async def _stop_child(self) -> None:
        patience_s = self._engine.drain_s + KILL_AFTER_S
        stopping = asyncio.create_task(self._child.stop(patience_s))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait([stopping, hurry], return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            self._child.signal(signal.SIGTERM)  # the second one: it hands back at once
        hurry.cancel()
        await stopping

    def _command(self) -> Sequence[str]:
        self._worker_id, self._serving, self._missed = process_id("w"), False, 0
        return self._engine.command(self._worker_id)

    def _on_exit(self, child: Child, code: int, delay_s: float) -> None:
        if code == EXIT_CONFIGURATION and not self._registration.restarts:
            self._exit_code = code  # whoever typed the command reads its message
            self._stopping.set()
            return
        reason = f"no heartbeat for {self._engine.stall_s:g} s" if self._is_dumb else _reason(code, child.last_words())
        log.error("the engine's process ended", worker=self._worker_id, reason=reason, starts_again_in_s=delay_s)
        restarts = self._registration.restarts + 1
        self._registration = replace(self._registration, state="crashed", restarts=restarts, reason=reason)
        self._serving = False
        self._group.create_task(self._bury(self._worker_id, reason))

    @property
    def _is_dumb(self) -> bool:
        """A process that serves has a heartbeat; if it loses that, even its event loop hangs."""
        return self._missed * LOOK_S > self._engine.stall_s

    async def _speak(self) -> None:
        """Says in the registry what the child cannot say: that it loads, or why it is not there."""
        is_there = await self._registry.is_there(self._worker_id)
        if self._serving:
            self._missed = 0 if is_there else self._missed + 1
            if self._is_dumb:
                self._child.signal(signal.SIGKILL)
            return
        if self._child.pid is not None:
            self._registration = replace(self._registration, state="loading")
            self._serving = is_there
        if self._serving:
            await self._registry.withdraw(self._registration.worker_id)
        else:
            await self._registry.announce(self._registration)

    async def _bury(self, worker_id: str, reason: str) -> None:
        """Hands back at once what a run left behind. If Redis is away for longer than a lease, that is done already."""
        deadline = time.monotonic() + LEASE_MS / 1000
        while time.monotonic() < deadline:
            check_cancelled()
            try:
                back, dead = await self._queue.disown(self._engine.card.name, worker_id, reason, crashed=True)
                log.info("handed back", worker=worker_id, jobs=back, dead=dead)
                await self._registry.withdraw(worker_id)
                if not self._serving:
                    await self._registry.announce(self._registration)
                return
            except AWAY as error:
                log.warning("cannot hand back now", worker=worker_id, error=str(error))
                await asyncio.sleep(RETRY_S)

    async def _say_goodbye(self) -> None:
        """What a child that was stopped in order has done itself; one that had to be killed has not."""
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._queue.disown(self._engine.card.name, self._worker_id, "stopped", crashed=False)
                await self._registry.withdraw(self._worker_id, self._registration.worker_id)
        except (TimeoutError, *AWAY) as error:
            log.warning("could not withdraw: the registration will run out", error=str(error))


def _reason(code: int, last_words: str) -> str:
    """Why a run ended, in one line."""
    how = how_it_ended(code)
    if code > 0 or -code in SAYS_WHY:
        said = last_words.removeprefix(PREFIX)
        return f"{how}: {said}" if said else how
    return how
