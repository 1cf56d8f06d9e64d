"""What keeps files in order in the background: expiry, an index that Redis lost, leftovers of dead processes.

Each step may be repeated, cut off at any point, and run in several processes at once.
"""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from redis.asyncio import Redis
from ulid import ULID

from . import keys
from .batches import Batches
from .files import BYTES_PREFIX, FILE_ID, RECORD_PREFIX, FileRecord, Files, object_key, record_key
from .loops import each

COMPARE_EVERY_S = 3600
LEFTOVER_AFTER_S = 24 * 3600
"""What no record speaks of is an upload that goes on, until it is so old."""
MAX_EXPIRED = 1000
"""Expired files that one tick deletes."""


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What a tick did, in files."""

    expired: int = 0
    indexed: int = 0
    """Came back into the index."""
    forgotten: int = 0
    """Left the index: the storage has them no more."""
    leftovers: int = 0


async def tick(files: Files, redis: "Redis", clock: Callable[[], float] = time.time) -> Upkeep:
    """Deletes what has expired; once an hour, and when Redis has lost it, compares the index with the storage."""
    if not await files.is_ours():
        return Upkeep()
    expired = await _expire(files, redis, clock())  # first: it gives room where there is none
    indexed = forgotten = leftovers = 0
    if not await redis.exists(keys.FILES_COMPARED):
        indexed, forgotten, leftovers = await _compare(files, clock())
        await redis.set(keys.FILES_COMPARED, "1", ex=COMPARE_EVERY_S)
    return Upkeep(expired, indexed, forgotten, leftovers)


async def _expire(files: Files, redis: "Redis", now: float) -> int:
    ids = [i.decode() for i in await redis.zrangebyscore(keys.FILE_EXPIRY, "-inf", now, start=0, num=MAX_EXPIRED)]
    needed = await Batches(redis, files.storage).open_inputs() if ids else {}
    records = await files.indexed([file_id for file_id in ids if file_id not in needed])
    await each(records, files.remove)
    return len(records)


async def _compare(files: Files, now: float) -> tuple[int, int, int]:
    """The index first: whatever is in it had its record in the storage before."""
    indexed = await files.ids()
    stored = {file_id async for file_id in _ids_under(files, RECORD_PREFIX)}
    lost, gone = stored - indexed, sorted(indexed - stored)

    async def bring_back(file_id: str) -> None:
        record = await files.stored(file_id)
        if record is not None:
            await files.index(record)
            await forget_if_deleted(record)

    async def forget_if_deleted(record: FileRecord) -> None:
        if await files.storage.size(record_key(record.id)) is None:
            await files.forget(record)

    await each(sorted(lost), bring_back)
    await each(await files.indexed(gone), forget_if_deleted)
    return len(lost), len(gone), await _remove_leftovers(files, stored, now)


async def _remove_leftovers(files: Files, stored: set[str], now: float) -> int:
    """Bytes without a record: of uploads whose process died, or of files that were being deleted when it did."""
    old = [
        file_id
        async for file_id in _ids_under(files, BYTES_PREFIX)
        if file_id not in stored and now - _made_at(file_id) > LEFTOVER_AFTER_S
    ]
    orphans = [file_id for file_id in old if await files.storage.size(record_key(file_id)) is None]
    await files.storage.delete(object_key(file_id) for file_id in orphans)
    return len(orphans) + await files.storage.remove_partial(LEFTOVER_AFTER_S)


async def _ids_under(files: Files, prefix: str) -> AsyncIterator[str]:
    """Ids of files that have an object there; what else may lie there is left alone."""
    async for key, _ in files.storage.list(prefix):
        file_id = key.rpartition("/")[2].removesuffix(".json")
        if FILE_ID.fullmatch(file_id):
            yield file_id


def _made_at(file_id: str) -> float:
    return ULID.from_str(file_id.removeprefix("file-")).timestamp
