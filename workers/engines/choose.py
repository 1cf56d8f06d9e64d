"""Finds the fastest way that is right for a model, by what its layers keep and by trying it before anything is served."""

from dataclasses import replace

import structlog
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from .dense import Dense
from .kv import LayerShape, Shapes
from .packed import Packed
from .passes import Model, Part, Piece, Room, Row, RowByRow, Way

log = structlog.get_logger()

TOLERANCE = 0.01
"""How far logits may be from those of the plain forward pass, relative to their size; wrong ones are about 1 away."""
HALF_TOLERANCE = 0.2
"""The same for 16-bit and quantised weights, where another order of sums alone makes a difference."""
PREFIX_SHARE = 0.25
"""The part of the KV memory that prefixes for reuse may take."""
TRIAL = ((5, 3), (9, 4))
"""Two rows of the trial: tokens of the prompt, and tokens that are decoded."""
TRIAL_COLUMNS = 4096


@torch.inference_mode()
def choose_way(model: Model, kv_bytes: int) -> Way:
    """The fastest way that gives the logits of the model's plain forward pass, with memory for so many bytes."""
    cache = DynamicCache(config=model.config)
    model.extend(cache, 0, [1, 1, 1, 1])
    shapes, fixed = _shapes(cache), _state_bytes(cache)
    room = Room(kv_bytes, sum(shape.bytes_per_column for shape in shapes if shape is not None), fixed)
    kinds = {type(layer) for layer in cache.layers}
    config_kinds = set(getattr(model.config, "layer_types", None) or ())
    plain = kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and "chunked_attention" not in config_kinds
    plain = plain and getattr(model.config, "attention_chunk_size", None) is None
    trial = replace(room, total=room.per_row * len(TRIAL) + max(room.per_column, 1) * TRIAL_COLUMNS)
    if plain:
        wrong = _try(Packed(model, trial, shapes))
        if not wrong:
            kept = int(kv_bytes * PREFIX_SHARE)
            return Packed(model, replace(room, total=kv_bytes - kept), shapes, kept)
        log.info("way not taken", way="packed", model=type(model.config).__name__, why=wrong)
    if kinds <= {DynamicLayer, LinearAttentionLayer}:
        wrong = _try(Dense(model, trial, shapes))
        if not wrong:
            return Dense(model, room, shapes)
        log.info("way not taken", way="dense", model=type(model.config).__name__, why=wrong)
    return RowByRow(model, room)


def _shapes(cache: DynamicCache) -> Shapes:
    shapes: list[LayerShape | None] = []
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.keys.dim() != 4:
            shapes.append(None)
            continue
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        keys, values = layer.keys, layer.values
        shapes.append(
            LayerShape(
                keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], keys.dtype, keys.device, window
            )
        )
    return tuple(shapes)


def _state_bytes(cache: DynamicCache) -> int:
    states = [
        state
        for layer in cache.layers
        if isinstance(layer, LinearAttentionLayer)
        for kind in (layer.conv_states, layer.recurrent_states)
        for state in kind.values()
        if state is not None
    ]
    return sum(state.numel() * state.element_size() for state in states)


def _try(way: Way) -> str:
    """Why this way must not be taken; empty: its logits are right."""
    model = way.model
    vocabulary = model.config.vocab_size
    rows, texts = [Row() for _ in TRIAL], []
    try:
        for i, (prompt, decoded) in enumerate(TRIAL):
            texts.append([(7 * i + 3 * j + 1) % vocabulary for j in range(prompt + decoded)])
        expected = [_plain(model, text) for text in texts]
        for row, (prompt, _), text in zip(rows, TRIAL, texts, strict=True):
            if not way.reserve(row, len(text) + 1):
                return "no room for a trial"
            cut = prompt // 2 if way.splits_prompts else 0
            pieces = [(text[:cut], False), (text[cut:prompt], True)]
            for ids, last in pieces:
                for part in way.parts([], [Piece(row, ids, last)] if ids else []):
                    result = way.run(part)
            if difference := _compare(model, result.logits[0], expected[rows.index(row)][prompt - 1]):
                return f"{difference} in the prompt"
        for step in range(min(decoded for _, decoded in TRIAL)):
            for row, (prompt, _), text in zip(rows, TRIAL, texts, strict=True):
                row.last_id = text[prompt + step]
            for part in way.parts(rows, []):
                result = way.run(part)
                for row, logits in zip(result.rows, result.logits, strict=True):
                    i = rows.index(row)
                    if difference := _compare(model, logits, expected[i][TRIAL[i][0] + step]):
                        return f"{difference} in a decode step"
    except Exception as error:  # whatever an architecture that is not made for it raises
        return f"{type(error).__name__}: {error}"
    finally:
        for row in rows:
            way.release(row)
        way.reset()
    return ""


def _plain(model: Model, text: list[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary) of each token, of a forward pass over all of them."""
    ids = torch.tensor([text], device=model.device)
    positions = torch.arange(len(text), device=model.device)[None]
    return model(ids, positions, model.new_cache(), keep=0)[0].float()


def _compare(model: Model, logits: torch.Tensor, expected: torch.Tensor) -> str:
    scale = expected - expected.mean()
    difference = ((logits - expected).norm() / scale.norm().clamp_min(1e-30)).item()
    exact = model.dtype in (torch.float32, torch.float64) and not model.quantized
    limit = TOLERANCE if exact else HALF_TOLERANCE
    return "" if difference <= limit else f"logits are {difference:.3f} off"
