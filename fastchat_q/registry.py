"""Who is there: workers and API servers as hashes with TTLs. Who stops renewing is gone; nobody removes it."""

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import orjson
from redis.asyncio import Redis
from ulid import ULID

from . import __version__, keys

HEARTBEAT_S = 3.0
REGISTRATION_TTL_S = 15
FORGET_MODEL_S = 24 * 3600
FORGET_WORKER_S = 3600


def process_id(kind: str) -> str:
    """A name for this process that no later process repeats: host, pid and a random boot id."""
    return f"{kind}-{socket.gethostname().split('.')[0].lower()}-{os.getpid()}-{str(ULID())[-6:].lower()}"


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


@dataclass(frozen=True, slots=True)
class Registration:
    """A worker's entry in the registry."""

    worker_id: str
    card: ModelCard
    slots: int
    running: int
    state: Literal["serving", "draining"]
    host: str
    pid: int
    version: str
    started: int
    """Unix seconds."""

    @classmethod
    def of_this_process(cls, worker_id: str, card: ModelCard, slots: int) -> "Registration":
        """The entry of a worker that starts serving now."""
        return cls(
            worker_id, card, slots, 0, "serving", socket.gethostname(), os.getpid(), __version__, int(time.time())
        )

    def at(self, running: int, draining: bool) -> "Registration":
        """The same worker, at another moment."""
        return replace(self, running=running, state="draining" if draining else "serving")


class Registry:
    """Reads and writes registrations. Raises ``redis.RedisError`` when the server is away."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis

    async def announce(self, registration: Registration) -> None:
        """One heartbeat of a worker: one round trip."""
        fields = {**asdict(registration), "card": orjson.dumps(registration.card)}
        key, now = keys.worker(registration.worker_id), time.time()
        pipe = self._redis.pipeline(transaction=False)
        pipe.hset(key, mapping=fields)
        pipe.expire(key, REGISTRATION_TTL_S)
        pipe.zadd(keys.WORKERS, {registration.worker_id: round((now + REGISTRATION_TTL_S) * 1000)})
        pipe.zremrangebyscore(keys.WORKERS, "-inf", round((now - FORGET_WORKER_S) * 1000))
        pipe.zadd(keys.MODELS, {registration.card.name: round(now * 1000)})
        pipe.zremrangebyscore(keys.MODELS, "-inf", round((now - FORGET_MODEL_S) * 1000))
        await pipe.execute()

    async def withdraw(self, worker_id: str) -> None:
        """A worker that stops cleanly says so."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.delete(keys.worker(worker_id))
        pipe.zrem(keys.WORKERS, worker_id)
        await pipe.execute()

    async def announce_api(self, api_id: str) -> None:
        """One heartbeat of an API server."""
        fields = {"host": socket.gethostname(), "pid": os.getpid(), "version": __version__}
        pipe = self._redis.pipeline(transaction=False)
        pipe.hset(keys.api_server(api_id), mapping=fields)
        pipe.expire(keys.api_server(api_id), REGISTRATION_TTL_S)
        await pipe.execute()

    async def workers(self) -> list[Registration]:
        """All workers that are alive, oldest first: two round trips."""
        ids = [i.decode() for i in await self._redis.zrange(keys.WORKERS, 0, -1)]
        if not ids:
            return []
        pipe = self._redis.pipeline(transaction=False)
        for worker_id in ids:
            pipe.hgetall(keys.worker(worker_id))
        return sorted(_registrations(await pipe.execute()), key=lambda r: (r.started, r.worker_id))

    async def known_models(self) -> set[str]:
        """Models that some worker served within the last 24 hours."""
        return {name.decode() for name in await self._redis.zrange(keys.MODELS, 0, -1)}


def _registrations(rows: Iterable[dict[bytes, bytes]]) -> Iterable[Registration]:
    for row in rows:
        if not row:
            continue  # its TTL ran out: the worker is gone
        fields = {name.decode(): value.decode() for name, value in row.items()}
        yield Registration(
            worker_id=fields["worker_id"],
            card=ModelCard(**orjson.loads(fields["card"])),
            slots=int(fields["slots"]),
            running=int(fields["running"]),
            state="draining" if fields["state"] == "draining" else "serving",
            host=fields["host"],
            pid=int(fields["pid"]),
            version=fields["version"],
            started=int(fields["started"]),
        )
