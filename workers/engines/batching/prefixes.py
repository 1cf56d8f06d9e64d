"""Computed prefixes of prompts, kept in blocks of tokens: a prompt that begins as an earlier one did skips that part.

A block is known by a hash over its tokens and all before them, so that equal blocks behind different texts differ. The
least recently used go first when the memory is full.
"""

import hashlib
from array import array
from collections import OrderedDict

import torch

from .kv import Place, Shapes

BLOCK = 32
"""Tokens of a block."""
GROW_BLOCKS = 64


class Prefixes:
    """Blocks of keys and values, at the most ``limit_bytes`` of them; for each layer (blocks, heads, BLOCK, size)."""

    def __init__(self, shapes: Shapes, limit_bytes: int) -> None:
        per_block = BLOCK * sum(shape.bytes_per_column for shape in shapes if shape is not None)
        self._shapes = shapes
        self._limit = limit_bytes // per_block if per_block else 0
        self._blocks: OrderedDict[bytes, int] = OrderedDict()  # hash -> index, least recently used first
        self._free: list[int] = []
        self._rows = 0
        self._keys: list[torch.Tensor | None] = [None] * len(shapes)
        self._values: list[torch.Tensor | None] = [None] * len(shapes)
        self.hits = 0
        """Tokens that were not computed again."""

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, namespace: str, ids: list[int], place: Place) -> int:
        """Writes the longest known prefix of these tokens to a place, all but the last token; returns its tokens."""
        if not self._blocks:
            return 0
        known = []
        for name in _names(namespace, ids[: len(ids) - 1]):
            if name not in self._blocks:
                break
            known.append(name)
        self._use(known)
        found = [self._blocks[name] for name in known]
        if found:
            for stored, kept in self._pairs(place):
                blocks = kept[torch.tensor(found, device=kept.device)].transpose(0, 1).flatten(1, 2)
                stored[place.index, :, : blocks.shape[1]] = blocks
            self.hits += len(found) * BLOCK
        return len(found) * BLOCK

    def save(self, namespace: str, ids: list[int], place: Place) -> None:
        """Keeps the blocks of these tokens, whose keys and values lie at a place."""
        if not self._limit:
            return
        names = _names(namespace, ids)[: self._limit]
        new = [i for i, name in enumerate(names) if name not in self._blocks]
        rows = self._take(len(new), keep=set(names)) if new else []
        new = new[: len(rows)]
        if not new:
            self._use(names)
            return
        for stored, kept in self._pairs(place):
            row = stored[place.index, :, : (new[-1] + 1) * BLOCK]
            blocks = row.view(row.shape[0], -1, BLOCK, row.shape[2]).transpose(0, 1)  # (blocks, heads, BLOCK, size)
            chosen = blocks[new[0] :] if len(new) == new[-1] + 1 - new[0] else blocks[new]
            kept[torch.tensor(rows, device=kept.device)] = chosen
        self._blocks.update(zip((names[i] for i in new), rows, strict=True))
        self._use(names)

    def clear(self) -> None:
        """Forgets everything and gives the memory back."""
        self._blocks.clear()
        self._free, self._rows = [], 0
        self._keys = [None] * len(self._shapes)
        self._values = [None] * len(self._shapes)

    def _use(self, names: list[bytes]) -> None:
        """Marks blocks of one text, in order; the last of them goes first, being of no use without those before it."""
        for name in reversed(names):
            if name in self._blocks:
                self._blocks.move_to_end(name)

    def _take(self, count: int, keep: set[bytes]) -> list[int]:
        """Indices for new blocks, at the most so many; older blocks give way, but not those to keep."""
        if len(self._free) < count and self._rows < self._limit:
            self._grow(min(self._limit, max(self._rows * 2, self._rows + count, GROW_BLOCKS)))
        while len(self._free) < count:
            oldest = next((name for name in self._blocks if name not in keep), None)
            if oldest is None:
                break
            self._free.append(self._blocks.pop(oldest))
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _grow(self, rows: int) -> None:
        for i, shape in enumerate(self._shapes):
            if shape is None:
                continue
            for store, heads, size in (
                (self._keys, shape.heads, shape.key_size),
                (self._values, shape.value_heads, shape.value_size),
            ):
                new = torch.empty(rows, heads, BLOCK, size, dtype=shape.dtype, device=shape.device)
                old = store[i]
                if old is not None:
                    new[: self._rows] = old
                store[i] = new
        self._free += range(self._rows, rows)
        self._rows = rows

    def _pairs(self, place: Place) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(slab's tensor, blocks' tensor) of each layer's keys and values."""
        both = zip(place.slab.keys + place.slab.values, self._keys + self._values, strict=True)
        return [(stored, kept) for stored, kept in both if stored is not None and kept is not None]


def _names(namespace: str, ids: list[int]) -> list[bytes]:
    """A name for each whole block of these tokens."""
    names, name = [], namespace.encode()
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        name = hashlib.blake2b(name + array("q", ids[start : start + BLOCK]).tobytes(), digest_size=16).digest()
        names.append(name)
    return names
