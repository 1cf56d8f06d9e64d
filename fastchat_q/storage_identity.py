"""Which storage the indexes in Redis are of. A process with another folder or bucket must not touch them."""

import contextlib
import time

import structlog
from redis.asyncio import Redis
from ulid import ULID

from . import keys
from .errors import StorageUnavailableError
from .storage import AlreadyExistsError, MissingObjectError, Storage

log = structlog.get_logger()

NAME = "storage-id"
"""An object that tells one storage from another. It never changes."""
TELL_EVERY_S = 30.0


class StorageIdentity:
    """Compares a storage with the one that Redis knows. Raises ``redis.RedisError`` and `StorageUnavailableError`."""

    def __init__(self, redis: "Redis", storage: Storage) -> None:
        self._redis, self._storage = redis, storage
        self._here = b""
        self._tell_at = 0.0

    async def ours(self) -> bytes:
        """The id of this storage if the indexes are of it; b'' if they are not, or nothing was ever written here."""
        if not self._here:
            with contextlib.suppress(MissingObjectError):
                self._here = await self._storage.get(NAME)
        there = await self._redis.get(keys.FILE_STORAGE)
        if self._here and there is None:
            await self._redis.set(keys.FILE_STORAGE, self._here, nx=True)
            there = await self._redis.get(keys.FILE_STORAGE)
        if there == self._here:
            return self._here
        if there is not None and time.monotonic() >= self._tell_at:
            self._tell_at = time.monotonic() + TELL_EVERY_S
            log.error(
                "files are kept elsewhere by other processes: give all API servers and the orchestrator the same "
                "FASTCHAT_Q_STORAGE_URL or folder; if the storage was changed on purpose: "
                f"fastchat-q redis DEL {keys.FILE_STORAGE}"
            )
        return b""

    async def claim(self) -> None:
        """Before something is written that an index in Redis speaks of.

        Raises:
            StorageUnavailableError: or this process keeps files elsewhere than the others.
        """
        if not await self.ours():
            with contextlib.suppress(AlreadyExistsError):
                await self._storage.put(NAME, str(ULID()).encode(), create=True)
            if not await self.ours():
                raise StorageUnavailableError("The server's storage for files is not set up. Its log says more.")
