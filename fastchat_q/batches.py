"""Batches: facts in the storage, written once each, and in Redis what they come to, for those who look.

``batches/<id>/`` holds ``manifest.json`` (what was asked for, put before the client has its answer),
``validated.json``, ``cancelling.json``, ``ended.json``, and the segments of the ledger. Whoever comes first with a fact
has it; nobody changes one. The state of a batch is read off its facts, so no two processes can disagree on it.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import orjson
import structlog
from redis.asyncio import Redis
from ulid import ULID

from . import keys, scripts
from .errors import InvalidRequestError, UnknownBatchError
from .ledger import PREFIX, Head, Ledger
from .loops import each
from .storage import AlreadyExistsError, MissingObjectError, Storage
from .storage_identity import StorageIdentity
from .tenants import Caller
from .versions import known_fields

log = structlog.get_logger()

BATCH_ID = re.compile(r"batch_[0-7][0-9A-HJKMNP-TV-Z]{25}")
LEASE_MS = 6_000
SEGMENTS = 10**8
"""More than a batch can have: a rank is the state times this, plus the segment."""
RANKS = {"validating": 0, "in_progress": 1, "cancelling": 2, "finalizing": 3}
ENDED = 4
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was asked for."""

    id: str
    """``batch_<ulid>``."""
    caller: dict[str, Any]
    """Who asked, with its limits as they were: JSON of a `Caller`."""
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: int
    """Unix seconds, as all times here."""
    expires_at: int
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return str(self.caller["tenant"])

    def who(self) -> Caller:
        """Who asked."""
        return Caller.model_validate(self.caller)


@dataclass(frozen=True, slots=True)
class Validated:
    """The input was read: it can be worked on, or not at all."""

    at: int
    total: int = 0
    model: str | None = None
    """None: its lines name several."""
    errors: tuple[dict[str, Any], ...] = ()
    """``{code, line, message, param}``; any: the batch has failed."""


@dataclass(frozen=True, slots=True)
class Cancelling:
    """Somebody wants it no more."""

    at: int


@dataclass(frozen=True, slots=True)
class Ended:
    """It is over, and its files are there."""

    at: int
    state: str
    closed_at: int
    """When the last line was answered."""
    output_file_id: str | None
    error_file_id: str | None
    completed: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    errors: tuple[dict[str, Any], ...] = ()
    """As those of `Validated`: why it failed with work under way."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as its facts have it."""

    manifest: Manifest
    validated: Validated | None = None
    cancelling: Cancelling | None = None
    head: Head = field(default_factory=Head)
    ended: Ended | None = None
    trouble: str = ""
    """Why it does not get on at the moment."""

    @property
    def state(self) -> str:
        """One of OpenAI's."""
        if self.ended is not None:
            return self.ended.state
        if self.validated is not None and self.validated.errors:
            return "failed"
        if self.head.closed in ("completed", "expired", "failed"):
            return "finalizing"
        if self.cancelling is not None:
            return "cancelling"
        return "validating" if self.validated is None else "in_progress"

    @property
    def is_open(self) -> bool:
        """Whether something is left to be done."""
        return self.state in RANKS

    @property
    def rank(self) -> int:
        """Grows with each fact."""
        return RANKS.get(self.state, ENDED) * SEGMENTS + self.head.seq

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's batch object. ``trouble`` is there only if there is some."""
        manifest, validated, ended, state = self.manifest, self.validated, self.ended, self.state
        done = ended or self.head
        invalid = validated is not None and bool(validated.errors)
        errors = [*(validated.errors if validated else ()), *(ended.errors if ended else ())]
        failed_at = validated.at if validated and invalid else ended.at if ended and state == "failed" else None
        closed_at = (ended or self.head).closed_at or None
        found = {
            "id": manifest.id,
            "object": "batch",
            "endpoint": manifest.endpoint,
            "model": validated.model if validated else None,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": manifest.input_file_id,
            "completion_window": manifest.completion_window,
            "status": state,
            "output_file_id": ended.output_file_id if ended else None,
            "error_file_id": ended.error_file_id if ended else None,
            "created_at": manifest.created_at,
            "in_progress_at": validated.at if validated and not invalid else None,
            "expires_at": manifest.expires_at,
            "finalizing_at": closed_at if state in ("finalizing", "completed") else None,
            "completed_at": ended.at if ended and state == "completed" else None,
            "failed_at": failed_at,
            "expired_at": ended.at if ended and state == "expired" else None,
            "cancelling_at": self.cancelling.at if self.cancelling else None,
            "cancelled_at": ended.at if ended and state == "cancelled" else None,
            "request_counts": {
                "total": validated.total if validated and not invalid else 0,
                "completed": done.completed,
                "failed": done.failed,
            },
            "usage": {
                "input_tokens": done.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": done.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": done.prompt_tokens + done.completion_tokens,
            },
            "metadata": manifest.metadata,
        }
        return found | {"trouble": self.trouble} if self.trouble else found


def new_batch_id() -> str:
    """An id that sorts by its time."""
    return f"batch_{ULID()}"


class Batches:
    """All batches. ``tenant`` None stands for an admin: everybody's.

    Raises ``redis.RedisError`` and `StorageUnavailableError` when either is away.
    """

    def __init__(self, redis: "Redis", storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self.storage = storage
        self._redis, self._clock = redis, clock
        self._identity = StorageIdentity(redis, storage)
        self._reindexing = False

    async def create(self, manifest: Manifest) -> Batch:
        """Durable when this returns.

        Raises:
            StorageUnavailableError: or this process keeps batches elsewhere than the others.
        """
        await self._identity.claim()
        await self._tell(manifest.id, "manifest", manifest)
        batch = Batch(manifest)
        try:
            await self.show(batch)
        except BaseException:  # the client is told that there is none
            await self.storage.delete([_fact_key(manifest.id, "manifest")])
            raise
        return batch

    async def get(self, batch_id: str, tenant: str | None) -> dict[str, Any]:
        """OpenAI's object of a batch, as of its last segment.

        Raises:
            UnknownBatchError: there is none, or it is another tenant's.
        """
        if BATCH_ID.fullmatch(batch_id):
            raw = await self._redis.hget(keys.batch(batch_id), "json")  # type: ignore[misc]
            if raw is None:  # Redis may have lost it
                await self.show(await self.load(batch_id))
                raw = await self._redis.hget(keys.batch(batch_id), "json")  # type: ignore[misc]
            found: dict[str, Any] = orjson.loads(raw)
            if tenant in (None, found["tenant"]):
                return dict(found["batch"])
        raise UnknownBatchError(batch_id)

    async def list(self, tenant: str | None, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Batches, the newest first, and whether there are more.

        Raises:
            InvalidRequestError: ``after`` is no id of a batch.
        """
        if after is not None and not BATCH_ID.fullmatch(after):
            raise InvalidRequestError(
                f"Invalid value for 'after': {after[:80]!r} is no id of a batch.", param="after", code="invalid_value"
            )
        name = keys.BATCHES if tenant is None else keys.batches_of(tenant)
        ids = await self._redis.zrevrangebylex(name, f"({after}" if after else "+", "-", start=0, num=limit + 1)
        pipe = self._redis.pipeline(transaction=False)
        for batch_id in ids[:limit]:
            pipe.hget(keys.batch(batch_id.decode()), "json")
        rows = await pipe.execute() if ids else []
        return [orjson.loads(raw)["batch"] for raw in rows if raw is not None], len(ids) > limit

    async def cancel(self, batch_id: str, tenant: str | None) -> dict[str, Any]:
        """Stops a batch; one that is cancelled stays as it is.

        Raises:
            UnknownBatchError: as `get`.
            InvalidRequestError: it has ended otherwise.
        """
        await self.get(batch_id, tenant)
        batch = await self.load(batch_id)
        if batch.state in ("failed", "completed", "expired", "finalizing"):
            raise InvalidRequestError(
                f"Cannot cancel a batch with status '{batch.state}'.", param="batch_id", code="batch_ended"
            )
        await self._tell(batch_id, "cancelling", Cancelling(int(self._clock())))
        batch = await self.load(batch_id)
        await self.show(batch)
        return batch.to_dict()

    async def load(self, batch_id: str) -> Batch:
        """A batch from its facts.

        Raises:
            UnknownBatchError: there is none.
        """
        manifest = await self._fact(batch_id, "manifest", Manifest)
        if manifest is None:
            raise UnknownBatchError(batch_id)
        validated = await self._fact(batch_id, "validated", Validated)
        cancelling = await self._fact(batch_id, "cancelling", Cancelling)
        ended = await self._fact(batch_id, "ended", Ended)
        head = Head()
        if ended is None and validated is not None:
            rank = await self._redis.hget(keys.batch(batch_id), "rank")  # type: ignore[misc]
            head = await Ledger(self.storage, batch_id).last(int(rank or 0) % SEGMENTS)
        return Batch(manifest, validated, cancelling, head, ended)

    async def validated(self, batch: Batch, fact: Validated) -> None:
        """The input was read."""
        await self._tell(batch.manifest.id, "validated", fact)

    async def ended(self, batch: Batch, fact: Ended) -> None:
        """It is over."""
        await self._tell(batch.manifest.id, "ended", fact)

    async def show(self, batch: Batch) -> bool:
        """Brings what clients see up to date; False: it is further than this already."""
        manifest = batch.manifest
        names = (
            keys.batch(manifest.id),
            keys.batches_of(manifest.tenant),
            keys.BATCHES,
            keys.OPEN_BATCHES,
            keys.open_batches_of(manifest.tenant),
            keys.BATCH_TICKS,
        )
        raw = orjson.dumps({"tenant": manifest.tenant, "batch": batch.to_dict()})
        return bool(
            await scripts.call(self._redis, "batch_put", names, [manifest.id, batch.rank, raw, int(batch.is_open)])
        )

    async def drop(self, batch_id: str) -> None:
        """Takes a batch that the storage does not know out of all indexes."""
        raw = await self._redis.hget(keys.batch(batch_id), "json")  # type: ignore[misc]
        pipe = self._redis.pipeline()
        if raw is not None:
            tenant = orjson.loads(raw)["tenant"]
            pipe.zrem(keys.batches_of(tenant), batch_id)
            pipe.srem(keys.open_batches_of(tenant), batch_id)
        pipe.zrem(keys.BATCHES, batch_id)
        pipe.zrem(keys.OPEN_BATCHES, batch_id)
        pipe.hdel(keys.BATCH_TICKS, batch_id)
        pipe.delete(keys.batch(batch_id))
        await pipe.execute()

    async def num_open(self, tenant: str) -> int:
        """Batches of a tenant that have not ended."""
        return int(await self._redis.scard(keys.open_batches_of(tenant)))  # type: ignore[misc]

    async def are_ours(self) -> bool:
        """Whether the batches in Redis are of this storage: nobody else may drive them. False too without any."""
        return bool(await self._identity.ours())

    async def open_ids(self) -> tuple[str, ...]:
        """Batches that have not ended, and work for ticks."""
        return tuple([batch_id.decode() for batch_id in await self._redis.zrange(keys.OPEN_BATCHES, 0, -1)])

    async def open_inputs(self) -> dict[str, str]:
        """The files that batches which have not ended read, each with one of those batches."""
        batch_ids = await self.open_ids()
        pipe = self._redis.pipeline(transaction=False)
        for batch_id in batch_ids:
            pipe.hget(keys.batch(batch_id), "json")
        rows = zip(batch_ids, await pipe.execute() if batch_ids else (), strict=True)
        return {orjson.loads(raw)["batch"]["input_file_id"]: batch_id for batch_id, raw in rows if raw is not None}

    async def reindex(self) -> int:
        """If Redis lost its data: brings all batches back from the storage, the newest first; returns how many.

        It takes as long as the storage needs; cut off, it goes on with those that are not back. One that cannot be
        read is passed over.
        """
        storage_id = await self._identity.ours()
        if not storage_id or self._reindexing or await self._redis.get(keys.BATCHES_INDEXED) == storage_id:
            return 0
        self._reindexing = True
        try:
            found = {key.split("/")[1] async for key, _ in self.storage.list(PREFIX) if key.endswith("/manifest.json")}
            back = await each(sorted(found, reverse=True), self._bring_back)
            await self._redis.set(keys.BATCHES_INDEXED, storage_id)
        finally:
            self._reindexing = False
        return sum(back)

    async def _bring_back(self, batch_id: str) -> bool:
        if await self._redis.exists(keys.batch(batch_id)):
            return False
        try:
            return await self.show(await self.load(batch_id))
        except (UnknownBatchError, ValueError, TypeError, LookupError, AttributeError) as error:
            log.error("a batch cannot be read", batch=batch_id, error=repr(error))
            return False

    async def idle(self, batch_ids: Sequence[str]) -> Sequence[tuple[str, int]]:
        """Those that nobody drives at the moment, each with the number of its next tick."""
        if not batch_ids:
            return ()
        leases = await self._redis.mget([keys.batch_lease(batch_id) for batch_id in batch_ids])
        ticks = await self._redis.hmget(keys.BATCH_TICKS, list(batch_ids))  # type: ignore[misc]
        rows = zip(batch_ids, leases, ticks, strict=True)
        return [(batch_id, int(tick or 0)) for batch_id, lease, tick in rows if lease is None]

    async def take(self, batch_id: str, nonce: str) -> int | None:
        """Takes the lease; None: somebody drives the batch. Returns the number of the tick after this one."""
        tick = int(await self._redis.hincrby(keys.BATCH_TICKS, batch_id, 1))  # type: ignore[misc]
        taken = await self._redis.set(keys.batch_lease(batch_id), nonce, nx=True, px=LEASE_MS)
        return tick if taken else None

    async def keep(self, batch_id: str, nonce: str) -> bool:
        """Renews the lease; False: it is somebody else's. It saves work; what is right does not depend on it."""
        holder = await self._redis.get(keys.batch_lease(batch_id))
        if holder is None:
            return bool(await self._redis.set(keys.batch_lease(batch_id), nonce, nx=True, px=LEASE_MS))
        if holder != nonce.encode():
            return False
        return bool(await self._redis.pexpire(keys.batch_lease(batch_id), LEASE_MS))

    async def leave(self, batch_id: str, nonce: str) -> None:
        """Gives the lease back."""
        if await self._redis.get(keys.batch_lease(batch_id)) == nonce.encode():
            await self._redis.delete(keys.batch_lease(batch_id))

    async def _fact(self, batch_id: str, name: str, kind: type[T]) -> T | None:
        try:
            raw = orjson.loads(await self.storage.get(_fact_key(batch_id, name)))
        except MissingObjectError:
            return None
        fields = known_fields(kind, raw)
        if "errors" in fields:
            fields["errors"] = tuple(fields["errors"])
        return kind(**fields)

    async def _tell(self, batch_id: str, name: str, fact: Any) -> None:
        """Writes a fact; the first one stays."""
        try:
            await self.storage.put(_fact_key(batch_id, name), orjson.dumps(asdict(fact)), create=True)
        except AlreadyExistsError:
            log.info("known already", batch=batch_id, fact=name)


def _fact_key(batch_id: str, name: str) -> str:
    return f"{PREFIX}/{batch_id}/{name}.json"
