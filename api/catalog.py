"""The models that are served now, as this API process last saw the registry. No request waits for Redis to know it."""

import asyncio

from redis.asyncio import Redis

from fastchat_q.keys import model_keys
from fastchat_q.loops import every
from fastchat_q.registry import ModelCard, Registration, Registry, capacity_of

REFRESH_S = 1.0
REFRESH_LIMIT_S = 2.0


class Catalog:
    """A view of the registry, at the most about a second old."""

    def __init__(self, redis: "Redis") -> None:
        self._registry = Registry(redis)
        self._workers: dict[str, list[Registration]] = {}
        self._known: set[str] = set()
        self._slots: dict[str, int] = {}
        self._trouble: dict[str, str] = {}

    async def run(self) -> None:
        """The refreshing loop, for ever."""
        await every(REFRESH_S, self.refresh, "registry")

    async def refresh(self) -> None:
        """Reads the registry now.

        Raises:
            TimeoutError: Redis does not answer; nobody who asks waits longer than ``REFRESH_LIMIT_S``.
            redis.RedisError: it is away.
        """
        try:
            async with asyncio.timeout(REFRESH_LIMIT_S):
                registrations, known = await self._registry.workers(), await self._registry.known_models()
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {REFRESH_LIMIT_S:g} s") from error
        workers: dict[str, list[Registration]] = {}
        trouble: dict[str, str] = {}
        for registration in registrations:
            if registration.serves:
                workers.setdefault(registration.card.name, []).append(registration)
            else:
                trouble[registration.card.name] = registration.reason or trouble.get(registration.card.name, "")
        self._known |= known  # also what a FLUSHALL forgot: those are 503, not 404
        self._workers, self._trouble = workers, trouble
        self._slots = {model_keys(name).prefix: capacity_of(some, name)[1] for name, some in workers.items()}

    def cards(self) -> list[ModelCard]:
        """A card for each served model: that of its oldest worker."""
        return sorted((workers[0].card for workers in self._workers.values()), key=lambda card: card.name)

    def card(self, model: str) -> ModelCard | None:
        """The card of a served model."""
        workers = self._workers.get(model)
        return workers[0].card if workers else None

    def slots(self, model: str) -> int:
        """Slots that take jobs of a model now, by its name or slug."""
        return self._slots.get(model_keys(model).prefix, 0)

    def trouble(self, model: str) -> str | None:
        """Of a model that is about to be served: why its worker ended the last time; empty: its first worker loads."""
        return None if model in self._workers else self._trouble.get(model)

    def known(self) -> set[str]:
        """Names of all models that were served lately or since this process started, or are about to be."""
        return self._known | self._workers.keys() | self._trouble.keys()
