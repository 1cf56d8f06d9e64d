"""What sentence-transformers wrote beside a checkpoint: how its tokens become a vector, its prompts, its length.

Of its modules (modules.json) pooling, dense layers and normalisation are known; a checkpoint with others is refused.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastchat_q.choices import Pooling
from fastchat_q.errors import ConfigurationError

NAMES: dict[str, Pooling] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
    "last": "last",
    "lasttoken": "last",
}
"""Ways of pooling as the config of the module has them, without their prefix."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """What the files say; all of it may be missing."""

    pooling: Pooling = "auto"
    dense: tuple[Path, ...] = ()
    """Folders of the layers behind the pooling, in order."""
    normalise: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    """The name of the one that is put before all texts."""
    pools_prompt: bool = True
    """The tokens of the prompt count in the mean."""
    max_length: int | None = None
    lower: bool = False
    """Texts are lower-cased."""


def read(source: str, folder: Path, pooling: Pooling = "auto") -> Sentence:
    """What a checkpoint's folder says.

    Args:
        pooling: what was asked for instead of the checkpoint's own.

    Raises:
        ConfigurationError: it asks for what this engine cannot do.
    """
    modules = _json(source, folder / "modules.json")
    found: dict[str, Any] = {}
    if modules is not None:
        found["normalise"] = False
        for module in modules:
            path = folder / module.get("path", "")
            match str(module.get("type", "")).rpartition(".")[2]:
                case "Transformer":
                    pass
                case "Pooling":
                    found |= _pooling(source, _json(source, path / "config.json") or {}, pooling)
                case "Dense":
                    found["dense"] = (*found.get("dense", ()), path)
                case "Normalize":
                    found["normalise"] = True
                case other:
                    raise ConfigurationError(
                        f"Model {source!r} has a module that this engine does not know: {other or module}. Known are "
                        "Transformer, Pooling, Dense and Normalize."
                    )
    elif (own := _json(source, folder / "1_Pooling" / "config.json")) is not None:
        found |= _pooling(source, own, pooling)
    found.setdefault("pooling", pooling)
    told = _json(source, folder / "config_sentence_transformers.json") or {}
    return replace(
        lengths(source, folder),
        **found,
        prompts=told.get("prompts") or {},
        default_prompt=told.get("default_prompt_name"),
    )


def lengths(source: str, folder: Path) -> Sentence:
    """What it says of texts alone."""
    sizes = next((_json(source, path) for path in sorted(folder.glob("sentence_*_config.json"))), None) or {}
    return Sentence(max_length=sizes.get("max_seq_length"), lower=bool(sizes.get("do_lower_case")))


def _pooling(source: str, config: dict[str, Any], asked: Pooling) -> dict[str, Any]:
    pools_prompt = config.get("include_prompt", True)
    if asked != "auto":
        return {"pooling": asked, "pools_prompt": pools_prompt}
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or ())
    modes += [key.removeprefix("pooling_mode_") for key, on in config.items() if on is True and "mode" in key]
    if len(modes) != 1 or modes[0] not in NAMES:
        raise ConfigurationError(
            f"Model {source!r} pools by {' and '.join(modes) or 'nothing'}; this engine knows mean, cls and last. "
            "--pooling takes one of them instead, with other vectors than the model was trained for."
        )
    return {"pooling": NAMES[modes[0]], "pools_prompt": pools_prompt}


class Head:
    """From the hidden states of tokens to vectors.

    Args:
        pooling: not ``auto``.
        dense: from `dense_layers`.
    """

    def __init__(self, pooling: Pooling, dense: Callable[[torch.Tensor], torch.Tensor], normalise: bool) -> None:
        self.pooling = pooling
        self.normalise = normalise
        self._dense = dense

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden (rows, columns, width), mask (rows, columns) -> (rows, numbers) float32; padding is on the right."""
        vectors = self._dense(_pooled(self.pooling, hidden, mask))
        return torch.nn.functional.normalize(vectors, dim=-1) if self.normalise else vectors


def _pooled(pooling: Pooling, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    lengths = mask.sum(1)
    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
    kept = hidden.float().masked_fill(mask[..., None] == 0, 0.0)
    return kept.sum(1) / lengths[:, None]


def dense_layers(
    source: str, folders: tuple[Path, ...], device: torch.device, allow_pickle: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layers behind the pooling, in float32; none at all: what comes in goes out.

    Raises:
        ConfigurationError: one cannot be loaded.
    """
    layers = torch.nn.Sequential()
    for folder in folders:
        config = _json(source, folder / "config.json") or {}
        try:
            linear = torch.nn.Linear(config["in_features"], config["out_features"], config.get("bias", True))
            weights = _weights(source, folder, allow_pickle)
            linear.load_state_dict({name.removeprefix("linear."): weight for name, weight in weights.items()})
        except (KeyError, RuntimeError, OSError, ValueError) as error:
            raise ConfigurationError(
                f"Model {source!r} cannot be loaded: its layer {folder.name} is broken: {error}"
            ) from error
        layers.append(linear)
        layers.append(activation(source, config.get("activation_function", "torch.nn.modules.activation.Tanh")))
    return layers.to(device).eval()


def activation(source: str, name: str) -> torch.nn.Module:
    """An activation function of torch by its full name, which comes from the checkpoint.

    Raises:
        ConfigurationError: it is none: no other code is run for a checkpoint.
    """
    module, _, kind = name.rpartition(".")
    found = getattr(torch.nn, kind, None)
    if not module.startswith("torch.nn.modules.") or not isinstance(found, type):
        raise ConfigurationError(f"Model {source!r} asks for {name!r}, which is no activation function of torch.")
    made = found()
    assert isinstance(made, torch.nn.Module)
    return made


def _weights(source: str, folder: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    if not allow_pickle:
        raise ConfigurationError(
            f"Model {source!r} cannot be loaded: the weights of its layer {folder.name} are pickled or missing, and a "
            "pickle can run code. If you trust where it comes from: --allow-pickle."
        )
    loaded: dict[str, torch.Tensor] = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return loaded


def _json(source: str, path: Path) -> Any:
    """None without such a file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"Model {source!r} cannot be loaded: its {path.name} is broken: {error}") from error
