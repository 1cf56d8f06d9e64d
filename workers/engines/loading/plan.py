"""``fastchat-q plan``: the memory of a model before it is loaded, and the options with which it fits."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from fastchat_q.choices import Device, Dtype, LoadOptions
from fastchat_q.errors import ConfigurationError
from fastchat_q.sizes import parse_bytes

from . import hub
from .checkpoint import stored_bytes
from .configs import context_length, model_class
from .devices import SHARE, Place, all_memory, pick_device
from .memory import CacheLayer, Footprint, cache_layers, footprint, loaded_bytes, skeleton
from .progress import Progress
from .quantization import METHODS, choose, dtype_for

PREFILL = 512
"""Prompt tokens of one forward pass, for the working memory."""
ACCELERATOR_OVERHEAD = 600 * 2**20
"""What a CUDA context and its kernels take on each GPU."""
BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to load a model: its options, its bytes, and whether it fits."""

    dtype: str
    quantization: str
    weights: int
    cache: int | None
    working: int
    total: int
    fits_on: str | None
    """The places it would lie in, such as ``cuda:0`` or ``cuda:0 + cpu``."""
    options: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What `plan` found."""

    model: str
    architecture: str
    parameters: int
    stored: int | None
    """Bytes of the checkpoint's tensors."""
    context_length: int | None
    tokens: int
    """Per slot, that the cache is counted for."""
    slots: int
    cache_per_token: int | None
    places: list[Place]
    asked: Variant
    others: list[Variant]
    advice: str

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def plan(
    source: str, device: Device, dtype: Dtype, options: LoadOptions, slots: int, tokens: int | None = None
) -> Plan:
    """Counts what a model would take, from its config and the headers of its weights alone.

    Args:
        tokens: per slot; by default the model's context length.

    Raises:
        ConfigurationError: there is no such model, or it cannot be counted.
    """
    target = pick_device(device)
    files = hub.fetch_config(source, options, Progress(source))
    config = read_config(source, files, options)
    length = context_length(config, options.max_model_len)
    tokens = min(tokens or length or 4096, length or tokens or 4096)
    own = pick_dtype(dtype, config, target)
    stored = _stored(source, files, options)
    places = [_limited(place, options) for place in all_memory(target)]
    method = choose(options.quantization, source, config, target, gguf=files.gguf is not None)
    count = _Counter(source, config, options, slots, tokens, stored)
    asked = _variant(count, own, method, places, target)
    others = []
    if method is None:
        others = list(_others(count, own, places, target))
    print_of = count.footprint(own, method)
    return Plan(
        source,
        type(config).__name__.removesuffix("Config"),
        print_of.parameters,
        stored[1] if stored else None,
        length,
        tokens,
        slots,
        print_of.cache_per_token,
        places,
        asked,
        others,
        _advice(asked, others, print_of, places, slots, tokens),
    )


def read_config(source: str, files: hub.Files, options: LoadOptions) -> PreTrainedConfig:
    """A checkpoint's config. Raises ConfigurationError."""
    extra = {"gguf_file": files.gguf} if files.gguf else {}
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=options.trust_remote_code, **extra)
    except Exception as error:  # a broken checkpoint may raise anything
        raise ConfigurationError(f"Model {source!r} cannot be loaded: {config_trouble(error)}") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def config_trouble(error: Exception) -> str:
    """An error of transformers in the words of our options."""
    if "trust_remote_code" in str(error):
        return (
            "its architecture is Python code that comes with the checkpoint. Read that code; to run it: "
            "--trust-remote-code."
        )
    return hub.first_line(error)


def pick_dtype(dtype: Dtype, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """``auto`` takes the checkpoint's own, but float32 instead of float16 on a CPU, which has no fast half."""
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    own = config.get_text_config().dtype or torch.float32
    assert isinstance(own, torch.dtype)
    return torch.float32 if device.type == "cpu" and own == torch.float16 else own


class _Counter:
    """Footprints of one model by dtype and method; the skeleton is built once per dtype."""

    def __init__(
        self,
        source: str,
        config: PreTrainedConfig,
        options: LoadOptions,
        slots: int,
        tokens: int,
        stored: tuple[int, int] | None,
    ) -> None:
        self.slots = slots
        self.tokens = tokens
        self._source = source
        self._config = config
        self._trust = {"trust_remote_code": True} if options.trust_remote_code else {}
        self._stored = stored
        self._skeletons: dict[torch.dtype, tuple[PreTrainedModel, tuple[CacheLayer, ...] | None]] = {}

    def footprint(self, dtype: torch.dtype, method: str | None) -> Footprint:
        dtype = dtype_for(method, dtype)
        if dtype not in self._skeletons:
            try:
                model = skeleton(model_class(self._config), self._config, dtype, **self._trust)
            except Exception as error:  # of configs that name sizes that do not go together
                raise ConfigurationError(
                    f"Model {self._source!r} cannot be planned: {config_trouble(error)}"
                ) from error
            self._skeletons[dtype] = model, cache_layers(model)
        stored = self._stored[1] if self._stored else None
        model, cache = self._skeletons[dtype]
        return footprint(model, method, self.slots, PREFILL, stored, cache)


def weights_needed(
    auto: Any, config: PreTrainedConfig, method: str | None, dtype: torch.dtype, stored: int | None
) -> int | None:
    """Bytes of weights that a load will put into memory; None when the config cannot be built."""
    try:
        model = skeleton(auto, config, dtype_for(method, dtype))
    except Exception:
        return None  # the load itself will say why, in better words
    return loaded_bytes(model, method, stored)


def _variant(
    count: _Counter,
    dtype: torch.dtype,
    method: str | None,
    places: list[Place],
    target: torch.device,
) -> Variant:
    found = count.footprint(dtype, method)
    cache = found.cache_bytes(count.slots, count.tokens)
    total = found.weights + (cache or 0) + found.working
    name = str(dtype_for(method, dtype)).removeprefix("torch.")
    words = [f"--dtype {name}"]
    if method is not None and method in METHODS and METHODS[method].on_the_fly:
        words.append(f"--quantization {method}")
    fits, more = _fit(found.weights, total, places, target)
    return Variant(name, method or "none", found.weights, cache, found.working, total, fits, " ".join([*words, *more]))


def _fit(weights: int, total: int, places: list[Place], target: torch.device) -> tuple[str | None, list[str]]:
    """Where it would lie, and the options for that."""
    cpu = places[-1]
    if target.type == "cpu":
        return ("cpu", []) if total <= cpu.free else (None, [])
    gpus = places[:-1]
    room = 0
    for number, gpu in enumerate(gpus, 1):
        room += max(0, gpu.free - ACCELERATOR_OVERHEAD)
        if total <= room:
            spread = [f"--num-gpus {number}"] if number > 1 else []
            return " + ".join(g.name for g in gpus[:number]), spread
    cached = total - weights
    if weights <= (room - cached) + int(cpu.free * SHARE) and cached < room:
        spread = [f"--num-gpus {len(gpus)}"] if len(gpus) > 1 else []
        return " + ".join([*(g.name for g in gpus), "cpu"]), [*spread, "--cpu-offload"]
    return None, []


def _limited(place: Place, options: LoadOptions) -> Place:
    """With what the options leave of it."""
    limit, option = options.max_gpu_memory, "--max-gpu-memory"
    if place.name == "cpu":
        limit, option = options.max_cpu_memory, "--max-cpu-memory"
    return place if limit is None else replace(place, free=min(place.free, parse_bytes(limit, option)))


def _others(count: _Counter, own: torch.dtype, places: list[Place], target: torch.device) -> Iterator[Variant]:
    for dtype in (torch.float32, torch.bfloat16):
        if dtype != own:
            yield _variant(count, dtype, None, places, target)
    half = own if BYTES.get(own) == 2 else torch.bfloat16
    for name, method in METHODS.items():
        if method.on_the_fly and (method.devices is None or target.type in method.devices):
            yield _variant(count, half, name, places, target)


def _advice(
    asked: Variant, others: list[Variant], found: Footprint, places: list[Place], slots: int, tokens: int
) -> str:
    if asked.fits_on is not None:
        slow = " Weights in main memory are slow." if asked.options.endswith("--cpu-offload") else ""
        return f"It fits on {asked.fits_on} with {asked.options}.{slow}"
    fitting = [other for other in others if other.fits_on is not None and other.total < asked.total]
    if fitting:
        best = max(fitting, key=lambda other: (not other.options.endswith("--cpu-offload"), other.total))
        return f"It does not fit as asked; it fits on {best.fits_on} with {best.options}."
    room = sum(place.free for place in (places[:-1] or places))
    left = room - found.weights - found.working
    per_slot = found.cache_bytes(1, tokens)
    if per_slot and left >= per_slot:
        return f"The weights fit; the caches of {slots} slots do not: --slots {left // per_slot}."
    if found.cache_per_token and left > found.cache_per_token * 1024:
        return f"The weights fit; {tokens} tokens do not: --slots 1 --max-model-len {left // found.cache_per_token}."
    return "It does not fit on this machine: take a smaller model, or --offload-dir, which is very slow."


def _stored(source: str, files: hub.Files, options: LoadOptions) -> tuple[int, int] | None:
    """(elements, bytes) of the checkpoint's tensors: from local headers, or else from those on the hub."""
    if files.gguf is not None:
        return None
    if hub.local_path(source) is not None:
        return stored_bytes(source, files.folder)
    try:
        metadata = HfApi().get_safetensors_metadata(source, revision=options.revision)
    except Exception:
        return None  # a checkpoint without safetensors, or one in a layout of its own: its config is counted
    sizes = [
        (t.data_offsets[1] - t.data_offsets[0]) for f in metadata.files_metadata.values() for t in f.tensors.values()
    ]
    return sum(metadata.parameter_count.values()), sum(sizes)
