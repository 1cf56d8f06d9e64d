"""Finds the fastest way that is right for a model: by what its layers keep, and by trying it before it serves."""

from dataclasses import replace
from itertools import pairwise

import structlog
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..loading.devices import free_memory
from .dense import Dense
from .kv import LayerShape, Shapes
from .packed import Packed
from .passes import Chunk, Model, Room, Row, RowByRow, Way

log = structlog.get_logger()

TOLERANCE = 1e-3
"""How far logits may be from those of the plain forward pass, relative to their size; wrong ones are about 1 away."""
HALF_TOLERANCE = 0.2
"""The same for 16-bit and quantised weights, where another order of sums alone makes a difference."""
PREFIX_SHARE = 0.25
"""The part of the KV memory that prefixes for reuse may take."""
TRIAL = ((5, 3), (9, 4))
"""Two rows of the trial: tokens of the prompt, and tokens that are decoded."""
TRIAL_COLUMNS = 4096


CPU_SHARE = 0.25
"""Of free main memory, for keys and values: the API, Redis and other workers may live on the same machine."""
DEVICE_SHARE = 0.8
"""Of free memory of an accelerator once the weights are there: the rest is for what a forward pass needs."""
LEAST_BYTES = 64 * 2**20


def default_kv_bytes(device: torch.device) -> int:
    """Memory for keys and values when nobody said how much; taken only as requests need it."""
    share = CPU_SHARE if device.type == "cpu" else DEVICE_SHARE
    return max(LEAST_BYTES, int(free_memory(device).free * share))


class NoWayError(Exception):
    """This model cannot be run token by token with a cache that is handed in."""


Seen = tuple[list[int], dict[str, torch.Tensor]]
"""Tokens of a prompt, and its other inputs."""


@torch.inference_mode()
def choose_way(model: Model, kv_bytes: int, seen: Seen | None = None) -> Way:
    """The fastest way that gives the logits of the model's plain forward pass, with memory for so many bytes.

    Args:
        seen: a prompt with an image, for a model that takes them.

    Raises:
        NoWayError: there is none.
    """
    try:
        cache = model.new_cache()
        model.extend(cache, 0, [1, 1, 1, 1])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture raises that takes another kind of cache
        raise NoWayError(f"{type(error).__name__}: {error}") from error
    shapes, fixed = _shapes(cache), _state_bytes(cache)
    room = Room(kv_bytes, sum(shape.bytes_per_column for shape in shapes if shape is not None), fixed)
    kinds = {type(layer) for layer in cache.layers}
    config_kinds = set(getattr(model.config, "layer_types", None) or ())
    plain = kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and "chunked_attention" not in config_kinds
    plain = plain and getattr(model.config, "attention_chunk_size", None) is None
    trial = replace(room, total=room.per_row * len(TRIAL) + max(room.per_column, 1) * TRIAL_COLUMNS)
    if plain:
        wrong = _try(Packed(model, trial, shapes), seen)
        if not wrong:
            if seen is not None:
                model.watch_layers()  # prompts with images take the plain pass
            kept = int(kv_bytes * PREFIX_SHARE)
            return Packed(model, replace(room, total=kv_bytes - kept), shapes, kept)
        log.info("way not taken", way="packed", model=type(model.config).__name__, why=wrong)
    model.watch_layers()
    if kinds <= {DynamicLayer, LinearAttentionLayer}:
        wrong = _try(Dense(model, trial, shapes), seen)
        if not wrong:
            return Dense(model, room, shapes)
        log.info("way not taken", way="dense", model=type(model.config).__name__, why=wrong)
    way = RowByRow(model, room)
    if wrong := _try(RowByRow(model, trial), seen):
        raise NoWayError(wrong)
    return way


def _shapes(cache: DynamicCache) -> Shapes:
    shapes: list[LayerShape | None] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4:
            shapes.append(None)
            continue
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        shapes.append(
            LayerShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], keys.dtype, keys.device, window)
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


def _try(way: Way, seen: Seen | None) -> str:
    """Why this way must not be taken; empty: its logits are right."""
    names = ["", *way.model.adapters.names[:1]]  # a row of the base beside one of an adapter
    rows = [Row(names[i % len(names)]) for i in range(len(TRIAL))]
    if seen is not None:
        rows.append(Row(inputs=seen[1]))
    try:
        return _trial(way, rows[: len(TRIAL)]) or (_trial_of_sight(way, rows[-1], seen[0]) if seen is not None else "")
    except Exception as error:  # whatever an architecture that is not made for it raises
        return f"{type(error).__name__}: {error}"
    finally:
        for row in rows:
            way.release(row)
        way.reset()


def _trial(way: Way, rows: list[Row]) -> str:
    """Takes two prompts in, in chunks where that is possible, and decodes both together; says what is wrong."""
    model, size = way.model, way.model.config.vocab_size
    texts = [[(7 * i + 3 * j + 1) % size for j in range(sum(counts))] for i, counts in enumerate(TRIAL)]
    expected = {row: _plain(model, text, row.namespace) for row, text in zip(rows, texts, strict=True)}
    steps: list[tuple[list[Row], list[Chunk]]] = []
    for row, (prompt, _), text in zip(rows, TRIAL, texts, strict=True):
        way.reserve(row, len(text) + 1)
        cuts = (0, prompt // 2, prompt) if way.splits_prompts else (0, prompt)
        steps += [([], [Chunk(row, text[start:end], end == prompt)]) for start, end in pairwise(cuts)]
    steps += [(rows, [])] * min(decoded for _, decoded in TRIAL)
    for decode, chunks in steps:
        for row, text in zip(rows, texts, strict=True):
            row.last_id = text[row.length]
        for part in way.parts(decode, chunks):
            result = way.run(part)
            for row, logits in zip(result.rows, result.logits, strict=True):
                if wrong := _difference(model, logits, expected[row][row.length - 1]):
                    return wrong
    return ""


def _trial_of_sight(way: Way, row: Row, ids: list[int]) -> str:
    """The same for a prompt with an image and a token behind it, while no other row decodes."""
    model = way.model
    text = [*ids, ids[-1]]
    if not way.reserve(row, len(text) + 1):
        return "no room for an image"
    for tokens, decode, chunks in ((len(ids), [], [Chunk(row, ids, last=True)]), (len(text), [row], [])):
        row.last_id = text[-1]
        [part] = way.parts(decode, chunks)
        logits = way.run(part).logits[0]
        if wrong := _difference(model, logits, model.seen(text[:tokens], row.arguments(tokens))):
            return f"with an image, {wrong}"
    return ""


def _plain(model: Model, text: list[int], namespace: str) -> torch.Tensor:
    """Logits (tokens, vocabulary) of each token, of a forward pass over all of them."""
    ids = torch.tensor([text], device=model.device)
    positions = torch.arange(len(text), device=model.device)[None]
    return model(ids, positions, model.new_cache(), keep=0, owners=[(namespace, len(text))])[0].float()


def _difference(model: Model, logits: torch.Tensor, expected: torch.Tensor) -> str:
    scale = expected - expected.mean()
    difference = ((logits - expected).norm() / scale.norm().clamp_min(1e-30)).item()
    exact = model.dtype in (torch.float32, torch.float64) and not model.quantized
    limit = TOLERANCE if exact else HALF_TOLERANCE
    return "" if difference <= limit else f"logits are {difference:.3f} off"
