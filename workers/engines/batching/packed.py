"""The fastest way: all tokens of a step, of rows that decode and of prompts, are one sequence to the linear layers."""

from itertools import pairwise
from typing import Any

import torch

from ..trouble import memory_permitting
from . import attention
from .attention import Group, PackedStep, Packing
from .kv import KVStore, Place, Shapes
from .passes import Chunk, Model, Part, Result, Room, Row, Scored, Way
from .prefixes import Prefixes


class Packed(Way):
    """For models whose layers all keep keys and values, and attend through transformers' interface."""

    repeatable = True
    splits_prompts = True
    shares_prefixes = True

    def __init__(self, model: Model, room: Room, shapes: Shapes, prefix_bytes: int = 0) -> None:
        super().__init__(model, room)
        self._shapes = shapes
        self._store = KVStore(shapes, room.columns)
        self._prefixes = Prefixes(shapes, prefix_bytes)

    def parts(self, decode: list[Row], chunks: list[Chunk]) -> list[Part]:
        alone = [chunk for chunk in chunks if chunk.row.inputs]
        together = [chunk for chunk in chunks if not chunk.row.inputs]
        whole = [Part(decode, together)] if decode or together else []
        return whole + [Part([], [chunk]) for chunk in alone]

    def run(self, part: Part) -> Result:
        if part.chunks and part.chunks[0].row.inputs:
            return self._see(part.chunks[0])
        decode = sorted(part.decode, key=_order)
        ids = [row.last_id for row in decode]
        positions = [row.length for row in decode]
        owners = [(row.namespace, 1) for row in decode]
        segments, wanted = [], list(range(len(decode)))
        scored: list[tuple[Row, int, int, int]] = []  # where a row's tokens stand, and the length of what is before
        rest: list[int] = []
        for chunk in part.chunks:
            row, start = chunk.row, len(ids)
            ids += chunk.ids
            owners.append((row.namespace, len(chunk.ids)))
            positions += range(row.length, row.length + len(chunk.ids))
            segments.append(attention.Segment(start, len(ids), row.memory, row.length))
            if chunk.last:
                wanted.append(len(ids) - 1)
            if row.scored:
                scored.append((row, row.length, len(rest), len(rest) + len(chunk.ids)))
                rest += range(start, len(ids))
        fed = torch.tensor([ids, positions], device=self.model.device)
        step = PackedStep(self._shapes, _groups(decode, fed[1]), segments, self.model.alive)
        keep: torch.Tensor | int = 0 if len(wanted) == len(ids) else 1
        if rest or (wanted and len(wanted) < len(ids)):
            keep = torch.tensor(wanted + rest, device=self.model.device)
        with Packing(self.model.config, step) as cache:
            logits = self.model(fed[:1], fed[1:], cache, keep=keep, owners=owners)
        if step.attended != sum(shape is not None for shape in self._shapes):
            raise attention.NotPackedError("some layers of this model do not attend through the interface")
        for row in decode:
            row.length += 1
            row.memory.length = row.length
        for chunk in part.chunks:
            chunk.row.length += len(chunk.ids)
            chunk.row.memory.length = chunk.row.length
        rows = [*decode, *(chunk.row for chunk in part.chunks if chunk.last)]
        behind = logits[0, len(rows) :]
        found = [Scored(row, past, behind[first:end]) for row, past, first, end in scored]
        return Result(rows, logits[0, : len(rows)], found)

    def _see(self, chunk: Chunk) -> Result:
        """A prompt with images takes the plain pass: the mask is the model's own there, and need not be causal."""
        row, length = chunk.row, len(chunk.ids)
        cache: Any = self.model.new_cache()
        logits = self.model.extend(cache, 0, chunk.ids, row.namespace, **row.arguments(length))
        layers: list[Any] = [layer for layer in cache.layers if layer.get_seq_length()]
        for stores, layer in zip(row.memory.slab.layers(), layers, strict=True):
            for store, new in zip(stores, (layer.keys, layer.values), strict=True):
                store[row.memory.index, :, length - new.shape[2] : length] = new[0]  # a window keeps the last ones
        row.length = row.memory.length = length
        return Result([row], logits)

    def reserve(self, row: Row, columns: int, *, prompt: bool = False) -> bool:
        if row.memory is not None:
            return prompt or self._store.fit(row.memory, columns)
        row.memory = self._store.take(columns, alone=prompt)
        return row.memory is not None

    def release(self, row: Row) -> None:
        if row.memory is not None:
            self._store.free(row.memory)
        row.memory, row.length = None, 0

    def fork(self, row: Row, copy: Row) -> bool:
        copy.memory = self._store.fork(row.memory, row.length + 1)
        copy.length = row.length if copy.memory is not None else 0
        return copy.memory is not None

    def reset(self) -> None:
        self._prefixes.clear()
        self._store.trim()

    def load_prefix(self, row: Row, ids: list[int]) -> int:
        place: Place = row.memory
        with memory_permitting():
            row.length = place.length = self._prefixes.load(row.namespace, ids, place)
        return row.length

    def save_prefix(self, row: Row, ids: list[int]) -> None:
        with memory_permitting():
            self._prefixes.save(row.namespace, ids, row.memory)
            return
        self._prefixes.clear()  # some of its layers may have grown and some not


def _order(row: Row) -> tuple[int, int]:
    return id(row.memory.slab), row.memory.index


def _groups(rows: list[Row], positions: torch.Tensor) -> list[Group]:
    """Runs of rows, which are in order, side by side in a slab; ``positions`` are those of the step's tokens."""
    cuts = [0] + [i for i in range(1, len(rows)) if not _adjacent(rows[i - 1].memory, rows[i].memory)] + [len(rows)]
    groups = []
    for start, end in pairwise(cuts if rows else []):
        lengths = [row.length for row in rows[start:end]]
        place: Place = rows[start].memory
        groups.append(Group(start, end, place.slab, place.index, positions[start:end], min(lengths), max(lengths)))
    return groups


def _adjacent(a: Place, b: Place) -> bool:
    return a.slab is b.slab and a.index + 1 == b.index
