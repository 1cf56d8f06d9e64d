"""Rows that decode together: one forward pass a step over a left-padded KV cache that rows join and leave.

Only models whose every layer keeps plain keys and values are batched this way; any other cache (sliding window,
recurrent state) goes into a `Batch` of its own, one row each, which is exactly what ``generate`` does.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

GROW_COLUMNS = 128


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A DynamicLayer whose storage grows in blocks: torch.cat a step would copy the whole cache for every token."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.adopt(keys, values)

    def adopt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes tensors (rows, heads, columns, head size), with room for more columns behind them."""
        self._key_store = functional.pad(keys, (0, 0, 0, GROW_COLUMNS))
        self._value_store = functional.pad(values, (0, 0, 0, GROW_COLUMNS))
        self._show(keys.shape[-2])

    def _show(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._columns = columns
        keys, values = self._key_store[:, :, :columns], self._value_store[:, :, :columns]
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new columns behind the old ones and returns all of them."""
        start, end = self._columns, self._columns + key_states.shape[-2]
        if end > self._key_store.shape[-2]:
            self.adopt(self._key_store[:, :, :start], self._value_store[:, :, :start])
        self._key_store[:, :, start:end] = key_states
        self._value_store[:, :, start:end] = value_states
        return self._show(end)


class Forward:
    """A causal LM's forward pass with the argument names that this architecture has."""

    def __init__(self, model: PreTrainedModel) -> None:
        parameters = inspect.signature(model.forward).parameters
        self._model = model
        self._cache_name = "past_key_values" if "past_key_values" in parameters else "cache_params"
        self._takes_positions = "position_ids" in parameters
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.device = model.device
        layers = self.new_cache().layers
        self.batchable = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def new_cache(self) -> DynamicCache:
        """An empty cache with the kinds of layer that this architecture wants."""
        return DynamicCache(config=self._model.config.get_text_config(decoder=True))

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """ids and positions (rows, columns) -> logits of the last column (rows, vocabulary) float32."""
        kwargs: dict[str, Any] = {self._cache_name: cache, **self._extra}
        if self._takes_positions:
            kwargs["position_ids"] = positions
        output = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **kwargs)
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def prefill(self, ids: Sequence[int]) -> tuple[torch.Tensor, DynamicCache]:
        """A prompt in one pass -> logits (1, vocabulary) and its one-row cache."""
        cache = self.new_cache()
        columns = torch.tensor([ids], device=self.device)
        positions = torch.arange(len(ids), device=self.device)[None]
        return self(columns, positions, cache, None), cache


class Row(Protocol):
    """What a batch needs to know of a row."""

    @property
    def last_id(self) -> int:
        """The token that the next decode step feeds."""


R = TypeVar("R", bound=Row)


class Batch(Generic[R]):
    """Rows right-aligned in one cache: all write the same column, shorter ones are padded on the left."""

    def __init__(self, forward: Forward, row: R, cache: DynamicCache, columns: int) -> None:
        self._forward = forward
        self._cache = cache
        self._columns = columns
        self._pads = [0]
        self.rows: list[R] = [row]
        if forward.batchable:
            cache.layers = [GrowingLayer(*_tensors(layer)) for layer in cache.layers]

    def join(self, row: R, cache: DynamicCache, columns: int) -> None:
        """Adds a row with the cache of its prefill, which holds ``columns`` positions."""
        width = max(self._columns, columns)
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            assert isinstance(mine, GrowingLayer)  # only batchable models join
            pairs = zip(_tensors(mine), _tensors(theirs), strict=True)
            mine.adopt(*(torch.cat([_pad_left(a, width), _pad_left(b, width)]) for a, b in pairs))
        self._pads = [pad + width - self._columns for pad in self._pads] + [width - columns]
        self._columns = width
        self.rows.append(row)

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps the rows at these indices (at least one), and drops columns that no row uses any more."""
        self._pads = [self._pads[i] for i in kept]
        self.rows = [self.rows[i] for i in kept]
        cut = min(self._pads)
        index = torch.tensor(kept, device=self._forward.device)
        for layer in self._cache.layers:
            assert isinstance(layer, GrowingLayer)
            keys, values = _tensors(layer)
            layer.adopt(keys[index][:, :, cut:], values[index][:, :, cut:])
        self._pads = [pad - cut for pad in self._pads]
        self._columns -= cut

    def decode(self) -> torch.Tensor:
        """Feeds each row's last token -> logits (rows, vocabulary) float32."""
        device = self._forward.device
        ids = torch.tensor([[row.last_id] for row in self.rows], device=device)
        pads = torch.tensor(self._pads, device=device)[:, None]  # (rows, 1)
        mask = None
        if any(self._pads):
            mask = (torch.arange(self._columns + 1, device=device)[None] >= pads).long()
        logits = self._forward(ids, self._columns - pads, self._cache, mask)
        self._columns += 1
        return logits


def _tensors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.keys, layer.values


def _pad_left(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    return functional.pad(tensor, (0, 0, columns - tensor.shape[-2], 0))
