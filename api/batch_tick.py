"""One tick of a batch, from wherever it stands: validate, work on it for a while, put its files together."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Coroutine
from dataclasses import replace
from secrets import token_hex
from typing import Any, TypeVar

import structlog
from redis.exceptions import OutOfMemoryError, RedisError
from ulid import ULID

from fastchat_q.batches import LEASE_MS, Batch, Ended
from fastchat_q.errors import FastchatQError, StorageFullError, StorageUnavailableError, UnknownBatchError
from fastchat_q.ledger import Ledger, Part
from fastchat_q.loops import AWAY, PreemptedError, unless
from fastchat_q.storage import MissingObjectError

from .batch_lines import no_such_input
from .batch_run import NO_MEMORY, Run, SupersededError, Tools
from .batch_validation import Validation

log = structlog.get_logger()
T = TypeVar("T")

TICK_S = 15.0
"""Then another tick goes on with the batch."""
KEEP_S = LEASE_MS / 1000 / 3
TROUBLE_S = 2.0
"""A pause when the storage is full or away, or Redis."""


class Driver(Tools):
    """Drives batches, tick by tick. Any number of them may do so at once."""

    async def advance(self, batch_id: str, tick_s: float = TICK_S) -> int | None:
        """Drives a batch for a while, if nobody else does; the number of the next tick, or None if none is needed."""
        try:
            return await self._tick(batch_id, tick_s)
        except RedisError as error:
            log.error("a batch waits for Redis", batch=batch_id, error=str(error))
            if isinstance(error, OutOfMemoryError):
                with contextlib.suppress(*AWAY, FastchatQError):
                    await self.batches.show(replace(await self.batches.load(batch_id), trouble=NO_MEMORY))
            await asyncio.sleep(TROUBLE_S)
            return None  # found again within a second

    async def _tick(self, batch_id: str, tick_s: float) -> int | None:
        nonce, until = token_hex(8), time.monotonic() + tick_s
        tick = await self.batches.take(batch_id, nonce)
        if tick is None:
            return None
        try:
            batch = await self.batches.load(batch_id)
            open_still = await self._advance(batch, nonce, until)
        except UnknownBatchError:
            log.error("an open batch without a manifest", batch=batch_id)
            if await self.files.is_ours():  # another storage may have it
                await self.batches.drop(batch_id)
            return None
        except SupersededError:
            log.info("somebody else drives the batch", batch=batch_id)
            return None
        finally:
            await asyncio.shield(self.batches.leave(batch_id, nonce))
        return tick if open_still else None

    async def _advance(self, batch: Batch, nonce: str, until: float) -> bool:
        try:
            if batch.state == "validating" or (batch.cancelling and batch.validated is None):
                batch = await self._validated(batch, nonce)
            if batch.is_open and not batch.head.closed:
                run = Run(self, batch, nonce)
                if not await self._kept(batch, nonce, run.run(until)):
                    return True
                batch = run.batch
            if batch.is_open:
                batch = await self._kept(batch, nonce, self._finish(batch))
            if batch.ended is not None:  # perhaps by somebody who died before this
                await Ledger(self.batches.storage, batch.manifest.id).delete()
            await self.batches.show(batch)
        except MissingObjectError as error:
            found = await self.batches.load(batch.manifest.id)
            if found.ended is None:
                return await self._wait(batch, f"The storage has no object {error} any more.")
            raise SupersededError from error
        except (StorageFullError, StorageUnavailableError) as error:
            return await self._wait(batch, error.message)
        return False

    async def _wait(self, batch: Batch, trouble: str) -> bool:
        """The storage is full or away: clients see why nothing happens, and the next tick tries again."""
        log.error("a batch waits for the storage", batch=batch.manifest.id, error=trouble)
        await self.batches.show(replace(batch, trouble=trouble))
        await asyncio.sleep(TROUBLE_S)
        return True

    async def _kept(self, batch: Batch, nonce: str, work: Coroutine[Any, Any, T]) -> T:
        """Does something that takes its time, and keeps the lease meanwhile; stops it when somebody else has the lease.

        Raises:
            SupersededError: somebody has.
        """

        async def keep() -> None:
            while True:
                await asyncio.sleep(KEEP_S)
                with contextlib.suppress(*AWAY):
                    if not await self.batches.keep(batch.manifest.id, nonce):
                        return

        try:
            return await unless(keep(), work)
        except PreemptedError as error:
            raise SupersededError from error

    async def _validated(self, batch: Batch, nonce: str) -> Batch:
        await self.catalog.refresh()
        validation = Validation(batch, self.batches.storage, self.catalog, self.settings, int(self.clock()))
        found = await self._kept(batch, nonce, validation.run())
        await self.batches.validated(batch, found)
        batch = await self.batches.load(batch.manifest.id)
        await self.batches.show(batch)
        return batch

    async def _finish(self, batch: Batch) -> Batch:
        """The ledger is closed: its lines become files. Each step may be repeated, with the same ids of files."""
        head = batch.head
        await self.batches.show(batch)
        output = await self._file(batch, "output") if head.completed else None
        errors = await self._file(batch, "errors") if head.failed else None
        ended = Ended(
            at=int(self.clock()),
            state=head.closed,
            closed_at=head.closed_at,
            output_file_id=output,
            error_file_id=errors,
            completed=head.completed,
            failed=head.failed,
            prompt_tokens=head.prompt_tokens,
            completion_tokens=head.completion_tokens,
            errors=(no_such_input(batch.manifest.input_file_id).to_dict(None),) if head.closed == "failed" else (),
        )
        await self.batches.ended(batch, ended)
        batch = await self.batches.load(batch.manifest.id)
        log.info(
            "batch ended", batch=batch.manifest.id, state=batch.state, completed=head.completed, failed=head.failed
        )
        return batch

    async def _file(self, batch: Batch, part: Part) -> str:
        manifest = batch.manifest
        record = await self.files.create(
            Ledger(self.batches.storage, manifest.id).read(part, batch.head),
            tenant=manifest.tenant,
            filename=f"{manifest.id}_{part}.jsonl",
            purpose="batch_output",
            expires_after_s=manifest.output_expires_after_s,
            file_id=result_file_id(batch, part),
        )
        return record.id


def result_file_id(batch: Batch, part: Part) -> str:
    """The same each time a step is repeated, and with the time at which the last line was answered."""
    noise = hashlib.blake2b(f"{batch.manifest.id} {part}".encode(), digest_size=10).digest()
    return f"file-{ULID((batch.head.closed_at * 1000).to_bytes(6, 'big') + noise)}"
