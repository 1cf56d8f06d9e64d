"""Files of tenants: their bytes and records in the storage, an index over the records in Redis.

The storage is the truth: a file is there once its record is, and its record comes after its bytes. The index can be
made again from it (``upkeep``).
"""

import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Self

import orjson
import structlog
from redis.asyncio import Redis
from ulid import ULID

from . import keys, scripts
from .errors import InvalidRequestError, StorageQuotaError, UnknownFileError
from .storage import MissingObjectError, Storage
from .storage_identity import StorageIdentity
from .versions import known_fields

log = structlog.get_logger()

BYTES_PREFIX, RECORD_PREFIX = "objects", "records"
FILE_ID = re.compile(r"file-[0-7][0-9A-HJKMNP-TV-Z]{25}")
PAGE = 1000
"""Records that a listing reads at a time."""

Order = Literal["asc", "desc"]
Json = bytes


def new_file_id(now: float | None = None) -> str:
    """An id that sorts by its time, to the millisecond."""
    return f"file-{ULID() if now is None else ULID.from_timestamp(now)}"


def object_key(file_id: str) -> str:
    """Where the bytes of a file are."""
    return f"{BYTES_PREFIX}/{file_id}"


def record_key(file_id: str) -> str:
    """Where the record of a file is."""
    return f"{RECORD_PREFIX}/{file_id}.json"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of a file. It never changes."""

    id: str
    """``file-<ulid>``."""
    tenant: str
    bytes: int
    created_at: int
    """Unix seconds: the time in the id."""
    expires_at: int | None
    """Unix seconds; None: it stays."""
    filename: str
    """As the client said it: for people, never for a path."""
    purpose: str
    status: str = "processed"

    def to_json(self) -> Json:
        """As it is stored, in Redis and beside the file."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: Json) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is no such record.
        """
        try:
            return cls(**known_fields(cls, orjson.loads(raw)))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"no record of a file: {error}") from error

    def expired(self, now: float) -> bool:
        """Whether its time is over at ``now``, in unix seconds."""
        return self.expires_at is not None and now >= self.expires_at


Records = list[FileRecord]


@dataclass(frozen=True, slots=True)
class Draft:
    """Bytes that are stored, and no file yet: a killed process leaves them, and housekeeping finds them."""

    id: str
    bytes: int


class Files:
    """All files. ``tenant`` None, where it is allowed, stands for an admin: everybody's files.

    Raises ``redis.RedisError`` and `StorageUnavailableError` when either is away.
    """

    def __init__(self, redis: "Redis", storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self.storage = storage
        self._redis = redis
        self._clock = clock
        self._identity = StorageIdentity(redis, storage)
        self._claimed = False

    async def create(
        self,
        data: bytes | AsyncIterable[bytes],
        *,
        tenant: str,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        max_stored_bytes: int = 0,
        file_id: str | None = None,
    ) -> FileRecord:
        """Stores a file: `write` and `publish` in one.

        Args:
            file_id: of `new_file_id`; the same one again replaces the file, so that a step that is repeated after a
                crash makes no second one. Two processes may do the step at once, so one that fails takes nothing away:
                it may be the other's. What then has no record goes with the leftovers.
        """
        draft = await self.write(data, file_id)
        try:
            return await self.publish(
                draft,
                tenant=tenant,
                filename=filename,
                purpose=purpose,
                expires_after_s=expires_after_s,
                max_stored_bytes=max_stored_bytes,
            )
        except BaseException:
            if file_id is None:
                await self.discard(draft)
            raise

    async def write(self, data: bytes | AsyncIterable[bytes], file_id: str | None = None) -> Draft:
        """Stores bytes that nobody sees yet. What the stream raises comes out, and nothing is left.

        Raises:
            StorageUnavailableError: or this process keeps files elsewhere than the others.
        """
        if not self._claimed:
            await self._identity.claim()
            self._claimed = True
        file_id = file_id or new_file_id(self._clock())
        return Draft(file_id, await self.storage.put(object_key(file_id), data))

    async def is_ours(self) -> bool:
        """Whether the index in Redis is of this storage; False too while no file was ever written."""
        return bool(await self._identity.ours())

    async def publish(
        self,
        draft: Draft,
        *,
        tenant: str,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        max_stored_bytes: int = 0,
    ) -> FileRecord:
        """Makes stored bytes a file.

        Args:
            max_stored_bytes: of all files of the tenant; 0: no limit.

        Raises:
            StorageQuotaError: it is too much. Whatever is raised, the draft is still there, perhaps with a record:
                `discard` takes both away.
        """
        created_at = int(ULID.from_str(draft.id.removeprefix("file-")).timestamp)
        expires_at = None if expires_after_s is None else created_at + expires_after_s
        record = FileRecord(draft.id, tenant, draft.bytes, created_at, expires_at, filename, purpose)
        check_quota(await self.stored_bytes(tenant) + draft.bytes, max_stored_bytes)
        await self.storage.put(record_key(record.id), record.to_json())
        await self._add(record, max_stored_bytes)
        return record

    async def discard(self, draft: Draft) -> None:
        """Removes stored bytes that shall not become a file."""
        await self.storage.delete([record_key(draft.id), object_key(draft.id)])

    async def get(self, file_id: str, tenant: str | None) -> FileRecord:
        """The record of a file.

        Raises:
            UnknownFileError: there is none, or it is another tenant's: the two cannot be told apart.
        """
        record = await self._find(file_id)
        if record is None or record.expired(self._clock()) or tenant not in (None, record.tenant):
            raise UnknownFileError(file_id)
        return record

    async def list(
        self,
        tenant: str | None,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: Order = "desc",
    ) -> tuple[Sequence[FileRecord], bool]:
        """Records in the order of their creation, and whether there are more.

        Args:
            after: the id that the page begins behind; its file may be gone by now.

        Raises:
            InvalidRequestError: ``after`` is no id of a file.
        """
        if after is not None and not FILE_ID.fullmatch(after):
            raise InvalidRequestError(
                f"Invalid value for 'after': {after[:80]!r} is no id of a file.", param="after", code="invalid_value"
            )
        found: Records = []
        while len(found) <= limit:
            ids = await self._page(tenant, after, order)
            records = await self.indexed(ids)
            now = self._clock()
            found += [r for r in records if not r.expired(now) and purpose in (None, r.purpose)]
            if len(ids) < PAGE:
                break
            after = ids[-1]
        return found[:limit], len(found) > limit

    async def content(self, record: FileRecord, start: int = 0) -> AsyncIterator[bytes]:
        """The bytes of a file from ``start`` on, piece by piece.

        Raises:
            UnknownFileError: it was deleted meanwhile.
        """
        try:
            async for piece in self.storage.stream(object_key(record.id), start):
                yield piece
        except MissingObjectError as error:
            log.warning("a file without its bytes", file=record.id)
            raise UnknownFileError(record.id) from error

    async def delete(self, file_id: str, tenant: str | None) -> None:
        """Deletes a file for good.

        Raises:
            UnknownFileError: as `get`.
        """
        await self.remove(await self.get(file_id, tenant))

    async def remove(self, record: FileRecord) -> None:
        """Takes a file away. What a process leaves that dies in between, housekeeping finds; and until the record is
        gone from the storage, nothing has happened."""
        await self.storage.delete([record_key(record.id)])
        await self.forget(record)
        await self.storage.delete([object_key(record.id)])

    async def ids(self) -> set[str]:
        """Of all files in the index."""
        found: set[str] = set()
        page: Sequence[str] = await self._page(None, None, "asc")
        while page:
            found.update(page)
            page = await self._page(None, page[-1], "asc")
        return found

    async def indexed(self, file_ids: Sequence[str]) -> Records:
        """The records that Redis has of these ids."""
        rows = await self._redis.mget([keys.file_record(file_id) for file_id in file_ids]) if file_ids else []
        return [FileRecord.from_json(raw) for raw in rows if raw is not None]

    async def index(self, record: FileRecord) -> None:
        """Brings a record of the storage back into the index."""
        await self._add(record, 0)

    async def forget(self, record: FileRecord) -> None:
        """Takes a record out of the index."""
        await scripts.call(self._redis, "file_remove", _keys_of(record), [record.id, record.tenant])

    async def stored(self, file_id: str) -> FileRecord | None:
        """The record that the storage has; None: it has none that can be read."""
        try:
            return FileRecord.from_json(await self.storage.get(record_key(file_id)))
        except MissingObjectError:
            return None
        except ValueError as error:
            log.error("the record of a file cannot be read", file=file_id, error=str(error))
            return None

    async def stored_bytes(self, tenant: str) -> int:
        """Of all files of a tenant."""
        return int(await self._redis.hget(keys.FILE_BYTES, tenant) or 0)  # type: ignore[misc]

    async def _add(self, record: FileRecord, limit: int) -> None:
        expiry: str | int = "" if record.expires_at is None else record.expires_at
        args: Sequence[scripts.Arg] = [record.id, record.to_json(), record.tenant, record.bytes, expiry, limit]
        added, used = await scripts.call(self._redis, "file_add", _keys_of(record), args)
        if not added:
            check_quota(used + record.bytes, limit)

    async def _find(self, file_id: str) -> FileRecord | None:
        if not FILE_ID.fullmatch(file_id):
            return None
        raw = await self._redis.get(keys.file_record(file_id))
        if raw is not None:
            return FileRecord.from_json(raw)
        record = await self.stored(file_id)  # Redis may have lost it
        if record is not None:
            await self.index(record)
        return record

    async def _page(self, tenant: str | None, after: str | None, order: Order) -> Sequence[str]:
        name = keys.FILES if tenant is None else keys.files_of(tenant)
        if order == "asc":
            ids = await self._redis.zrangebylex(name, f"({after}" if after else "-", "+", start=0, num=PAGE)
        else:
            ids = await self._redis.zrevrangebylex(name, f"({after}" if after else "+", "-", start=0, num=PAGE)
        return [i.decode() for i in ids]


def check_quota(used: int, limit: int) -> None:
    """Raises StorageQuotaError if so many bytes are more than a tenant may store; 0: no limit."""
    if limit and used > limit:
        raise StorageQuotaError(
            f"With this file, your files would take {used} bytes; the limit is {limit}. Delete files that you no "
            "longer need, or raise FASTCHAT_Q_MAX_STORED_BYTES on the server."
        )


def _keys_of(record: FileRecord) -> list[str]:
    indexes = (keys.FILES, keys.FILE_EXPIRY, keys.FILE_BYTES)
    return [keys.file_record(record.id), keys.files_of(record.tenant), *indexes]
