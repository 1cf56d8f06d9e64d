"""LoRA adapters on one base: files in PEFT's format, checked, and their part of each linear layer, token by token.

https://arxiv.org/abs/2106.09685: a layer's output for a token of an adapter is W x + (B A x) * scale. The base's own
module computes W x for all tokens of a step as if there were no adapters; then each adapter's part is added to the
tokens of its rows and to no others. Nothing is ever merged into the base's weights or swapped.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional
from transformers import PreTrainedModel

from fastchat_q.choices import LoadOptions
from fastchat_q.errors import ConfigurationError
from fastchat_q.registry import ModelCard

from ..loading import hub
from ..loading.progress import Progress

log = structlog.get_logger()

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's name of the base in an adapter's tensors."""
TENSOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
UNDERSTOOD = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("lora_dropout", "inference_mode", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("eva_config",),
}
"""Entries of an adapter's config that are applied here, or that only training needs. Others change the arithmetic."""
KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin training that leave the base's weights as they are; with others the adapter is for a changed base."""


@dataclass(frozen=True, slots=True)
class Delta:
    """An adapter's part of one linear layer: ``down`` (rank, in), ``up`` (out, rank)."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in the order and the precision of PEFT's own layer."""
        down, up = self.down.to(x.device), self.up.to(x.device)  # they are there, unless the layer is offloaded
        return functional.linear(functional.linear(x.to(down.dtype), down), up) * self.scale


class _Tokens:
    """Which tokens of a forward pass are whose."""

    def __init__(self, owners: Iterable[tuple[str, int]]) -> None:
        self.count = 0
        lines: dict[str, list[int]] = {}
        for name, count in owners:
            lines.setdefault(name, []).extend(range(self.count, self.count + count))
            self.count += count
        self.only = next(iter(lines)) if len(lines) == 1 else None
        """Whose all of them are, if they are of one."""
        self.names = lines.keys()
        self._lines = lines
        self._made: dict[tuple[str, torch.device], torch.Tensor] = {}

    def of(self, name: str, device: torch.device) -> torch.Tensor:
        """(tokens) int64: the places of one owner's tokens."""
        key = (name, device)
        if key not in self._made:
            self._made[key] = torch.tensor(self._lines[name], device=device)
        return self._made[key]


class _Layer:
    """The hook on a linear layer of the base that some adapters change."""

    def __init__(self, adapters: "Adapters") -> None:
        self._adapters = adapters
        self.deltas: dict[str, Delta] = {}
        self.called = False

    def __call__(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        self.called = True
        tokens = self._adapters.tokens
        if tokens is None:
            return output
        x = args[0]
        if tokens.only is not None:
            delta = self.deltas.get(tokens.only)
            return output if delta is None else (output + delta.of(x)).to(output.dtype)
        xs, outs = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
        if len(xs) != tokens.count:
            raise RuntimeError(f"a layer with adapters got {len(xs)} vectors in a step of {tokens.count} tokens")
        for name in tokens.names:
            delta = self.deltas.get(name)
            if delta is not None:
                places = tokens.of(name, outs.device)
                mine = outs[places]
                outs.index_copy_(0, places, (mine + delta.of(xs[places])).to(outs.dtype))
        return outs.view(output.shape)


class Adapters:
    """All adapters of a loaded model. The model itself answers as the base, but within `acting`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers: dict[str, _Layer] = {}
        self.names: list[str] = []
        self.tokens: _Tokens | None = None
        """Of the forward pass that is under way."""

    def add(self, name: str, folder: Path, base: str) -> None:
        """Takes an adapter in.

        Raises:
            UnfitError: it cannot be served.
        """
        config = _config(folder)
        if (meant := config.get("base_model_name_or_path")) not in (None, "", base):
            log.warning("the adapter names another base", adapter=name, meant=meant, base=base)
        halves = _tensors(folder)
        modules = dict(self._model.named_modules())
        if strange := sorted(halves.keys() - modules.keys()):
            raise UnfitError(f"{base!r} has no layer {strange[0]}. It was made for {meant!r}: is that the same model?")
        own: dict[str, Delta] = {}
        for path, pair in halves.items():
            own[path] = self._delta(path, modules[path], pair, config, base)
        for path, delta in own.items():
            if path not in self._layers:
                self._layers[path] = _Layer(self)
                modules[path].register_forward_hook(self._layers[path])
            self._layers[path].deltas[name] = delta
        self.names.append(name)
        ranks = sorted({delta.down.shape[0] for delta in own.values()})
        log.info("adapter", name=name, base=base, layers=len(own), ranks=ranks)

    @contextmanager
    def acting(self, owners: Iterable[tuple[str, int]]) -> Iterator[None]:
        """Within it, forward passes have these tokens, in order: the name of whose they are, and how many.

        Names that are no adapter's are the base. A single owner has all tokens, however many there are.
        """
        if self.names:
            tokens = _Tokens(owners)
            self.tokens = tokens if any(name in self.names for name in tokens.names) else None
        try:
            yield
        finally:
            self.tokens = None

    def of(self, model: str) -> str:
        """The name of the adapter that a model is; empty for the base."""
        return model if model in self.names else ""

    def cards(self, base: ModelCard) -> tuple[ModelCard, ...]:
        """What is said of each in the registry."""
        return tuple(replace(base, name=name, base=base.name) for name in self.names)

    def check_called(self) -> None:
        """After forward passes of the whole model.

        Raises:
            ConfigurationError: it goes around the module of a layer, and would go around the adapter's part, too.
        """
        unheard = [module for module, layer in self._layers.items() if not layer.called]
        if unheard and self._model.config.get_text_config() is self._model.config:  # else they may be for images
            raise ConfigurationError(
                f"The LoRA adapters change {unheard[0]}, whose weights this model uses in a way of its own: "
                "they cannot be served by this engine."
            )

    def _delta(
        self, path: str, module: torch.nn.Module, pair: Mapping[str, torch.Tensor], config: dict[str, Any], base: str
    ) -> Delta:
        if pair.keys() != {"A", "B"}:
            raise UnfitError(f"{path} has no lora_{'B' if 'A' in pair else 'A'}.")
        down, up = pair["A"], pair["B"]
        sizes = _sizes(module)
        if sizes is None or module is self._model.get_output_embeddings():  # type: ignore[no-untyped-call]
            raise UnfitError(
                f"it changes {path} ({type(module).__name__}); only linear layers inside the model are served."
            )
        if "experts" in path.split("."):
            raise UnfitError(f"it changes {path}: an expert sees tokens in an order of its own, which is not served.")
        rank = int(_pattern(config, "rank_pattern", path, config["r"]))
        if rank < 1 or down.dim() != 2 or down.shape[0] != rank or up.dim() != 2 or up.shape[1] != rank:
            raise UnfitError(
                f"{CONFIG} gives {path} rank {rank}, its tensors are {tuple(down.shape)} and {tuple(up.shape)}."
            )
        if (down.shape[1], up.shape[0]) != sizes:
            raise UnfitError(
                f"its tensors for {path} map {down.shape[1]} to {up.shape[0]} values; the layer of {base!r} "
                f"maps {sizes[0]} to {sizes[1]}. It was made for {config.get('base_model_name_or_path')!r}."
            )
        if not (down.isfinite().all() and up.isfinite().all()):
            raise UnfitError(f"its tensors for {path} hold values that are not finite.")
        alpha = float(_pattern(config, "alpha_pattern", path, config["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        # half precision is too coarse for small changes: PEFT computes them in float32 as well
        dtype = self._model.dtype if self._model.dtype == torch.float64 else torch.float32
        weight = next((t for t in (*module.parameters(), *module.buffers()) if not t.is_meta), None)
        device = self._model.device if weight is None else weight.device
        return Delta(down.to(device, dtype), up.to(device, dtype), scale)


def fetch(sources: Mapping[str, str], options: LoadOptions) -> dict[str, Path]:
    """The folders of adapters, downloaded if need be, and a first look at them: to be taken before the base is loaded.

    Args:
        sources: the name of each -> a local folder or a hub id.

    Raises:
        ConfigurationError: one of them is not there or cannot be served; the message says why.
    """
    folders = {}
    for name, source in sources.items():
        folder = hub.fetch_adapter(source, options, Progress(source), (CONFIG, WEIGHTS))
        with _saying_which(name, folder):
            _config(folder)
            _weights_file(folder)
        folders[name] = folder
    return folders


def load(model: PreTrainedModel, base: str, folders: Mapping[str, Path]) -> Adapters:
    """Adapters on a loaded model, which is called ``base`` where it comes from.

    Raises:
        ConfigurationError: one of them cannot be served; the message says why.
    """
    adapters = Adapters(model)
    for name, folder in folders.items():
        with _saying_which(name, folder):
            adapters.add(name, folder, base)
    return adapters


@contextmanager
def _saying_which(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except UnfitError as error:
        raise ConfigurationError(f"LoRA adapter {name!r} ({folder}) cannot be served: {error}") from error


class UnfitError(Exception):
    """Why an adapter cannot be served."""


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: Any = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError as error:
        raise UnfitError(f"there is no {CONFIG}.") from error
    except (OSError, ValueError) as error:
        raise UnfitError(f"its {CONFIG} cannot be read: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UnfitError(f"its peft_type is {kind!r}; only LORA is served.")
    if config.get("bias", "none") != "none":
        raise UnfitError(f"it has biases of its own (bias={config['bias']!r}), which are not served.")
    if config.get("init_lora_weights", True) not in KEEPS_THE_BASE:
        raise UnfitError(
            f"it began as {config['init_lora_weights']!r}, which changes the base's weights. Convert it: "
            "save_pretrained with path_initial_model_for_weight_conversion."
        )
    if foreign := sorted(key for key, value in config.items() if value and key not in UNDERSTOOD):
        raise UnfitError(f"its {CONFIG} has {foreign[0]}={config[foreign[0]]!r}, which is not served.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise UnfitError(f"its {CONFIG} has {key}={config.get(key)!r}; a number is wanted.")
    return config


def _weights_file(folder: Path) -> Path:
    file = folder / WEIGHTS
    if not file.is_file():
        raise UnfitError(f"there is no {WEIGHTS}. (An adapter_model.bin is a pickle, which can run code: convert it.)")
    return file


def _tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Path of a module -> its halves ``A`` and ``B``."""
    try:
        tensors = load_file(_weights_file(folder))
    except (SafetensorError, OSError) as error:
        raise UnfitError(f"{WEIGHTS} cannot be read: {error}.") from error
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = TENSOR.fullmatch(key)
        if found is None:
            raise UnfitError(f"it has a tensor {key}; only lora_A and lora_B of linear layers are served.")
        halves.setdefault(found["module"], {})[found["half"]] = tensor
    if not halves:
        raise UnfitError(f"{WEIGHTS} is empty.")
    return halves


def _sizes(module: torch.nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, quantised ones and GPT-2's included; None: it is none."""
    pair: Any = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if pair == (None, None):
        pair = (getattr(module, "nx", None), getattr(module, "nf", None))
    return pair if all(isinstance(size, int) for size in pair) else None


def _pattern(config: dict[str, Any], key: str, path: str, default: Any) -> Any:
    """An entry that may differ from layer to layer; PEFT's rule (peft.utils.other.get_pattern_key)."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
