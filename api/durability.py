"""Whether the Redis behind this API server keeps what it accepts: asked at the start, and again while it serves."""

import asyncio

import structlog
from redis.asyncio import Redis

from fastchat_q.embedded import durability_findings
from fastchat_q.errors import ConfigurationError
from fastchat_q.loops import AWAY, every

log = structlog.get_logger()

CHECK_S = 5.0
"""So long may a changed setting go unnoticed."""
START_LIMIT_S = 2.0
"""A server that answers later than this is away: the API starts without it, and is not ready."""


class Durability:
    """Holds the reason why the server must not be used. A setting that is only unwise is logged when it is found."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        self._told: set[str] = set()
        self.objection: str | None = None
        """Why accepted jobs could vanish; None: they are kept, as far as is known."""

    async def check_at_start(self) -> None:
        """A first look; a server that is away now is looked at when it is there.

        Raises:
            ConfigurationError: it evicts keys.
        """
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await self._check()
        except AWAY:
            return
        if self.objection is not None:
            raise ConfigurationError(self.objection)

    async def run(self) -> None:
        """The loop that looks again, for ever."""
        await every(CHECK_S, self._check, "durability")

    async def _check(self) -> None:
        objection: str | None = None
        findings: list[str] = []
        try:
            findings = await durability_findings(self._redis)
        except ConfigurationError as error:
            objection = str(error)
        if objection != self.objection:
            log.error("not ready", reason=objection) if objection else log.info("the objection is gone")
        self.objection = objection
        for finding in findings:
            if finding not in self._told:
                log.warning("redis is not set up to keep jobs", finding=finding)
        self._told = set(findings)
