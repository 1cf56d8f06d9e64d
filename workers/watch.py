"""Who has stopped getting on: the engine as a whole, or one job in it. It looks and says; the worker acts."""

import time

from .active import Active
from .engines.base import Engine

PERIOD_S = 0.5
SILENT_S = 30.0
"""An engine that made no step for so long has its leases renewed no more."""
SLOW_S = 5.0
"""An engine that made no step for so long gets no further jobs."""
STALL_STEPS = 2
"""A job without a token is stalled only if the engine made so many steps meanwhile: one long step stalls nobody."""


class EngineHungError(Exception):
    """The engine's thread does not come back; only the end of its process ends it."""


class Watch:
    """Measures in seconds that this process was awake: after a SIGSTOP nothing looks stalled that was frozen with it.

    A job is stalled if it got no token for ``stall_s``. Its first token may take longer, as prompts wait for one
    another inside the engine: before it, the time counts only while no job at all gets a token. While a job waits for
    memory that others have, it does not count at all.

    Args:
        hung_s: an engine that made no step for so long hangs. None: as ``stall_s``.
    """

    def __init__(self, engine: Engine, stall_s: float, hung_s: float | None = None) -> None:
        self._engine = engine
        self._stall_s = stall_s
        self._hung_s = stall_s if hung_s is None else hung_s
        self._awake_s = 0.0
        self._ticked_at = time.monotonic()
        self._progress = engine.progress()
        self._moved_at = 0.0
        self._any_token_at = 0.0

    def tick(self) -> None:
        """To be called every ``PERIOD_S``."""
        now = time.monotonic()
        self._awake_s += min(now - self._ticked_at, 2 * PERIOD_S)
        self._ticked_at = now
        progress = self._engine.progress()
        if progress != self._progress or progress > now or self._engine.resting:
            self._progress, self._moved_at = progress, self._awake_s

    @property
    def awake_s(self) -> float:
        """The clock: seconds that this process was awake so far."""
        return self._awake_s

    @property
    def silent_s(self) -> float:
        """Seconds since the engine got on; 0 while it has nothing to do."""
        return self._awake_s - self._moved_at

    @property
    def slow(self) -> bool:
        """Whether another worker had better take the next job."""
        return self.silent_s > min(SLOW_S, self._hung_s)

    @property
    def silent(self) -> bool:
        """Whether somebody else had better take over what runs."""
        return self.silent_s > min(SILENT_S, self._hung_s)

    def check_engine(self) -> None:
        """Raises EngineHungError if the engine made no step for ``hung_s``."""
        if self.silent_s > self._hung_s:
            raise EngineHungError(f"the engine made no step for {self._hung_s:g} s")

    def given(self, active: Active) -> None:
        """A job got a token."""
        active.given_at = self._any_token_at = self._awake_s
        active.given_at_step = self._engine.steps

    def stalled(self, active: Active) -> bool:
        """Whether the engine goes on without this job."""
        if active.ticket in self._engine.starved:
            active.given_at, active.given_at_step = self._awake_s, self._engine.steps
            return False
        since = active.given_at if active.emitted else max(active.given_at, self._any_token_at)
        steps = self._engine.steps - active.given_at_step
        return self._awake_s - since > self._stall_s and steps >= STALL_STEPS
