"""Where bytes lie that outlive a request: a folder or a bucket. It knows keys and bytes, and not whose they are.

On obstore (docs/decisions/0013-storage.md). Keys are ours, opaque: no client's text is ever part of one.
"""

import asyncio
import contextlib
import errno
import os
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import obstore
import structlog
from obstore.exceptions import AlreadyExistsError as ObstoreExists
from obstore.exceptions import BaseError, GenericError
from obstore.store import LocalStore, from_url
from ulid import ULID

from .errors import ConfigurationError, StorageFullError, StorageUnavailableError
from .settings import Settings

log = structlog.get_logger()

CHUNK = 256 * 1024
"""At least so many bytes a piece of a stream has, but the last."""
PARTS_AT_A_TIME = 2
"""Parts of an upload, 5 MiB each, that are under way: what an upload may hold in memory."""
DELETE_AT_A_TIME = 1000
PATIENCE = timedelta(seconds=20)
"""How long a bucket's request may be tried again."""
PARTIAL = "partial"
"""Local only: the folder of what is being written. The rest of the tree holds whole objects and nothing else."""
FULL = re.compile(rf"os error ({errno.ENOSPC}|{errno.EDQUOT})\b")
SHOWN = 200


class AlreadyExistsError(Exception):
    """There is an object with this key; it was left as it is."""


class MissingObjectError(LookupError):
    """There is no object with this key."""


class Storage:
    """Objects by key. A put is atomic: its object is there whole, or not at all.

    When a put has returned, its object survives a power cut: in a bucket by its contract, in a folder because it is
    written aside, synced, renamed, and the folder synced (obstore renames, and syncs nothing).

    Every method raises `StorageUnavailableError`, and a put also `StorageFullError`.

    Args:
        url: ``file:///folder``, ``s3://bucket/prefix``, ``gs://…``, ``az://…``, or ``memory://`` (this process alone).
            Credentials and endpoints come from the environment, as obstore reads it (``AWS_…``, ``GOOGLE_…``,
            ``AZURE_…``).

    Raises:
        ConfigurationError: the URL cannot be used. Whether a folder can be written to is seen when it is first needed.
    """

    def __init__(self, url: str) -> None:
        self._folder = Path(url.removeprefix("file://")) if url.startswith("file:///") else None
        try:
            if self._folder is None and url.startswith("file:"):
                raise ValueError("a folder is named with all that is above it")
            self._remote: Any = None if self._folder else _open(url)
        except (BaseError, ValueError) as error:
            raise ConfigurationError(
                f"FASTCHAT_Q_STORAGE_URL is {url!r}, which cannot be used: {_short(error)}. Give file:///folder, "
                "s3://bucket/prefix, gs://bucket/prefix or az://container/prefix."
            ) from error

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The storage that the settings name; without one: the folder ``files`` in the state directory.

        Raises:
            ConfigurationError: the URL cannot be used.
        """
        return cls(settings.storage_url or f"file://{settings.state_dir.absolute() / 'files'}")

    async def put(self, key: str, data: bytes | AsyncIterable[bytes], *, create: bool = False) -> int:
        """Stores an object and returns its size. A stream that raises leaves nothing behind, and its error comes out.

        Args:
            create: only if there is none with this key, decided by the storage itself. In a bucket, a stream is then
                held in memory: for small objects.

        Raises:
            AlreadyExistsError: with ``create``: there is one.
        """
        counted = None if isinstance(data, bytes) else _Counted(data)
        with _errors(key, put=True):
            if self._folder is None:
                await self._put(key, data if counted is None else counted, "create" if create else "overwrite")
            else:
                await self._put_synced(self._folder, key, data if counted is None else counted, create)
        return len(data) if isinstance(data, bytes) else counted.size if counted else 0

    async def get(self, key: str) -> bytes:
        """A whole object.

        Raises:
            MissingObjectError: there is none.
        """
        with _errors(key):
            found = await obstore.get_async(self._store, key)
            return bytes(await found.bytes_async())

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """The bytes from ``start`` on, ``length`` of them or as many as there are.

        Raises:
            MissingObjectError: there is no such object.
        """
        if length <= 0:
            return b""
        with _errors(key):
            try:
                return bytes(await obstore.get_range_async(self._store, key, start=start, length=length))
            except GenericError:
                if start >= (await obstore.head_async(self._store, key))["size"]:
                    return b""
                raise

    async def stream(self, key: str, start: int = 0) -> AsyncIterator[bytes]:
        """An object from ``start`` on, piece by piece.

        Raises:
            MissingObjectError: there is none.
        """
        with _errors(key):
            if start and start >= (await obstore.head_async(self._store, key))["size"]:
                return
            found = await obstore.get_async(self._store, key, options={"range": {"offset": start}} if start else None)
            async for piece in found.stream(min_chunk_size=CHUNK):
                yield bytes(piece)

    async def size(self, key: str) -> int | None:
        """Of an object; None: there is none."""
        try:
            with _errors(key):
                return int((await obstore.head_async(self._store, key))["size"])
        except MissingObjectError:
            return None

    async def delete(self, keys: Iterable[str]) -> None:
        """Removes objects; those that are not there are passed over."""
        names = list(keys)
        for start in range(0, len(names), DELETE_AT_A_TIME):
            some = names[start : start + DELETE_AT_A_TIME]
            with _errors(some[0]):
                try:
                    await obstore.delete_async(self._store, some)
                except FileNotFoundError:
                    for name in some:
                        with contextlib.suppress(FileNotFoundError):
                            await obstore.delete_async(self._store, name)
        if self._folder is not None and names:
            await asyncio.to_thread(_sync_folders, {(self._folder / name).parent for name in names})

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        """Key and size of every object under a prefix of whole path segments, in no particular order."""
        with _errors(prefix):
            async for found in obstore.list(self._store, prefix, chunk_size=1000):
                for entry in found:
                    yield entry["path"], entry["size"]

    async def remove_partial(self, older_than_s: float) -> int:
        """Removes what killed processes left of their puts; returns how many. Buckets have lifecycle rules for that."""
        return 0 if self._folder is None else await asyncio.to_thread(_remove_old, self._folder / PARTIAL, older_than_s)

    @property
    def _store(self) -> Any:
        """To be used within `_errors`."""
        if self._remote is None and self._folder is not None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync(self._folder.parent)
            self._remote = LocalStore(prefix=self._folder)
        return self._remote

    async def _put(self, key: str, data: Any, mode: Any) -> None:
        await obstore.put_async(self._store, key, data, mode=mode, max_concurrency=PARTS_AT_A_TIME)

    async def _put_synced(self, folder: Path, key: str, data: Any, create: bool) -> None:
        aside = f"{PARTIAL}/{ULID()}"
        try:
            await self._put(aside, data, "overwrite")
            await asyncio.to_thread(_sync, folder / aside)
            await obstore.rename_async(self._store, aside, key, overwrite=not create)
        except BaseException:
            with contextlib.suppress(OSError):
                (folder / aside).unlink()
            raise
        await asyncio.to_thread(_sync_up, (folder / key).parent, folder)


class _Counted:
    """Counts the bytes that go through a stream."""

    def __init__(self, pieces: AsyncIterable[bytes]) -> None:
        self.size = 0
        self._pieces = aiter(pieces)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = await anext(self._pieces)
        self.size += len(piece)
        return piece


@contextlib.contextmanager
def _errors(key: str, *, put: bool = False) -> Iterator[None]:
    """What obstore raises becomes ours; errors of the stream that is being stored pass."""
    try:
        yield
    except FileNotFoundError as error:
        if put:  # it is the bucket that is missing
            raise _unavailable(key, error) from error
        raise MissingObjectError(key) from error
    except ObstoreExists as error:
        raise AlreadyExistsError(key) from error
    except (BaseError, OSError) as error:
        if FULL.search(str(error)) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            log.warning("storage is full", key=key, error=_short(error))
            raise StorageFullError(
                "The server's storage for files is full. Nothing was kept; delete files that are no longer needed, or "
                "have the operator make room."
            ) from error
        raise _unavailable(key, error) from error


def _unavailable(key: str, error: Exception) -> StorageUnavailableError:
    log.warning("storage error", key=key, error=_short(error))
    return StorageUnavailableError("The server's storage for files cannot be used at the moment.")


def _short(error: Exception) -> str:
    """The first line: obstore appends a dump of its own structures."""
    return str(error).partition("\n")[0][:SHOWN]


def _open(url: str) -> Any:
    """obstore's own patience is three minutes; a client that waits for an answer has less."""
    if url.startswith("memory:"):
        return from_url(url)
    return from_url(url, retry_config={"max_retries": 4, "retry_timeout": PATIENCE})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_up(folder: Path, root: Path) -> None:
    """Every folder on the way: any of them may be new."""
    _sync(folder)
    while folder != root:
        folder = folder.parent
        _sync(folder)


def _sync_folders(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            _sync(folder)


def _remove_old(folder: Path, older_than_s: float) -> int:
    removed = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > older_than_s:
                    os.unlink(entry.path)
                    removed += 1
    return removed
