"""The second way: rows decode together in one batch with padding behind them, and prompts are taken in one by one.

For models that read keys and values from the cache themselves (multi-head latent attention, ALiBi of their own making)
and for those with recurrent layers: a state has no padding once it exists, so rows can share a decode step whatever
their lengths, and only prompts, where padding would leak into it, must not be padded.
"""

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from .kv import Place, Shapes, Slab, copy_row
from .passes import Chunk, Model, Part, Result, Room, Row, Way

STATES = ("conv_states", "recurrent_states")


class Dense(Way):
    """All rows that decode lie in one slab, as wide as the longest of them."""

    shares_prefixes = False

    def __init__(self, model: Model, room: Room, shapes: Shapes) -> None:
        super().__init__(model, room)
        self._padded = any(shape is not None for shape in shapes)
        self._slab = Slab(shapes, 0, 0)
        self._states = [_States() for _ in shapes]
        self._prompts: dict[
            Row, int
        ] = {}  # rows whose prompt is not in yet, each with a cache of its own: their columns
        recurrent = any(isinstance(layer, LinearAttentionLayer) for layer in model.new_cache().layers)
        self.repeatable = not recurrent  # a pass that failed has changed some states already
        self.splits_prompts = not recurrent

    def parts(self, decode: list[Row], chunks: list[Chunk]) -> list[Part]:
        return ([Part(decode, [])] if decode else []) + [Part([], [chunk]) for chunk in chunks]

    def run(self, part: Part) -> Result:
        return self._decode(part.decode) if part.decode else self._prefill(part.chunks[0])

    def _prefill(self, chunk: Chunk) -> Result:
        row = chunk.row
        scored = []
        if row.scored:
            logits, found = self.model.extend_scored(row.memory, row, chunk.ids)
            scored.append(found)
        else:
            inputs = row.arguments(len(chunk.ids))
            logits = self.model.extend(row.memory, row.length, chunk.ids, row.namespace, **inputs)
        row.length += len(chunk.ids)
        if chunk.last:
            self._join(row)
        return Result([row], logits, scored) if chunk.last else Result([], logits[:0], scored)

    def _decode(self, rows: list[Row]) -> Result:
        rows = sorted(rows, key=lambda row: row.memory.index)
        chosen = [row.memory.index for row in rows]
        whole = chosen == list(range(len(self._slab.places)))
        lengths = [row.length for row in rows]
        fed = torch.tensor([[row.last_id for row in rows], lengths, chosen], device=self.model.device)
        step = _Step(self._slab, self._states, None if whole else fed[2], fed[1], max(lengths) + 1)
        mask = None
        if self._padded and min(lengths) != max(lengths):
            mask = (torch.arange(step.columns, device=fed.device) <= fed[1][:, None]).long()
        owners = [(row.namespace, 1) for row in rows]
        logits = self.model(fed[0][:, None], fed[1][:, None], DenseCache(step), mask, owners=owners)[:, -1]
        for row in rows:
            row.length += 1
            row.memory.length = row.length
        return Result(rows, logits)

    def reserve(self, row: Row, columns: int, *, prompt: bool = False) -> bool:
        if isinstance(row.memory, Place):
            return self._fit(len(self._slab.places), columns)
        if row.memory is None:
            if not self._promises(len(self._slab.places) + 1, columns):
                return False
            row.memory = self.model.new_cache()
            self._prompts[row] = columns
        return True

    def release(self, row: Row) -> None:
        place = row.memory
        self._prompts.pop(row, None)
        if isinstance(place, Place):
            last = self._slab.places.pop()
            if last is not place:
                copy_row(self._slab, last.index, self._slab, place.index, last.length)
                for states in self._states:
                    states.copy(last.index, place.index)
                self._slab.places[place.index] = last
                last.index = place.index
        row.memory, row.length = None, 0

    def fork(self, row: Row, copy: Row) -> bool:
        if not self._fit(len(self._slab.places) + 1, row.length + 1):
            return False
        place: Place = row.memory
        self._add(copy, row.length)
        copy_row(self._slab, place.index, self._slab, copy.memory.index, row.length)
        for states in self._states:
            states.copy(place.index, copy.memory.index)
        return True

    def reset(self) -> None:
        if not self._slab.places:
            self._slab.resize(0, 0)
            for states in self._states:
                states.clear()

    def _fit(self, rows: int, columns: int) -> bool:
        """Makes room in the slab for so many rows and columns, with some to spare if it can."""
        slab = self._slab
        if self._prompts and not self._promises(rows, columns):
            return False
        if rows <= slab.rows and columns <= slab.columns:
            return True
        needed = max([columns, *(place.length + 1 for place in slab.places)])
        roomy = max(slab.columns, -(-columns * 5 // 4 // 64) * 64)
        for more, size in ((max(rows, slab.rows * 2), roomy), (rows, max(columns, slab.columns)), (rows, needed)):
            if self.room.fits(more, more * size):
                slab.rows = min(slab.rows, more)  # that many rows have all, wherever memory may end below
                for states in self._states:
                    states.resize(more)
                slab.resize(more, size)
                return True
        return False

    def _promises(self, rows: int, columns: int) -> bool:
        """Whether so many rows, one with so many columns, and all whose prompts are not in yet find room together."""
        rows += len(self._prompts)
        # Two columns more: the rows that decode get a token in the very step at whose end a prompt joins them.
        longest = max([columns, *self._prompts.values(), *(place.length + 2 for place in self._slab.places)])
        return self.room.fits(rows, rows * longest)

    def _add(self, row: Row, length: int) -> None:
        place = Place(self._slab, len(self._slab.places), length)
        self._slab.places.append(place)
        row.memory, row.length = place, length

    def _join(self, row: Row) -> None:
        """Takes a row whose prompt is in among those that decode."""
        cache: DynamicCache = row.memory
        self._prompts.pop(row)
        row.memory = None
        if not self._fit(len(self._slab.places) + 1, row.length + 1):
            raise MemoryError("no room among the rows that decode")
        self._add(row, row.length)
        index = row.memory.index
        layers: list[Any] = cache.layers
        for i, layer in enumerate(layers):
            keys, values = self._slab.keys[i], self._slab.values[i]
            if keys is not None and values is not None:
                keys[index, :, : row.length] = layer.keys[0]
                values[index, :, : row.length] = layer.values[0]
            if isinstance(layer, LinearAttentionLayer):
                self._states[i].put(index, layer, self._slab.rows)


class _States:
    """What one recurrent layer keeps: for each of its states a tensor (rows, ...)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], torch.Tensor] = {}

    def put(self, index: int, layer: LinearAttentionLayer, rows: int) -> None:
        for kind in STATES:
            for i, state in getattr(layer, kind).items():
                if state is not None:
                    if (kind, i) not in self.rows:
                        self.rows[kind, i] = state.new_zeros(rows, *state.shape[1:])
                    self.rows[kind, i][index] = state[0]

    def copy(self, source: int, target: int) -> None:
        for tensor in self.rows.values():
            tensor[target] = tensor[source]

    def resize(self, rows: int) -> None:
        for key, old in self.rows.items():
            kept = min(rows, old.shape[0])
            new = old.new_zeros(rows, *old.shape[1:])
            new[:kept] = old[:kept]
            self.rows[key] = new

    def clear(self) -> None:
        self.rows.clear()


class _Step:
    """One decode step: which rows of the slab, and where each writes."""

    def __init__(
        self, slab: Slab, states: list[_States], chosen: torch.Tensor | None, positions: torch.Tensor, columns: int
    ) -> None:
        self.slab, self.states, self.chosen, self.positions, self.columns = slab, states, chosen, positions, columns
        self.rows = torch.arange(len(positions), device=positions.device) if chosen is None else chosen


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    def __init__(self, step: _Step, i: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._step, self._i = step, i
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a column of each row (rows, heads, 1, size) and returns all columns up to the longest row's."""
        step, shown = self._step, []
        for store, new in ((step.slab.keys[self._i], key_states), (step.slab.values[self._i], value_states)):
            assert store is not None
            rows, positions = step.rows.to(store.device), step.positions.to(store.device)
            store[rows, :, positions] = new[:, :, 0]
            view = store[:, :, : step.columns]
            shown.append(view[: len(rows)] if step.chosen is None else view[rows])
        return shown[0], shown[1]

    def get_seq_length(self) -> int:
        return self._step.columns - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._step.columns, 0


class _RecurrentLayer(LinearAttentionLayer):
    def __init__(self, step: _Step, i: int, count: int) -> None:
        super().__init__(number_of_states=count)
        self._step = step
        for (kind, state), tensor in step.states[i].rows.items():
            getattr(self, kind)[state] = tensor[: len(step.positions)]  # steps write into it
            getattr(self, f"is_{kind}_initialized")[state] = True
            if kind == "conv_states":
                self.conv_kernel_size[state] = tensor.shape[-1]
        self.has_previous_state = dict.fromkeys(range(count), True)
        if step.chosen is not None:
            raise ValueError("states are written where they lie: all rows must decode together")


class DenseCache(Cache):
    """A cache whose layers are views of the slab and of the states."""

    def __init__(self, step: _Step) -> None:
        layers: list[Any] = []
        for i, keys in enumerate(step.slab.keys):
            states = step.states[i].rows
            if states:
                layers.append(_RecurrentLayer(step, i, 1 + max(state for _, state in states)))
            else:
                layers.append(_Layer(step, i) if keys is not None else DynamicLayer())  # type: ignore[no-untyped-call]
        super().__init__(layers=layers)
