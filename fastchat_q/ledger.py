"""The ledger of a batch: what its lines came to, as segments in the storage that are written once and never changed.

Segment N is put only if there is none: of two processes that drive a batch, by a lease that ran out unnoticed, one
alone can write it, and the other learns that it is behind. So no line is answered twice. The header of the last segment
says all that is needed to go on.
"""

from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Literal, Self

import orjson

from .storage import MissingObjectError, Storage
from .versions import known_fields

PREFIX = "batches"
HEADER_GUESS = 64 * 1024
"""Bytes that are read of a segment for its header; more if that was not all of it."""

Part = Literal["output", "errors"]
Outcome = Literal["", "completed", "cancelled", "expired", "failed"]
Place = tuple[int, int, int]
"""A line of the input: its number, where it begins, and its bytes."""


@dataclass(frozen=True, slots=True)
class Head:
    """Where a batch stands after a segment."""

    seq: int = 0
    """Of the segment; 0: there is none yet."""
    completed: int = 0
    failed: int = 0
    """Lines in the error file."""
    expired: int = 0
    """Those of them that were not answered in time."""
    line: int = 1
    """The next line of the input that no job was made of yet, and where it begins."""
    offset: int = 0
    pending: tuple[Place, ...] = ()
    """Lines before it that have no answer yet."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    closed: Outcome = ""
    """Set in the last segment of all."""
    closed_at: int = 0
    """Unix seconds; the files of results are named by it."""
    output_bytes: int = 0
    """Of this segment, behind its header."""
    error_bytes: int = 0

    def to_json(self) -> bytes:
        """One line."""
        return orjson.dumps(asdict(self)) + b"\n"

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """The inverse of `to_json`."""
        fields = known_fields(cls, orjson.loads(raw))
        return cls(**fields | {"pending": tuple([tuple(place) for place in fields["pending"]])})


class Ledger:
    """The segments of one batch. Raises `StorageUnavailableError`, and when it writes `StorageFullError`."""

    def __init__(self, storage: Storage, batch_id: str) -> None:
        self._storage, self._prefix = storage, f"{PREFIX}/{batch_id}/segments"

    async def last(self, hint: int = 0) -> Head:
        """The head of the last segment.

        Args:
            hint: a segment that was there, to look on from; without one, or if it is wrong, all are listed.
        """
        head = await self._head(hint) if hint else None
        if head is None:
            seq = max([int(key.rpartition("/")[2]) async for key, _ in self._storage.list(self._prefix)], default=0)
            head = await self._head(seq) if seq else None
        if head is None:
            return Head()
        while (after := await self._head(head.seq + 1)) is not None:
            head = after
        return head

    async def commit(self, head: Head, output: bytes, errors: bytes) -> None:
        """Writes the segment ``head.seq``: durable when this returns.

        Raises:
            AlreadyExistsError: somebody else wrote it; whoever calls this must do nothing more to the batch.
        """
        await self._storage.put(self._key(head.seq), b"".join((head.to_json(), output, errors)), create=True)

    async def read(self, part: Part, head: Head) -> AsyncIterator[bytes]:
        """All output or error lines up to a segment, one segment after the other.

        Raises:
            MissingObjectError: the batch has ended meanwhile: its files have them.
        """
        for seq in range(1, head.seq + 1):
            raw = await self._storage.get(self._key(seq))
            start = raw.index(b"\n") + 1
            found = Head.from_json(raw[:start])
            middle = start + found.output_bytes
            piece = raw[start:middle] if part == "output" else raw[middle:]
            if piece:
                yield piece

    async def delete(self) -> None:
        """Removes all segments."""
        await self._storage.delete([key async for key, _ in self._storage.list(self._prefix)])

    async def _head(self, seq: int) -> Head | None:
        key, raw, length = self._key(seq), b"", HEADER_GUESS
        try:
            while b"\n" not in raw:
                more = await self._storage.get_range(key, len(raw), length)
                if not more:
                    return None
                raw, length = raw + more, length * 4
        except MissingObjectError:
            return None
        return Head.from_json(raw[: raw.index(b"\n") + 1])

    def _key(self, seq: int) -> str:
        return f"{self._prefix}/{seq:08d}"
