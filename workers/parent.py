"""``fastchat-q worker``: a light process that keeps the engine's process running and speaks for it while it cannot.

It loads no model and imports no torch, so that what kills an engine (a segfault, the kernel's out-of-memory killer, a
hung device) leaves somebody who hands its jobs back at once, says why, and starts it again.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable

from redis.asyncio import Redis

from fastchat_q.connection import connect
from fastchat_q.loops import every
from fastchat_q.sentinel import FOLLOW_S, follow_master

from .engine_process import LOOK_S, EngineProcess, Supervised

EXIT_CONFIGURATION = 2


def run(engine: EngineProcess, redis_url: str) -> None:
    """Keeps it running until SIGTERM or SIGINT.

    Raises:
        SystemExit: code 2: its first start failed for a setting (its own message is on stderr).
    """
    run_with_redis(redis_url, lambda redis: Parent(engine, redis).run())


def run_with_redis(redis_url: str, supervise: Callable[["Redis"], Awaitable[int]]) -> None:
    """Runs a supervisor to its end. Raises SystemExit with its exit code, if that is not 0."""

    async def supervised() -> int:
        redis = connect(redis_url)
        try:
            return await supervise(redis)
        finally:
            await redis.aclose()

    if code := asyncio.run(supervised()):
        raise SystemExit(code)


class Parent:
    """The supervisor of one engine's process."""

    def __init__(self, engine: EngineProcess, redis: "Redis") -> None:
        self._redis = redis
        self._stop = Stop()
        self._engine = Supervised(engine, redis, self._on_exit)
        self._exit_code = 0

    async def run(self) -> int:
        """Runs until it is told to stop; returns the exit code."""
        self._stop.listen()
        async with asyncio.TaskGroup() as group:
            self._engine.start(group)
            loops = [
                group.create_task(every(LOOK_S, self._engine.speak, "registry")),
                group.create_task(every(FOLLOW_S, lambda: follow_master(self._redis), "sentinel")),
            ]
            await self._stop.asked.wait()
            for task in loops:
                task.cancel()
            await self._engine.stop(self._stop.hurry)
            await self._engine.say_goodbye()
        return self._exit_code

    def _on_exit(self, code: int, reason: str) -> bool:
        if code == EXIT_CONFIGURATION and not self._engine.registration.restarts:
            self._exit_code = code  # whoever typed the command reads its message
            self._stop.asked.set()
            return False
        return True


class Stop:
    """SIGTERM and SIGINT: the first one asks to stop, the second one to hurry."""

    def __init__(self) -> None:
        self.asked, self.hurry = asyncio.Event(), asyncio.Event()

    def listen(self) -> None:
        """From now on the running loop takes the signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.hurry if self.asked.is_set() else self.asked).set()
