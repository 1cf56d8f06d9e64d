"""A job in the worker's hands, and the connections that it goes over."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from redis.asyncio import Redis

from fastchat_q.connection import connect
from fastchat_q.queue import Claim

if TYPE_CHECKING:
    from .line import Line

ONCE_TIMEOUT_S = 4.0
"""Less than half a lease: a renewal whose reply does not come is tried again in time."""

BLOCKING_CONNECTIONS = 8


@dataclass(slots=True)
class Active:
    """A claimed job: one slot. ``n`` counts its tokens, those of earlier attempts included."""

    claim: Claim
    line: "Line"
    n: int
    since: float
    """When it was begun (time.monotonic)."""
    alive_at: float
    """When the last call was sent that took or extended its lease (time.monotonic)."""
    given_at: float
    """When it was begun or got its last token, by the clock of `Watch`."""
    given_at_step: int
    """Steps that the engine had done then."""
    emitted: bool = False
    unheard_since: float | None = None
    """Since when nobody listens to its tokens."""

    @property
    def ticket(self) -> str:
        """The engine's name for this claim."""
        return f"{self.claim.job_id} {self.claim.fence}"


@dataclass(frozen=True, slots=True)
class Links:
    """A worker's clients of the queue's server."""

    commands: "Redis"
    once: "Redis"
    """For CLAIM, EMIT and RENEW: nothing is sent again without our knowing, and no reply is waited for long."""
    blocking: "Redis"

    @classmethod
    def to(cls, url: str, models: int = 1) -> Self:
        """Clients that connect when first used, for a worker of so many models: each has a bell to wait for."""
        once = connect(url, resend=False, timeout_s=ONCE_TIMEOUT_S)
        return cls(connect(url), once, connect(url, blocking=True, max_connections=BLOCKING_CONNECTIONS + models))

    async def aclose(self) -> None:
        """Closes all connections."""
        for client in (self.commands, self.once, self.blocking):
            await client.aclose()
