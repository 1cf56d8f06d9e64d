"""What can be asked for now, as this API process last saw the registry. No request waits for Redis to know it."""

import asyncio

from redis.asyncio import Redis

from fastchat_q.aliases import Alias, Aliases
from fastchat_q.keys import model_keys
from fastchat_q.loops import every
from fastchat_q.registry import ModelCard, Registration, Registry, capacity_of

REFRESH_S = 1.0
REFRESH_LIMIT_S = 2.0


class Catalog:
    """A view of the registry, at the most about a second old."""

    def __init__(self, redis: "Redis") -> None:
        self._registry, self._stored_aliases = Registry(redis), Aliases(redis)
        self._aliases: dict[str, Alias] = {}
        self._workers: dict[str, list[Registration]] = {}
        self._awaited: dict[str, Registration] = {}
        self._known: set[str] = set()
        self._slots: dict[str, int] = {}
        self._trouble: dict[str, Registration] = {}

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
                aliases = await self._stored_aliases.all()
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {REFRESH_LIMIT_S:g} s") from error
        workers: dict[str, list[Registration]] = {}
        awaited: dict[str, Registration] = {}
        trouble: dict[str, Registration] = {}
        for registration in registrations:
            name = registration.card.name
            if registration.serves and not registration.on_demand:
                workers.setdefault(name, []).append(registration)
            elif not registration.expects_jobs:
                trouble[name] = registration
            elif name not in awaited or registration.state == "loading":
                awaited[name] = registration
        self._known |= known  # also what a FLUSHALL forgot: those are 503, not 404
        self._workers, self._awaited, self._trouble = workers, awaited, trouble
        self._aliases = {name: alias for name, alias in aliases.items() if not self.can_be_asked(name)}
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

    def awaited(self, model: str) -> Registration | None:
        """Of a model that is not served, but will be for a job that waits: who loads it, or would."""
        return None if model in self._workers else self._awaited.get(model)

    def can_be_asked(self, model: str) -> bool:
        """Whether it is served, or will be for a job that waits."""
        return model in self._workers or model in self._awaited

    def models(self) -> dict[str, Registration]:
        """An entry for each model that can be asked: of its oldest worker, or of who would load it."""
        served = {name: workers[0] for name, workers in self._workers.items()}
        return dict(sorted((self._awaited | served).items()))

    def alias(self, name: str) -> Alias | None:
        """What a name stands for that is no model's. A model that is served goes before an alias of its name."""
        return self._aliases.get(name)

    def aliases(self) -> list[Alias]:
        """The aliases of which some model can be asked."""
        return [alias for alias in self._aliases.values() if any(map(self.can_be_asked, alias.weights))]

    def trouble(self, model: str) -> Registration | None:
        """Of a model that is neither served nor about to be: the entry of a worker that says why."""
        return None if self.can_be_asked(model) else self._trouble.get(model)

    def known(self) -> set[str]:
        """Names of all models that were served lately or since this process started, or are about to be."""
        return self._known | self._workers.keys() | self._awaited.keys() | self._trouble.keys()
