"""Whose turn it is to claim: the models of one worker share its slots, and none of them starves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection

GATHER_S = 0.001
"""A slot that falls free wakes all models that wait for one; the turn is given when they are there."""


class Turns:
    """Gives turns to who runs the fewest jobs, among equals to who had its turn the longest ago.

    Args:
        models: who takes turns; a single one never waits.
        running: how many jobs of a model run.
    """

    def __init__(self, models: Collection[str], running: Callable[[str], int]) -> None:
        self._alone = len(models) == 1
        self._running = running
        self._had: dict[str, int] = dict.fromkeys(models, 0)
        self._count = 0
        self._taken = False
        self._waiting: dict[str, asyncio.Future[int]] = {}
        self._planned: asyncio.TimerHandle | None = None
        self._reserved: str | None = None

    @contextlib.asynccontextmanager
    async def turn(self, model: str) -> AsyncIterator[int]:
        """Nobody else has a turn meanwhile. Yields how many others wait for theirs."""
        if self._alone:
            yield 0
            return
        mine = self._waiting[model] = asyncio.get_running_loop().create_future()
        self._plan()
        try:
            others = await mine
        except asyncio.CancelledError:
            if mine.cancelled():
                del self._waiting[model]
            else:
                self._give_up()
            raise
        try:
            yield others
        finally:
            self._give_up()

    def reserve(self, model: str) -> None:
        """The others take nothing until this one has had what it waits for: the worker is to be empty for it."""
        self._reserved = model

    def free(self, model: str) -> None:
        """It waits no more."""
        if self._reserved == model:
            self._reserved = None

    def may_take(self, model: str) -> bool:
        """Whether the worker is not reserved for another one."""
        return self._reserved in (None, model)

    def _give_up(self) -> None:
        self._taken = False
        self._plan()

    def _plan(self) -> None:
        if self._waiting and not self._taken and self._planned is None:
            self._planned = asyncio.get_running_loop().call_later(GATHER_S, self._give)

    def _give(self) -> None:
        self._planned = None
        waiting = [model for model, turn in self._waiting.items() if not turn.done()]
        if not waiting:
            return
        model = min(waiting, key=lambda m: (self._running(m), self._had[m]))
        self._count += 1
        self._had[model] = self._count
        self._taken = True
        self._waiting.pop(model).set_result(len(waiting) - 1)
