"""Aliases: names that stand for other models, by weights. An operator writes them; the API asks which model is meant.

``chat=vicuna:0.9,vicuna-next:0.1`` sends a tenth of the requests for ``chat`` to ``vicuna-next``.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from redis.asyncio import Redis

from . import keys
from .errors import ConfigurationError

MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class Alias:
    """A name and the models it stands for, each with a positive weight."""

    name: str
    weights: Mapping[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """The weights, as parts of 1."""
        total = math.fsum(self.weights.values())
        return {model: weight / total for model, weight in self.weights.items()}

    def choose(self, key: str, askable: Collection[str]) -> str:
        """The model that a request with this key is for; of those that can be asked, if any can.

        Weighted rendezvous hashing (https://www.snia.org/sites/default/files/SDC15_presentations/dist_sys/
        Jason_Resch_New_Consistent_Hashings_Rev.pdf): shares are as the weights say, a key keeps its model, and a model
        that drops out or comes back moves only its own keys.
        """
        models = [model for model in self.weights if model in askable] or list(self.weights)
        return min(models, key=lambda model: -math.log(_uniform(key, model)) / self.weights[model])

    def __str__(self) -> str:
        return ",".join(f"{model}:{weight:g}" for model, weight in self.weights.items())


def parse(text: str) -> Alias:
    """Reads ``NAME=MODEL[:WEIGHT],…``. What follows the last colon of a model is its weight only if it is a number.

    Raises:
        ConfigurationError: it cannot be read, or says something that no alias may say.
    """
    name, equals, targets = text.partition("=")
    name, wrong = name.strip(), f"Alias {text!r}:"
    if not equals or not targets.strip():
        raise ConfigurationError(f"{wrong} expected NAME=MODEL:WEIGHT,…, such as chat=vicuna:0.9,vicuna-next:0.1.")
    weights: dict[str, float] = {}
    for target in targets.split(","):
        model, weight = _target(target.strip())
        if not model:
            raise ConfigurationError(f"{wrong} {target!r} names no model.")
        if model in weights:
            raise ConfigurationError(f"{wrong} {model!r} stands there twice.")
        if not _is_weight(weight):
            raise ConfigurationError(f"{wrong} the weight of {model!r} is {weight:g}; it must be a positive number.")
        weights[model] = weight
    if not 0 < len(name) <= MAX_NAME:
        raise ConfigurationError(f"{wrong} the name has {len(name)} characters; it needs 1 to {MAX_NAME}.")
    if name in weights:
        raise ConfigurationError(f"{wrong} {name!r} stands for itself.")
    return Alias(name, weights)


class Aliases:
    """Reads and writes the aliases of a deployment. Raises ``redis.RedisError`` when the server is away."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis

    async def all(self) -> dict[str, Alias]:
        """Every alias, by name. What somebody else wrote into the hash is left out."""
        rows: dict[bytes, bytes] = await self._redis.hgetall(keys.ALIASES)  # type: ignore[misc]
        found = (_read(name, raw) for name, raw in sorted(rows.items()))
        return {alias.name: alias for alias in found if alias is not None}

    async def put(self, alias: Alias, models: Collection[str]) -> None:
        """Makes or replaces an alias.

        Args:
            models: names that are served: none of them may become an alias.

        Raises:
            ConfigurationError: it would hide a model, or be an alias of an alias.
        """
        if alias.name in models:
            raise ConfigurationError(f"{alias.name!r} is a model; an alias of that name would hide it.")
        others = await self.all()
        others.pop(alias.name, None)
        for model in alias.weights:
            if model in others:
                raise ConfigurationError(f"{model!r} is an alias itself; an alias stands for models alone.")
        for other in others.values():
            if alias.name in other.weights:
                raise ConfigurationError(
                    f"{alias.name!r} is what the alias {other.name!r} stands for; that must be a model."
                )
        await self._redis.hset(keys.ALIASES, alias.name, orjson.dumps(dict(alias.weights)).decode())  # type: ignore[misc]

    async def remove(self, name: str) -> bool:
        """Whether there was one of this name."""
        return bool(await self._redis.hdel(keys.ALIASES, name))  # type: ignore[misc]


def _read(name: bytes, raw: bytes) -> Alias | None:
    try:
        weights: Any = orjson.loads(raw)
        alias = Alias(name.decode(), {str(model): float(weight) for model, weight in weights.items()})
    except (AttributeError, TypeError, ValueError):
        return None
    return alias if alias.weights and all(map(_is_weight, alias.weights.values())) else None


def _target(text: str) -> tuple[str, float]:
    model, colon, weight = text.rpartition(":")
    if colon:
        try:
            return model, float(weight)
        except ValueError:
            pass  # a name with a colon, such as llama3:8b
    return text, 1.0


def _is_weight(number: float) -> bool:
    return math.isfinite(number) and number > 0


def _uniform(key: str, model: str) -> float:
    """A number in (0, 1) that is a function of both; 53 bits."""
    digest = hashlib.blake2b(f"{key}\0{model}".encode(), digest_size=8).digest()
    return ((int.from_bytes(digest) >> 11) + 0.5) / 2**53
