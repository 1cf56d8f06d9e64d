"""Attention of one packed step over the slabs of kv.py: of rows that decode, slab by slab, and of segments of prompts.

transformers hands every layer's queries, keys and values to a function that is chosen by name. Ours writes the new keys
and values to where the step says, and lets each token see its own row and nothing else. So a forward pass has no
padding and no mask as wide as the batch: to the linear layers, all tokens of a step are one sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, Cache, PreTrainedConfig

from .kv import LayerShape, Place, Shapes, Slab

NAME = "fastchat_q"
CHOSEN = "_attn_implementation_internal"
"""The entry of a config that names the attention function."""


@dataclass(slots=True)
class Group:
    """Rows of a slab from ``first`` on, which decode one token each: the tokens ``start`` to ``end`` of the step."""

    start: int
    end: int
    slab: Slab
    first: int
    positions: torch.Tensor
    """(rows) int64: the column of each row's new token."""
    shortest: int
    longest: int
    """The smallest and the largest position."""


@dataclass(slots=True)
class Segment:
    """Some tokens of one row's prompt: the tokens ``start`` to ``end`` of the step, behind ``past`` columns."""

    start: int
    end: int
    place: Place
    past: int


@dataclass(slots=True)
class PackedStep:
    """What the layers of one forward pass need to know; masks and indices are made once and used by all layers."""

    shapes: Shapes
    groups: list[Group]
    segments: list[Segment]
    alive: Callable[[], None]
    """Called by every layer: a long step on a slow device is no hung engine."""
    layer: int = 0
    """The layer whose keys and values were handed over last."""
    attended: int = 0
    """Calls of the attention function."""
    _made: dict[Any, torch.Tensor] = field(default_factory=dict)

    def slots(self, group: int, heads: int, columns: int, device: torch.device) -> torch.Tensor:
        """(rows x heads) int64: where each row's new keys of each head go in a slab flattened to its columns."""
        key = ("slots", group, heads, columns, device)
        if key not in self._made:
            mine = self.groups[group]
            rows = mine.end - mine.start
            lines = torch.arange(mine.first * heads, (mine.first + rows) * heads, device=device).view(rows, heads)
            firsts = lines * columns
            self._made[key] = (firsts + mine.positions.to(device)[:, None]).flatten()
        return self._made[key]

    def decode_mask(self, group: int, first: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        """(rows, 1, 1, columns from ``first`` on): 0 where a row may look, else minus infinity; None: everywhere."""
        mine = self.groups[group]
        if mine.shortest == mine.longest:
            return None
        key = ("decode", group, window, like.dtype, like.device)
        if key not in self._made:
            columns = torch.arange(first, mine.longest + 1, device=like.device)[None]
            positions = mine.positions.to(like.device)[:, None]
            hidden = columns > positions
            if window is not None and mine.longest >= window:
                hidden |= columns <= positions - window
            self._made[key] = _mask(hidden, like)[:, None, None]
        return self._made[key]

    def segment_mask(self, segment: int, first: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """(tokens, columns from ``first`` on): 0 where a token may look, else minus infinity."""
        mine = self.segments[segment]
        key = ("segment", segment, window, like.dtype, like.device)
        if key not in self._made:
            end = mine.past + mine.end - mine.start
            columns = torch.arange(first, end, device=like.device)[None]
            positions = torch.arange(mine.past, end, device=like.device)[:, None]
            hidden = columns > positions
            if window is not None:
                hidden |= columns <= positions - window
            self._made[key] = _mask(hidden, like)
        return self._made[key]


class PackedCache(Cache):
    """What a model takes for its cache in a packed step: notes which layer speaks, and leaves the rest to `attend`."""

    def __init__(self, step: PackedStep) -> None:
        super().__init__(layers=[])
        self.step = step

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.step.layer = layer_idx
        self.step.alive()
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class NotPackedError(Exception):
    """This model's layers do not hand over what a packed step needs."""


_step: PackedStep | None = None  # of the thread that is in `Packing`, which no other thread does at the same time


class Packing:
    """Within it, forward passes of models with this (text) config attend as the step says."""

    def __init__(self, config: PreTrainedConfig, step: PackedStep) -> None:
        self._entries = vars(config)  # setting an attribute of a config costs more than many an operation
        self._step = step

    def __enter__(self) -> PackedCache:
        global _step
        self._before = self._entries[CHOSEN]
        _step, self._entries[CHOSEN] = self._step, NAME
        return PackedCache(self._step)

    def __exit__(self, *error: object) -> None:
        global _step
        _step, self._entries[CHOSEN] = None, self._before


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer in a packed step.

    Args:
        query: (batch, heads, tokens, size), as keys and values: tokens of the step in order, however they are folded
            into batch and tokens.
        softcap: limits scores to plus or minus this (Gemma 2).
        s_aux: (heads) a score that takes part in the softmax and has no value (gpt-oss).
    Returns:
        (batch, tokens, heads, size)
    """
    step = _step
    if step is None or attention_mask is not None or kwargs.get("position_bias") is not None:
        raise NotPackedError(f"{type(module).__name__} attends in a way of its own")
    step.attended += 1
    shape = step.shapes[step.layer]
    batch, heads, tokens, size = query.shape
    query, key, value = _in_order(query), _in_order(key), _in_order(value)
    if shape is None or key.shape[1:] != (shape.heads, shape.key_size):
        raise NotPackedError(f"{type(module).__name__} keeps something else than what it attends to")
    how = _How(shape, size**-0.5 if scaling is None else scaling, softcap, s_aux)
    out = [_decode(step, i, how, query, key, value) for i in range(len(step.groups))]
    out += [_prefill(step, i, how, query, key, value) for i in range(len(step.segments))]
    whole = out[0] if len(out) == 1 else torch.cat(out)
    return whole.view(batch, tokens, heads, value.shape[-1]), None


@dataclass(frozen=True, slots=True)
class _How:
    shape: LayerShape
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, size) -> (batch x tokens, heads, size)"""
    batch, heads, tokens, size = tensor.shape
    return tensor.transpose(1, 2).reshape(batch * tokens, heads, size)


def _decode(
    step: PackedStep, i: int, how: _How, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    group = step.groups[i]
    keys, values = _tensors(group.slab, step.layer)
    rows = group.end - group.start
    if rows < len(query):
        query, key, value = (t[group.start : group.end] for t in (query, key, value))
    for store, new in ((keys, key), (values, value)):
        heads, size = new.shape[1:]
        store.view(-1, size).index_copy_(0, step.slots(i, heads, store.shape[2], store.device), new.reshape(-1, size))
    window = how.shape.window
    first = 0 if window is None else max(0, group.shortest - window + 1)
    rows_, columns = slice(group.first, group.first + rows), slice(first, group.longest + 1)
    keys, values = keys[rows_, :, columns], values[rows_, :, columns]
    mask = step.decode_mask(i, first, window, query)
    folded = query.reshape(rows, how.shape.heads, -1, query.shape[-1])
    out = _attention(how, folded, keys, values, mask, causal=False)
    return out.reshape(rows, query.shape[1], -1)


def _prefill(
    step: PackedStep, i: int, how: _How, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    segment = step.segments[i]
    place, tokens = segment.place, segment.end - segment.start
    end, window = segment.past + tokens, how.shape.window
    first = 0 if window is None else max(0, segment.past - window + 1)
    seen = []
    for store, new in zip(_tensors(place.slab, step.layer), (key, value), strict=True):
        mine = new[segment.start : segment.end].transpose(0, 1)  # (heads, tokens, size)
        store[place.index, :, segment.past : end] = mine
        seen.append(mine[None] if segment.past == 0 else store[place.index : place.index + 1, :, first:end])
    keys, values = seen
    heads, groups = query.shape[1], query.shape[1] // how.shape.heads
    mine = query[segment.start : segment.end].transpose(0, 1)[None]  # (1, heads, tokens, size)
    causal = segment.past == 0 and (window is None or end <= window) and how.softcap is None and how.sinks is None
    mask = None if causal else step.segment_mask(i, first, window, query)
    if groups > 1:
        keys, values = (
            t[:, :, None].expand(-1, -1, groups, -1, -1).reshape(1, heads, t.shape[2], t.shape[3])
            for t in (keys, values)
        )
    out = _attention(how, mine, keys, values, mask, causal=causal)
    return out[0].transpose(0, 1)


def _attention(
    how: _How, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, *, causal: bool
) -> torch.Tensor:
    """(rows, heads, tokens, size): queries may be several to a head of the keys when they are of one token."""
    if how.softcap is None and how.sinks is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=how.scale
        )
    scores = torch.matmul(query, keys.transpose(-1, -2)) * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if mask is not None:
        scores = scores + mask
    if how.sinks is not None:
        rows, heads, tokens, _ = scores.shape
        sinks = how.sinks.to(scores.dtype)
        # decoding, the queries of a head of the keys stand where tokens do
        sinks = sinks.view(1, heads, tokens, 1) if sinks.numel() != heads else sinks.view(1, heads, 1, 1)
        scores = torch.cat([scores, sinks.expand(rows, heads, tokens, 1)], -1)
        weights = scores.softmax(-1, dtype=torch.float32 if scores.dtype != torch.float64 else None)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32 if scores.dtype != torch.float64 else None)
    return torch.matmul(weights.to(values.dtype), values)


def _tensors(slab: Slab, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = slab.keys[layer], slab.values[layer]
    assert keys is not None
    assert values is not None
    return keys, values


def _mask(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


AttentionInterface.register(NAME, attend)
