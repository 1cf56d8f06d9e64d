"""Whether the input of a batch can be worked on: every line is looked at, and one bad line fails the whole batch."""

import asyncio
from typing import Any

from fastchat_q.batches import Batch, Validated
from fastchat_q.errors import FastchatQError, ModelNotAllowedError, ModelNotFoundError
from fastchat_q.files import object_key
from fastchat_q.settings import Settings
from fastchat_q.storage import MissingObjectError, Storage

from .admission import admit
from .batch_lines import LineError, Lines, RawLine, checked_envelope, max_line, no_such_input
from .catalog import Catalog

MAX_ERRORS = 100
"""So many are told; who has more sees the same mistake."""
YIELD_BYTES = 128 * 1024
"""Others get their turn after so much."""
PATIENCE_S = 5
"""Models that nobody knows are waited for: a Redis that lost its data has none until the next heartbeats."""
LARGE = 256 * 1024


class Validation:
    """Reads one input, holding a block of it and a number for each custom_id."""

    def __init__(self, batch: Batch, storage: Storage, catalog: Catalog, settings: Settings, at: int) -> None:
        self._batch, self._storage, self._catalog, self._settings, self._at = batch, storage, catalog, settings, at
        self._seen: set[int] = set()
        """64-bit hashes of the custom_ids, salted anew in each process."""
        self._models: dict[str, FastchatQError | None] = {}
        self._errors: list[dict[str, Any]] = []
        self._patience_s = PATIENCE_S

    async def run(self) -> Validated:
        """The verdict."""
        lines = Lines(self._storage, object_key(self._batch.manifest.input_file_id), max_line(self._settings))
        total = since = 0
        try:
            while len(self._errors) < MAX_ERRORS and (line := await lines.next()) is not None:
                total += 1
                if total > self._settings.max_batch_lines:
                    limit = self._settings.max_batch_lines
                    self._say(line.number, LineError("too_many_tasks", f"A batch may have {limit} requests."))
                    break
                await self._look_at(line)
                since += line.size + 1
                if since >= YIELD_BYTES:
                    since = 0
                    await asyncio.sleep(0)
        except MissingObjectError:
            self._say(None, no_such_input(self._batch.manifest.input_file_id))
        if not total and not self._errors:
            self._say(None, LineError("empty_file", "The input file has no requests."))
        if self._errors:
            return Validated(self._at, errors=tuple(self._errors))
        return Validated(self._at, total, next(iter(self._models)) if len(self._models) == 1 else None)

    async def _look_at(self, line: RawLine) -> None:
        try:
            endpoint = self._batch.manifest.endpoint
            large = line.size >= LARGE
            found = (
                await asyncio.to_thread(checked_envelope, line, endpoint) if large else checked_envelope(line, endpoint)
            )
            digest = hash(found.custom_id)
            if digest in self._seen:
                raise LineError(
                    "duplicate_custom_id", f"The custom_id {found.custom_id[:80]!r} is used before.", "custom_id"
                )
            self._seen.add(digest)
            if found.model not in self._models:
                self._models[found.model] = await self._trouble_with(found.model)
            trouble = self._models[found.model]
            if trouble is not None:
                raise LineError(trouble.code or "model_not_found", trouble.message, "body.model")
        except LineError as error:
            self._say(line.number, error)

    async def _trouble_with(self, model: str) -> FastchatQError | None:
        """A model that never was, or that the caller may not use. One that nobody serves just now is waited for."""
        if self._catalog.alias(model) is not None:
            try:
                self._batch.manifest.who().check_model(model)
            except ModelNotAllowedError as error:
                return error
            return None
        try:
            await admit(self._catalog, self._batch.manifest.who(), model, "lo")
        except ModelNotFoundError as error:
            if self._patience_s <= 0:
                return error
            self._patience_s -= 1
            await asyncio.sleep(1)
            return await self._trouble_with(model)
        except ModelNotAllowedError as error:
            return error
        except FastchatQError:
            pass
        return None

    def _say(self, number: int | None, error: LineError) -> None:
        self._errors.append(error.to_dict(number))
