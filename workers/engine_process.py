"""An engine's process as its supervisor sees it: started, watched, spoken for in the registry, buried, stopped."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog
from redis.asyncio import Redis

from fastchat_q.loops import AWAY, check_cancelled
from fastchat_q.queue import LEASE_MS, Queue
from fastchat_q.registry import HEARTBEAT_S, ModelCard, Registration, Registry, process_id
from fastchat_q.supervisor import PIPE_BYTES, Child, PassedOn, how_it_ended

from .progress import PROGRESS_FD

log = structlog.get_logger()

LOOK_S = 1.0
KILL_AFTER_S = 10.0
"""What a child may take on top of its draining: it hands its jobs back."""
RETRY_S = 0.2
FAREWELL_S = 2.0
"""When it stops, it does not wait longer than this for Redis."""
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
        load_stall_s: how long a load may be silent: no report of its progress, and nothing printed.
    """

    command: Callable[[str], Sequence[str]]
    environment: Mapping[str, str]
    card: ModelCard
    slots: int
    drain_s: float
    stall_s: float
    load_stall_s: float = 600.0


class Supervised:
    """One engine's process, again and again. Each of its runs is a worker with an id of its own.

    Args:
        on_exit: called with the exit code and the reason after a run that nobody asked to end; False: no more of it.
        on_demand: it is started by `start` alone, and not again by itself.
    """

    def __init__(
        self, engine: EngineProcess, redis: "Redis", on_exit: Callable[[int, str], bool], *, on_demand: bool = False
    ) -> None:
        self.engine = engine
        self.serving = False
        """The present run has registered."""
        self._redis, self._queue, self._registry = redis, Queue(redis), Registry(redis)
        self._told_exit = on_exit
        self._worker_id = ""
        self._missed = self._silent = 0  # looks without a heartbeat; looks at a load that said nothing
        self._announced_at = -HEARTBEAT_S
        self._child: Child | None = None
        self._progress = os.pipe()
        self._gone = False
        self._group: asyncio.TaskGroup | None = None
        own = Registration.of_this_process(process_id("s"), engine.card, engine.slots)
        self.registration = replace(
            own, state="idle" if on_demand else "loading", supervisor=own.pid, on_demand=on_demand
        )
        """What is said of it in the registry while it does not speak for itself."""

    @property
    def stuck(self) -> bool:
        """Its load is given up: it was silent for too long. Engines that report nothing print what they do."""
        return self._silent * LOOK_S > self.engine.load_stall_s

    @property
    def pid(self) -> int | None:
        """Pid of the present run; None between two runs."""
        return self._child.pid if self._child is not None else None

    def start(self, group: asyncio.TaskGroup) -> None:
        """Starts it, as a task of ``group``."""
        os.set_blocking(self._progress[0], False)
        asyncio.get_running_loop().add_reader(self._progress[0], self._read_progress)
        self._group = group
        environment = {**self.engine.environment, PROGRESS_FD: str(self._progress[1])}
        again = not self.registration.on_demand
        output = PassedOn(self._heard)
        self._child = Child("engine", self._command, output, environment, self._exited, again, self._progress[1:])
        self._child.start(group)

    async def stop(self, hurry: asyncio.Event) -> None:
        """Drains it, at once when ``hurry`` is set; returns when it is gone and its jobs are handed back."""
        if self._child is not None:
            await self._stop_child(self._child, hurry)
            asyncio.get_running_loop().remove_reader(self._progress[0])
        self.serving = False
        try:
            async with asyncio.timeout(FAREWELL_S):
                if self._worker_id:  # one that had to be killed has not done it itself
                    for model in await self._models(self._worker_id):
                        await self._queue.disown(model, self._worker_id, "stopped", crashed=False)
                    await self._registry.withdraw(self._worker_id)
        except (TimeoutError, *AWAY) as error:
            log.warning("could not withdraw: the registration will run out", error=str(error))
        self._child = None

    async def say_goodbye(self) -> None:
        """Takes its own entry out of the registry, for good."""
        self._gone = True
        for descriptor in self._progress:
            os.close(descriptor)
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._registry.withdraw(self.registration.worker_id)
        except (TimeoutError, *AWAY) as error:
            log.warning("could not withdraw: the registration will run out", error=str(error))

    async def speak(self) -> None:
        """Says in the registry what the engine's process cannot say. To be called every ``LOOK_S``."""
        if self._child is None or self.registration.state == "draining":
            if time.monotonic() - self._announced_at >= HEARTBEAT_S:
                await self.announce()
            return
        is_there = await self._registry.is_there(self._worker_id)
        if self.serving:
            self._missed = 0 if is_there else self._missed + 1
            if self._is_dumb:
                self._child.signal(signal.SIGKILL)
            return
        if self._child.pid is not None and not self.registration.on_demand:
            self.registration = replace(self.registration, state="loading")
        self.serving = is_there and self._child is not None and self._child.pid is not None
        if self.serving:
            await self._registry.withdraw(self.registration.worker_id)
            return
        self._silent += self._child is not None and self._child.pid is not None
        if self.stuck and self._child is not None:
            self._child.signal(signal.SIGKILL)
        await self.announce()

    async def announce(self) -> None:
        """Says it now."""
        if self._gone:
            return
        self._announced_at = time.monotonic()
        await self._registry.announce(self.registration)

    async def _stop_child(self, child: Child, hurry: asyncio.Event) -> None:
        stopping = asyncio.create_task(child.stop(self.engine.drain_s + KILL_AFTER_S))
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait([stopping, hurried], return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            child.signal(signal.SIGTERM)  # the second one: it hands back at once
        hurried.cancel()
        await stopping

    def _command(self) -> Sequence[str]:
        self._worker_id, self.serving, self._missed, self._silent = process_id("w"), False, 0, 0
        self.registration = replace(self.registration, progress=0.0, phase="")
        return self.engine.command(self._worker_id)

    def _exited(self, child: Child, code: int, delay_s: float) -> None:
        reason = _reason(code, child.last_words())
        if self._is_dumb:
            reason = f"no heartbeat for {self.engine.stall_s:g} s"
        elif self.stuck:
            reason = f"no progress in loading for {self.engine.load_stall_s:g} s"
        if not self._told_exit(code, reason):
            return
        starts_again_in_s = None if self.registration.on_demand else delay_s
        log.error(
            "the engine's process ended", worker=self._worker_id, reason=reason, starts_again_in_s=starts_again_in_s
        )
        restarts = self.registration.restarts + 1
        self.registration = replace(self.registration, state="crashed", restarts=restarts, reason=reason)
        self.serving = False
        if self.registration.on_demand:
            self._child = None
        assert self._group is not None
        self._group.create_task(self._bury(self._worker_id, reason))

    @property
    def _is_dumb(self) -> bool:
        """A process that serves has a heartbeat; if it loses that, even its event loop hangs."""
        return self._missed * LOOK_S > self.engine.stall_s

    async def _bury(self, worker_id: str, reason: str) -> None:
        """Hands back at once what a run left behind. If Redis is away for longer than a lease, that is done already."""
        deadline = time.monotonic() + LEASE_MS / 1000
        while time.monotonic() < deadline:
            check_cancelled()
            try:
                for model in await self._models(worker_id):
                    back, dead = await self._queue.disown(model, worker_id, reason, crashed=True)
                    log.info("handed back", worker=worker_id, model=model, jobs=back, dead=dead)
                await self._registry.withdraw(worker_id)
                if not self.serving:
                    await self.announce()
                return
            except AWAY as error:
                log.warning("cannot hand back now", worker=worker_id, error=str(error))
                await asyncio.sleep(RETRY_S)

    async def _models(self, worker_id: str) -> list[str]:
        """What a run served; one that did not say served nothing but the model."""
        return await self._registry.models_of(worker_id) or [self.engine.card.name]

    def _read_progress(self) -> None:
        try:
            lines = os.read(self._progress[0], PIPE_BYTES).splitlines()
            fraction, phase = json.loads(lines[-1])
        except (BlockingIOError, IndexError, TypeError, ValueError):  # half a line: the next one says more
            return
        self._heard()
        self.registration = replace(self.registration, progress=float(fraction), phase=str(phase))

    def _heard(self) -> None:
        if not self.stuck:
            self._silent = 0


def _reason(code: int, last_words: str) -> str:
    """Why a run ended, in one line."""
    how = how_it_ended(code)
    if code > 0 or -code in SAYS_WHY:
        said = last_words.removeprefix(PREFIX)
        return f"{how}: {said}" if said else how
    return how
