"""One model's queue, as a worker serves it. A worker has a line for each name that its engine answers to."""

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from fastchat_q.queue import Claim, Queue
from fastchat_q.registry import ModelCard

from .claimer import Claimer
from .publisher import Publisher

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """What is there once for each model.

    Args:
        queue: resends what gets no reply.
        once: does not.
    """

    card: ModelCard
    queue: Queue
    once: Queue
    claimer: Claimer
    publisher: Publisher

    @property
    def model(self) -> str:
        """The served name."""
        return self.card.name

    async def renew(self, claims: Sequence[Claim]) -> list[Claim]:
        """Extends leases; returns the claims that are lost."""
        return await self.once.renew(self.model, claims)

    async def reap(self) -> None:
        """Hands back jobs of dead workers, and expires late ones."""
        reaped = await self.queue.reap(self.model)
        if reaped.handed_back or reaped.dead or reaped.expired:
            log.info(
                "reaped", model=self.model, handed_back=reaped.handed_back, dead=reaped.dead, expired=reaped.expired
            )

    async def reconcile(self) -> None:
        """Mends a slice of the queue."""
        if mended := await self.queue.reconcile(self.model):
            log.info("reconciled", model=self.model, mended=mended)

    async def hand_back(self, claims: Sequence[Claim]) -> None:
        """For a worker that ends: sends what is still to be sent, gives its claims back, and what is in doubt."""
        await self.publisher.flushed()
        if claims:
            await self.queue.release(self.model, claims)
        await self.claimer.settle()
