"""LoRA adapters for vLLM: where they lie, and what room it makes for them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from fastchat_q.errors import ConfigurationError

ADAPTERS_AT_A_TIME = 8
"""Those whose weights lie ready on the device, unless --engine-arg max-loras says otherwise; vLLM swaps the rest in."""


def requests(adapters: Mapping[str, str]) -> dict[str, LoRARequest]:
    """What vLLM is told of each, by its name.

    Args:
        adapters: the name of a model -> the folder or hub id of the adapter that it is.

    Raises:
        ConfigurationError: one of them is not there.
    """
    numbered = enumerate(adapters.items(), 1)
    return {name: LoRARequest(name, number, _folder(source)) for number, (name, source) in numbered}


def arguments(loras: Mapping[str, LoRARequest]) -> list[str]:
    """The command line that makes room for them.

    Raises:
        ConfigurationError: one of them is none, or too large.
    """
    if not loras:
        return []
    ready = len(loras) + 1 if is_cpu() else min(len(loras), ADAPTERS_AT_A_TIME)
    rank = _rank([lora.lora_path for lora in loras.values()])
    return ["--enable-lora", f"--max-loras={ready}", f"--max-lora-rank={rank}"]


def check(places: int, loras: Mapping[str, LoRARequest]) -> None:
    """Raises ConfigurationError if a request without an adapter would get the weights of one."""
    if loras and is_cpu() and places <= len(loras):
        raise ConfigurationError(
            f"--engine-arg max-loras={places}: on a CPU it must be more than the {len(loras)} adapters."
        )


def is_cpu() -> bool:
    """Where vLLM computes adapters in plain PyTorch: there a request without one takes the weights of the last place.

    (Its index -1 picks them; lora/ops/torch_ops/lora_ops.py of 0.32.) One place more than adapters stays empty: zeros.
    """
    return bool(current_platform.device_type == "cpu")


def _folder(source: str) -> str:
    """Where an adapter lies, downloaded if need be; its pickles are left where they are."""
    path = Path(source).expanduser()
    if not path.is_dir():
        try:
            path = Path(snapshot_download(source, allow_patterns=["adapter_config.json", "*.safetensors"]))
        except Exception as error:  # of many kinds: no such name, gated, offline
            raise ConfigurationError(f"LoRA adapter {source!r} cannot be loaded: {in_a_line(error)}") from error
    if not (path / "adapter_model.safetensors").is_file():
        raise ConfigurationError(f"LoRA adapter {source!r} cannot be loaded: there is no adapter_model.safetensors.")
    return str(path)


def _rank(folders: Iterable[str]) -> int:
    """The smallest rank that vLLM makes room for which all of these adapters fit into."""
    ranks = [0]
    for folder in folders:
        try:
            ranks.append(int(json.loads((Path(folder) / "adapter_config.json").read_text())["r"]))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigurationError(f"{folder!r} is no LoRA adapter: its adapter_config.json: {error!r}") from error
    offered = sorted(MaxLoRARanks.__args__)
    fits = [rank for rank in offered if rank >= max(ranks)]
    if not fits:
        raise ConfigurationError(f"An adapter has rank {max(ranks)}; vLLM takes up to {offered[-1]}.")
    return int(fits[0])


def in_a_line(error: BaseException) -> str:
    """In one line. What a process of vLLM's died of is on stderr only."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines)[:500]
