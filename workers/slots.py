"""How many jobs a worker takes, and from which lane. Plain arithmetic; it knows no Redis."""

import math
from collections import Counter
from collections.abc import Iterable

from fastchat_q.keys import LANES

LO_FIRST_EVERY = 8
"""One claim of so many serves the batch lane first: a steady stream of interactive jobs does not starve it."""
GROW_S = 60.0
"""After the device ran out of memory, one slot comes back so often; after other trouble it may be sooner."""
ENOUGH_TO_KEEP_ONE = 4
"""With fewer slots, keeping one free would cost too much."""


class Slots:
    """The slots of one worker.

    Args:
        most: jobs at a time, while memory is enough.
        reserve: the part of them that the batch lane may not hold, rounded down.
        headroom: the part of them that a tenant leaves free to others that came lately.
    """

    def __init__(self, most: int, reserve: float, headroom: float = 0.0) -> None:
        self.now = self._most = most
        self._reserve, self._headroom = reserve, headroom
        self._claims: Counter[str] = Counter()
        self._grow_s = GROW_S
        self._grown_at = 0.0

    @property
    def headroom(self) -> int:
        """Slots that a tenant leaves free: its part rounded down, but at least one where there are enough."""
        if not self._headroom or self.now < ENOUGH_TO_KEEP_ONE:
            return 0
        return max(1, int(self.now * self._headroom))

    def offer(self, held: Iterable[str], model: str = "", others: int = 0) -> list[tuple[str, int]]:
        """What the next CLAIM may take, as pairs of a lane and a number, in the order of service; empty: nothing.

        Args:
            held: the lane of each job that runs.
            model: whose CLAIM it is: the lanes of each have their turns.
            others: models that wait for slots too; each may have an equal part of those that are free.
        """
        lanes = list(held)
        free = self.now - len(lanes)
        if free <= 0:
            return []
        free = math.ceil(free / (others + 1))
        hi, lo = LANES
        batch = min(free, self.now - int(self.now * self._reserve) - lanes.count(lo))
        if batch <= 0:
            return [(hi, free)]
        self._claims[model] += 1
        order = [(hi, free), (lo, batch)]
        return order if self._claims[model] % LO_FIRST_EVERY else order[::-1]

    def headroom_beside(self, running: int, offered: int) -> int:
        """The headroom that a CLAIM for ``offered`` slots must keep: other slots stay free anyway."""
        return max(0, self.headroom - (self.now - running - offered))

    def shrink(self, running: int, failed: int, now: float, grow_s: float = GROW_S) -> None:
        """Of ``running`` jobs ``failed`` did not fit: one slot less, or half of those that failed.

        Args:
            grow_s: one slot comes back so often.
        """
        self.now = max(1, min(self.now, running - max(1, failed // 2)))
        self._grown_at, self._grow_s = now, grow_s

    def grow(self, now: float) -> None:
        """Gives one slot back if the last change is long enough ago."""
        if self.now < self._most and now - self._grown_at >= self._grow_s:
            self.now += 1
            self._grown_at = now
