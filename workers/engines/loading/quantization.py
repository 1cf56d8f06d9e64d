"""Fewer bits per weight: what a checkpoint already is, what can be done to it while loading, and what that needs.

docs/quantisation.md says where each method was tried. No quantisation happens in this package: bitsandbytes, torchao,
gptqmodel and compressed-tensors do it, through transformers.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig

from fastchat_q.choices import Quantization
from fastchat_q.errors import ConfigurationError

NF4_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4 bits."""
INT4_GROUP = 32
"""Weights that share a scale in torchao's 4 bits: the smallest group, the best answers."""


@dataclass(frozen=True, slots=True)
class Method:
    """What a way of quantising needs."""

    packages: tuple[str, ...] = ()
    extra: str = "quantization"
    devices: frozenset[str] | None = None
    """Where it runs; None: anywhere."""
    on_the_fly: bool = False


METHODS: dict[str, Method] = {
    "bitsandbytes-8bit": Method(("bitsandbytes",), devices=frozenset({"cpu", "cuda", "xpu"}), on_the_fly=True),
    "bitsandbytes-4bit": Method(("bitsandbytes",), devices=frozenset({"cpu", "cuda", "xpu"}), on_the_fly=True),
    "torchao-int8wo": Method(("torchao",), devices=frozenset({"cpu", "cuda", "xpu"}), on_the_fly=True),
    "torchao-int4wo": Method(("torchao",), devices=frozenset({"cuda"}), on_the_fly=True),
    "gptq": Method(("gptqmodel", "optimum"), extra="gptq"),
    "awq": Method(("gptqmodel",), extra="gptq"),
    "compressed-tensors": Method(("compressed_tensors",)),
    "gguf": Method(("gguf",)),
}
OF_CHECKPOINT = {"bitsandbytes_8bit": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes"}


def method_of(config: PreTrainedConfig) -> str | None:
    """How a checkpoint is quantised already, by its config: ``gptq``, ``bitsandbytes``, ``fp8``, …"""
    own = getattr(config, "quantization_config", None)
    if own is None:
        return None
    name = own.get("quant_method", "") if isinstance(own, dict) else getattr(own, "quant_method", "")
    if not name and isinstance(own, dict) and (own.get("load_in_8bit") or own.get("load_in_4bit")):
        return "bitsandbytes"
    name = str(getattr(name, "value", name))
    return OF_CHECKPOINT.get(name, name) or "an unnamed method"


def choose(
    choice: Quantization, source: str, config: PreTrainedConfig, device: torch.device, *, gguf: bool = False
) -> str | None:
    """The method that a load will use; None for none.

    Raises:
        ConfigurationError: the checkpoint is something else, the device cannot run it, or a package is missing.
    """
    own = "gguf" if gguf else method_of(config)
    if own is None and choice in {"auto", "none"}:
        return None
    if own is not None and choice not in {"auto", own} and not choice.startswith(own):
        raise ConfigurationError(
            f"Model {source!r} is a checkpoint that is quantised already ({own}): leave out --quantization {choice}."
        )
    method = own if own is not None else str(choice)
    known = METHODS.get(method)
    if own is None and known is not None and not known.on_the_fly:
        raise ConfigurationError(
            f"--quantization {choice} is for checkpoints of that kind, and {source!r} is not quantised. "
            "bitsandbytes-8bit, bitsandbytes-4bit and torchao-int8wo quantise while loading."
        )
    if known is None:
        known = METHODS["bitsandbytes-8bit"] if method == "bitsandbytes" else Method()
    if known.devices is not None and device.type not in known.devices:
        raise ConfigurationError(
            f"{method} does not run on {device.type}, only on {', '.join(sorted(known.devices))}. {_instead(device)}"
        )
    missing = [name for name in known.packages if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"Model {source!r} as {method} needs {' and '.join(missing)}, not installed here: "
            f"pip install 'fastchat-q[{known.extra}]'."
        )
    return method


def arguments(method: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` is told of a method that works while loading."""
    match method:
        case "bitsandbytes-8bit":
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}  # type: ignore[no-untyped-call]
        case "bitsandbytes-4bit":
            four = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            return {"quantization_config": four}
        case "torchao-int8wo":
            from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found,unused-ignore]

            return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(version=2))}
        case "torchao-int4wo":
            from torchao.quantization import Int4WeightOnlyConfig  # type: ignore[import-not-found,unused-ignore]

            layout = {"group_size": INT4_GROUP, "int4_packing_format": "tile_packed_to_4d"}
            return {"quantization_config": TorchAoConfig(Int4WeightOnlyConfig(**layout))}
    return {}


def dtype_for(method: str | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype beside the quantised weights: some kernels have but one."""
    halves_alone = method in {"gptq", "awq"} and dtype == torch.float32
    return torch.bfloat16 if halves_alone or method == "torchao-int4wo" else dtype


def settle(model: PreTrainedModel, method: str | None) -> None:
    """Mends what a freshly quantised model trips over.

    On CPUs with bf16 instructions, bitsandbytes (0.50) packs 4-bit weights anew for a kernel that takes whole blocks of
    64 inputs, and fails at the first forward pass for layers that have another number of them.
    """
    if method not in {"bitsandbytes-4bit", "bitsandbytes"}:
        return
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and module.in_features % NF4_BLOCK:
            module.support_avx512bf16_for_cpu = False


def _instead(device: torch.device) -> str:
    there = [name for name, m in METHODS.items() if m.on_the_fly and (m.devices is None or device.type in m.devices)]
    return f"There: {', '.join(there)}." if there else "No method that quantises while loading does."
