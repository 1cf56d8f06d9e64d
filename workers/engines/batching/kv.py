"""KV memory of the step loop: slabs of rows that requests take and give back. Knows tensors, and no model or request.

A row lies in a slab of rows with the same number of columns; column = position. What joins or leaves copies one row at
the most, and a row that outgrows its slab moves to the next size, so nothing is ever copied for the whole batch. The
rows of a slab attend in one call, padded to its longest row: since sizes double, at most half of that is padding, and a
long row costs its short neighbours nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..trouble import is_out_of_memory, memory_permitting

SMALLEST = 64
"""Columns of the smallest slab."""
LARGEST_SHARED = 1024
"""Rows with more columns lie in a slab each: their attention is long enough to be worth a call of its own."""
FIRST_ROWS = 4
"""A slab begins with so many rows, if there is room, and doubles from there."""
STEP = 256
"""Columns of a slab for one row are a multiple of this."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps for each column of a row. ``window``: it sees so many positions, None all."""

    heads: int
    key_size: int
    value_heads: int
    value_size: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None

    @property
    def bytes_per_column(self) -> int:
        return (self.heads * self.key_size + self.value_heads * self.value_size) * self.dtype.itemsize


Shapes = tuple[LayerShape | None, ...]
"""One a layer; None: the layer keeps no keys and values."""


@dataclass(eq=False, slots=True)
class Place:
    """Where one request's keys and values lie. ``length`` columns of it are filled; ``owner`` is whoever took it."""

    slab: "Slab"
    index: int
    length: int = 0
    owner: Any = None

    @property
    def columns(self) -> int:
        return self.slab.columns


class Slab:
    """Rows of one size: for each layer keys (rows, heads, columns, size) and values alike; the first rows are taken."""

    def __init__(self, shapes: Shapes, columns: int, rows: int) -> None:
        self.columns = columns
        self.rows = 0
        """Rows that there is memory for."""
        self.places: list[Place] = []
        self.keys: list[torch.Tensor | None] = [None] * len(shapes)
        self.values: list[torch.Tensor | None] = [None] * len(shapes)
        self._shapes = shapes
        self.resize(rows)

    def resize(self, rows: int, columns: int | None = None) -> None:
        """Makes room for so many rows, layer by layer, so that never more than one layer is there twice.

        If there is no memory for a layer, some have the new size and some the old one, and what all have counts.
        """
        taken, filled = len(self.places), max((place.length for place in self.places), default=0)
        columns = columns or self.columns
        self.rows, self.columns = min(rows, self.rows), min(columns, self.columns)
        for i, shape in enumerate(self._shapes):
            if shape is None:
                continue
            keys = torch.zeros(rows, shape.heads, columns, shape.key_size, dtype=shape.dtype, device=shape.device)
            values = torch.zeros(
                rows, shape.value_heads, columns, shape.value_size, dtype=shape.dtype, device=shape.device
            )
            for new, old in ((keys, self.keys[i]), (values, self.values[i])):
                if old is not None and taken:
                    new[:taken, :, :filled] = old[:taken, :, :filled]
            self.keys[i], self.values[i] = keys, values
        self.rows, self.columns = rows, columns

    @property
    def held(self) -> int:
        """Rows that some layer has memory for: more than ``rows`` after a `resize` for which there was none."""
        return max((keys.shape[0] for keys, _ in self.layers()), default=self.rows)

    def layers(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for keys, values in zip(self.keys, self.values, strict=True):
            if keys is not None and values is not None:
                yield keys, values


def copy_row(source: Slab, i: int, target: Slab, j: int, columns: int) -> None:
    """Copies the first columns of a row to another place, which may be in the same slab."""
    for mine, theirs in zip(source.layers(), target.layers(), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            b[j, :, :columns] = a[i, :, :columns]


@dataclass(slots=True)
class KVStore:
    """All slabs, within a limit of ``budget`` columns over all rows. Places are taken and freed between steps only."""

    shapes: Shapes
    budget: int
    shared: dict[int, Slab] = field(default_factory=dict)
    """Slabs of several rows by their columns."""
    single: list[Slab] = field(default_factory=list)

    @property
    def allocated(self) -> int:
        """Columns that memory is taken for."""
        return sum(slab.rows * slab.columns for slab in [*self.shared.values(), *self.single])

    @property
    def bytes_per_column(self) -> int:
        return sum(shape.bytes_per_column for shape in self.shapes if shape is not None)

    def take(self, columns: int, *, alone: bool = False) -> Place | None:
        """A row with at least so many columns; None: there is no room.

        Args:
            alone: in a slab of its own, whatever its size: it is not yet among the rows that decode.
        """
        size = self._size(columns)
        if alone or size > LARGEST_SHARED:
            if size > LARGEST_SHARED:
                size = min(max(self.budget, columns), -(-columns // STEP) * STEP)
            if not self._make_room(size):
                return None
            slab = Slab(self.shapes, size, 1)
            self.single.append(slab)
        else:
            slab = self.shared.get(size) or Slab(self.shapes, size, 0)
            if len(slab.places) == slab.rows and not self._enlarge(slab):
                return None
            self.shared[size] = slab
        place = Place(slab, len(slab.places))
        slab.places.append(place)
        return place

    def free(self, place: Place) -> None:
        """Gives a row back; the last row of its slab takes its index."""
        slab = place.slab
        last = slab.places.pop()
        if last is not place:
            copy_row(slab, last.index, slab, place.index, last.length)
            slab.places[place.index] = last
            last.index = place.index
        if not slab.places:
            if slab in self.single:
                self.single.remove(slab)
            elif len(self.shared) > 1:  # the only slab stays: the next request wants the same
                del self.shared[slab.columns]

    def fit(self, place: Place, columns: int) -> bool:
        """Moves a row to where it has at least so many columns, and among others of its size; False: no room."""
        slab = place.slab
        alone = slab in self.single
        if columns <= slab.columns and not (alone and slab.columns <= LARGEST_SHARED):
            return True
        if alone and columns > LARGEST_SHARED:
            for size in (columns * 5 // 4, columns):
                size = min(self.budget, -(-size // STEP) * STEP)
                if columns <= size and self._make_room(size - slab.columns):
                    slab.resize(1, size)
                    return True
            return False
        new = self.take(columns)
        if new is None:
            return False
        self._move(place, new)
        return True

    def fork(self, place: Place, columns: int) -> Place | None:
        """A copy of a row, with at least so many columns; None: there is no room."""
        new = self.take(columns)
        if new is not None:
            copy_row(place.slab, place.index, new.slab, new.index, place.length)
            new.length = place.length
        return new

    def trim(self) -> None:
        """Gives back the memory of rows that nobody has."""
        for columns, slab in list(self.shared.items()):
            if not slab.places:
                del self.shared[columns]
            elif len(slab.places) < slab.held:
                with memory_permitting():
                    slab.resize(len(slab.places))

    def clear(self) -> None:
        """Forgets all rows, and gives all memory back."""
        self.shared.clear()
        self.single.clear()

    def _move(self, place: Place, new: Place) -> None:
        """Puts a row at a place that was taken for it; the place object of the row stays the one that it has."""
        copy_row(place.slab, place.index, new.slab, new.index, place.length)
        old = Place(place.slab, place.index)
        place.slab.places[place.index] = old
        new.slab.places[new.index] = place
        place.slab, place.index = new.slab, new.index
        self.free(old)

    def _size(self, columns: int) -> int:
        size = SMALLEST
        while size < columns:
            size *= 2
        return min(size, max(self.budget, columns))

    def _enlarge(self, slab: Slab) -> bool:
        for more in (max(FIRST_ROWS, slab.rows), 1):
            if not self._make_room(more * slab.columns):
                continue
            try:
                slab.resize(slab.rows + more)
            except Exception as error:
                if more == 1 or not is_out_of_memory(error):
                    raise
            else:
                return True
        return False

    def _make_room(self, columns: int) -> bool:
        if self.allocated + columns > self.budget:
            spare = sum((slab.rows - len(slab.places)) * slab.columns for slab in self.shared.values())
            if self.allocated - spare + columns > self.budget:
                return False
            self.trim()
        return True
