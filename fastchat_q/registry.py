"""Who is there: workers and API servers as hashes with TTLs. Who stops renewing is gone; nobody removes it."""

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

import orjson
from redis.asyncio import Redis
from ulid import ULID

from . import __version__, keys
from .jobs import Kind
from .versions import known_fields

HEARTBEAT_S = 3.0
REGISTRATION_TTL_S = 15
FORGET_MODEL_S = 24 * 3600
FORGET_WORKER_S = 3600

State = Literal["idle", "loading", "serving", "draining", "crashed"]
"""``idle``: it is loaded when a job comes; ``crashed``: it waits until it is started again."""


def process_id(kind: str) -> str:
    """A name for this process that no later process repeats: host, pid and a random boot id."""
    return f"{kind}-{socket.gethostname().split('.')[0].lower()}-{os.getpid()}-{str(ULID())[-6:].lower()}"


Batching = Literal["step loop", "generate", "upstream"]
"""How requests share an engine: one step for all of them, one after another, or as another server does it."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a worker says of the model it serves."""

    name: str
    engine: str
    context_length: int | None
    """Tokens of prompt plus completion; None: no limit."""
    created: int
    """Unix seconds."""
    device: str = "cpu"
    dtype: str = "-"
    kind: Kind = "chat"
    """Which jobs it takes."""
    features: tuple[str, ...] = ()
    """What it can do beyond plain generation: of `FEATURES`."""
    batching: Batching = "step loop"
    base: str | None = None
    """Of an adapter: the model that it changes."""

    @classmethod
    def from_json(cls, raw: str) -> Self:
        """What a heartbeat wrote."""
        return cls.from_dict(orjson.loads(raw))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """The same, decoded."""
        fields = known_fields(cls, raw)
        return cls(**fields | {"features": tuple(fields.get("features", ()))})


@dataclass(frozen=True, slots=True)
class Registration:
    """A worker's entry in the registry."""

    worker_id: str
    card: ModelCard
    slots: int
    """Jobs that it takes at a time now; fewer than it was started with after its device ran out of memory."""
    running: int
    state: State
    host: str
    pid: int
    version: str
    started: int
    """Unix seconds by the worker's own clock: for people, and for which card speaks for a model."""
    supervisor: int = 0
    """Pid of the process that starts it again when it ends; 0: none."""
    restarts: int = 0
    """How often that has happened."""
    reason: str = ""
    """Why it ended the last time; of one that serves: why it takes no jobs at the moment."""
    on_demand: bool = False
    """The entry is of who loads the model when a job comes; once it is loaded, its own process has an entry."""
    progress: float = 0.0
    """How much of the loading is done, 0 to 1."""
    phase: str = ""
    """What of the loading is under way."""
    retry_in_s: int = 0
    """Of a model that could not be loaded: how long it is not tried again."""
    more: tuple[ModelCard, ...] = ()
    """What else the worker serves out of the same slots. Who reads the registry finds an entry for each of them."""

    @classmethod
    def of_this_process(
        cls, worker_id: str, card: ModelCard, slots: int, supervisor: int = 0, more: Iterable[ModelCard] = ()
    ) -> "Registration":
        """The entry of a worker that starts serving now."""
        return cls(
            worker_id,
            card,
            slots,
            0,
            "serving",
            socket.gethostname(),
            os.getpid(),
            __version__,
            int(time.time()),
            supervisor,
            more=tuple(more),
        )

    @property
    def serves(self) -> bool:
        """Whether its model is loaded and its process there."""
        return self.state in ("serving", "draining")

    @property
    def expects_jobs(self) -> bool:
        """Whether a job may wait for its model to be loaded: nothing speaks against that it will be."""
        if self.on_demand:
            return self.state != "crashed"
        return self.state == "loading" and not self.reason

    def at(self, running: int, slots: int, draining: bool) -> "Registration":
        """The same worker, at another moment."""
        return replace(self, running=running, slots=slots, state="draining" if draining else "serving")


class Registry:
    """Reads and writes registrations. Raises ``redis.RedisError`` when the server is away.

    Lifetimes are TTLs and times of the server's clock, so that the clocks of hosts need not agree.
    """

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis

    async def announce(self, registration: Registration) -> None:
        """One heartbeat of a worker: two round trips, for what is compared between hosts is Redis' time alone."""
        fields = {
            **asdict(registration),
            "card": orjson.dumps(registration.card),
            "more": orjson.dumps(registration.more),
            "on_demand": int(registration.on_demand),
        }
        key, (now, _) = keys.worker(registration.worker_id), await self._redis.time()
        pipe = self._redis.pipeline(transaction=False)
        pipe.hset(key, mapping=fields)
        pipe.expire(key, REGISTRATION_TTL_S)
        pipe.zadd(keys.WORKERS, {registration.worker_id: (now + REGISTRATION_TTL_S) * 1000})
        pipe.zremrangebyscore(keys.WORKERS, "-inf", (now - FORGET_WORKER_S) * 1000)
        if registration.serves or registration.on_demand:
            served = (registration.card, *registration.more)
            pipe.zadd(keys.MODELS, {card.name: now * 1000 for card in served})
        pipe.zremrangebyscore(keys.MODELS, "-inf", (now - FORGET_MODEL_S) * 1000)
        await pipe.execute()

    async def withdraw(self, *worker_ids: str) -> None:
        """Workers that stop cleanly say so, and a supervisor says it of those that could not."""
        pipe = self._redis.pipeline(transaction=False)
        for worker_id in worker_ids:
            pipe.delete(keys.worker(worker_id))
            pipe.zrem(keys.WORKERS, worker_id)
        await pipe.execute()

    async def is_there(self, worker_id: str) -> bool:
        """Whether a worker's last heartbeat is younger than its TTL."""
        return bool(await self._redis.exists(keys.worker(worker_id)))

    async def models_of(self, worker_id: str) -> list[str]:
        """Names of the models that a worker serves, or served until a moment ago."""
        fields: dict[bytes, bytes] = await self._redis.hgetall(keys.worker(worker_id))  # type: ignore[misc]
        return [entry.card.name for entry in _registrations([fields])]

    async def announce_api(self, api_id: str) -> None:
        """One heartbeat of an API server."""
        fields = {"host": socket.gethostname(), "pid": os.getpid(), "version": __version__}
        pipe = self._redis.pipeline(transaction=False)
        pipe.hset(keys.api_server(api_id), mapping=fields)
        pipe.expire(keys.api_server(api_id), REGISTRATION_TTL_S)
        await pipe.execute()

    async def workers(self) -> list[Registration]:
        """All workers that are there, whatever their state, oldest first: two round trips."""
        ids = [i.decode() for i in await self._redis.zrange(keys.WORKERS, 0, -1)]
        if not ids:
            return []
        pipe = self._redis.pipeline(transaction=False)
        for worker_id in ids:
            pipe.hgetall(keys.worker(worker_id))
        return sorted(_registrations(await pipe.execute()), key=lambda r: (r.started, r.worker_id))

    async def known_models(self) -> set[str]:
        """Models that some worker served, or would have loaded, within the last 24 hours."""
        return {name.decode() for name in await self._redis.zrange(keys.MODELS, 0, -1)}


def capacity_of(registrations: Iterable[Registration], model: str) -> tuple[int, int]:
    """How many workers take the jobs of a model, given by its name or slug, and how many slots they have together."""
    slots = [r.slots for r in registrations if r.state == "serving" and keys.slug(r.card.name) == keys.slug(model)]
    return len(slots), sum(slots)


REQUIRED = frozenset({"worker_id", "card", "slots", "running", "host", "pid", "version", "started"})


def _registrations(rows: Iterable[dict[bytes, bytes]]) -> Iterable[Registration]:
    for row in rows:
        fields = {name.decode(): value.decode() for name, value in row.items()}
        state = next((state for state in get_args(State) if state == fields.get("state")), None)
        if state is None or not fields.keys() >= REQUIRED:
            continue  # its TTL ran out: the worker is gone (or it is of a version with other states or fields)
        entry = Registration(
            worker_id=fields["worker_id"],
            card=ModelCard.from_json(fields["card"]),
            slots=int(fields["slots"]),
            running=int(fields["running"]),
            state=state,
            host=fields["host"],
            pid=int(fields["pid"]),
            version=fields["version"],
            started=int(fields["started"]),
            supervisor=int(fields.get("supervisor", 0)),
            restarts=int(fields.get("restarts", 0)),
            reason=fields.get("reason", ""),
            on_demand=fields.get("on_demand") == "1",
            progress=float(fields.get("progress", 0)),
            phase=fields.get("phase", ""),
            retry_in_s=int(fields.get("retry_in_s", 0)),
            more=tuple(ModelCard.from_dict(card) for card in orjson.loads(fields.get("more", "[]"))),
        )
        yield from (replace(entry, card=card) for card in (entry.card, *entry.more))
