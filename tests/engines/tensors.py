"""Counts what models and caches really hold, by their storage."""

from typing import Any

import torch


def bytes_of(model: torch.nn.Module) -> int:
    """Parameters and buffers, each storage once, with the scales that quantised weights carry about."""
    held: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        _add(tensor, held)
    return sum(held.values())


def bytes_held(thing: Any) -> int:
    """The tensors inside a cache."""
    held: dict[int, torch.Tensor] = {}
    _find(thing, held, set())
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def _add(tensor: torch.Tensor, held: dict[int, int]) -> None:
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass of torchao
        for name in tensor.__tensor_flatten__()[0]:
            _add(getattr(tensor, name), held)
        return
    held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    for owner in (tensor, getattr(tensor, "quant_state", None)):
        _add_scales(owner, held)


def _add_scales(owner: Any, held: dict[int, int]) -> None:
    for name in ("SCB", "absmax", "code", "offset"):  # of bitsandbytes
        scale = getattr(owner, name, None)
        if isinstance(scale, torch.Tensor):
            held[scale.data_ptr()] = scale.numel() * scale.element_size()
    if getattr(owner, "state2", None) is not None:
        _add_scales(owner.state2, held)


def _find(thing: Any, held: dict[int, torch.Tensor], seen: set[int]) -> None:
    if isinstance(thing, torch.Tensor):
        held[id(thing)] = thing
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    inside = thing if isinstance(thing, list | tuple) else list(thing.values()) if isinstance(thing, dict) else ()
    for part in [*inside, *(getattr(thing, "__dict__", None) or {}).values()]:
        _find(part, held, seen)
