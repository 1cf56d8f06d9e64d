"""How much memory a model takes, before any of its weights are read.

The model is built on PyTorch's meta device, which has shapes and no numbers, so what is counted is what the model's own
code makes: its parameters after tying, and the cache that its own forward pass fills.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from .quantization import INT4_GROUP, NF4_BLOCK

PROBE = (16, 32)
"""Tokens of the two forward passes that tell what of a cache grows with each token."""
NESTED_BLOCK = 256
"""Scales that share a scale in bitsandbytes' double quantisation."""
STORED_AS_THEY_ARE = {"gptq", "awq", "bitsandbytes", "fp8", "mxfp4"}
"""Kinds of checkpoint that stay packed in memory. compressed-tensors and GGUF are unpacked by transformers."""


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """What one layer keeps for one running sequence."""

    per_token: int
    fixed: int
    """Bytes that do not grow: states of Mamba and of linear attention."""
    window: int | None
    """Tokens it keeps at most."""

    def bytes_for(self, tokens: int) -> int:
        return self.fixed + self.per_token * (tokens if self.window is None else min(tokens, self.window))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a model takes."""

    parameters: int
    weights: int
    cache: tuple[CacheLayer, ...] | None
    """None: its code cannot be run without numbers, and nobody knows."""
    working: int
    """A forward pass beside the two; a rough figure."""

    @property
    def cache_per_token(self) -> int | None:
        """While no layer's window is full."""
        return None if self.cache is None else sum(layer.per_token for layer in self.cache)

    def cache_bytes(self, slots: int, tokens: int) -> int | None:
        """When every slot is filled to that length."""
        return None if self.cache is None else slots * sum(layer.bytes_for(tokens) for layer in self.cache)


def skeleton(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model without its numbers, and without what its checkpoint says of quantisation."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.pad_token_id = None  # a mask of padding would have to be looked at
        part.use_cache = True
    with torch.device("meta"):
        model = model_class.from_config(config, dtype=dtype, experts_implementation="batched_mm", **options)
    assert isinstance(model, PreTrainedModel)
    torch.nn.Module.eval(model)
    return model


def footprint(
    model: PreTrainedModel,
    method: str | None,
    slots: int,
    prefill: int,
    stored: int | None,
    cache: tuple[CacheLayer, ...] | None,
) -> Footprint:
    """What a model will take once loaded by that method.

    Args:
        model: a `skeleton`, or a real one that is not quantised.
        stored: bytes of the checkpoint's tensors, which is what a packed checkpoint takes.
        cache: its `cache_layers`, which are the same for all methods.
    """
    count = sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())
    return Footprint(count, loaded_bytes(model, method, stored), cache, working_bytes(model, slots, prefill))


def loaded_bytes(model: PreTrainedModel, method: str | None, stored: int | None) -> int:
    """The weights in memory: packed as they are on disk, or counted."""
    return stored if method in STORED_AS_THEY_ARE and stored is not None else weight_bytes(model, method)


def weight_bytes(model: PreTrainedModel, method: str | None) -> int:
    """Parameters and buffers, each once, with those that the method quantises at their new size."""
    sizes = {id(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors(model)}
    if method in {"bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8wo", "torchao-int4wo"}:
        skipped = get_keys_to_not_convert(model)
        kinds = (torch.nn.Linear, Conv1D) if method.startswith("bitsandbytes") else (torch.nn.Linear,)
        for name, module in model.named_modules():
            if isinstance(module, kinds) and not any(name == key or name.endswith(f".{key}") for key in skipped):
                sizes[id(module.weight)] = quantised_bytes(module, method)
    return sum(sizes.values())


def quantised_bytes(module: torch.nn.Module, method: str) -> int:
    """The weight of one linear layer with its scales, as the packages lay them out."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape if isinstance(module, torch.nn.Linear) else reversed(weight.shape)
    count, element = weight.numel(), weight.element_size()
    if method == "bitsandbytes-8bit":
        return count + rows * 4
    if method == "torchao-int8wo":
        return count + rows * element
    if method == "bitsandbytes-4bit":
        blocks = math.ceil(count / NF4_BLOCK)  # 8 bits a block, 32 bits per 256 blocks, two code books and an offset
        return math.ceil(count / 2) + blocks + math.ceil(blocks / NESTED_BLOCK) * 4 + 16 * 4 + 256 * 4 + 4
    if columns % INT4_GROUP:
        return count * element
    return count // 2 + count // INT4_GROUP * 2 * 2  # a scale and a zero point of 16 bits each


def cache_layers(model: PreTrainedModel) -> tuple[CacheLayer, ...] | None:
    """What each layer of the cache holds, from two short forward passes without numbers."""
    try:
        sizes = [_probe(model, tokens) for tokens in PROBE]
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None  # its code looks at numbers
    layers = []
    for (few, window), (many, _) in zip(*sizes, strict=True):
        held = [min(tokens, window or tokens) for tokens in PROBE]
        per_token = (many - few) // (held[1] - held[0]) if held[1] > held[0] else few // held[0]
        layers.append(CacheLayer(per_token, few - per_token * held[0], window))
    return tuple(layers)


def working_bytes(model: PreTrainedModel, slots: int, prefill: int) -> int:
    """Logits of all slots in float32, three copies, and the activations of one prefill; a rough figure."""
    text = model.config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    inner = getattr(text, "intermediate_size", None)
    wide = inner if isinstance(inner, int) else 4 * hidden
    logits = slots * int(text.vocab_size) * 4 * 3
    return logits + prefill * (8 * hidden + 3 * wide) * model.dtype.itemsize


def _probe(model: PreTrainedModel, tokens: int) -> list[tuple[int, int | None]]:
    """(bytes, window) of each layer of the cache after a prompt of so many tokens."""
    ids = torch.ones((1, tokens), dtype=torch.long, device="meta")
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            output = model(input_ids=ids, decoder_input_ids=ids, use_cache=True)
        else:
            output = model(input_ids=ids, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    cache = cache if cache is not None else getattr(output, "cache_params", None)
    if cache is None:
        raise RuntimeError("no cache")
    found = []
    for layer in _cache_layers(cache):
        held = {id(t): t.numel() * t.element_size() for t in _held(layer)}
        window = getattr(layer, "sliding_window", None)
        found.append((sum(held.values()), window - 1 if isinstance(window, int) and window > 1 else None))
    return found


def _cache_layers(cache: Any) -> list[Any]:
    if hasattr(cache, "self_attention_cache"):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return list(cache.layers) if hasattr(cache, "layers") else [cache]


def _held(thing: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors inside an object."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif depth < 5:
        inside = thing if isinstance(thing, list | tuple) else list(thing.values()) if isinstance(thing, dict) else ()
        for part in inside or list(getattr(thing, "__dict__", {}).values()):
            yield from _held(part, depth + 1)


def _tensors(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
