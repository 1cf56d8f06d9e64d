"""From a path or hub id to a model on a device, or to an error that says what to do."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fastchat_q.choices import Device, Dtype
from fastchat_q.errors import ConfigurationError
from fastchat_q.models import BUILTIN

log = structlog.get_logger()

BUILTIN_DIRS = {name: Path(__file__).parent / name / "model" for name in BUILTIN}
"""Where the built-in models lie inside the package."""


PROCESSORS: dict[str, object] = {
    "repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "forced_bos_token_id": None,
    "min_length": 0,
    "min_new_tokens": None,
}
"""Entries of a generation config that change even greedy output, and the values that do nothing."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, with what the engine must know of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    context_length: int | None
    eos_ids: frozenset[int]


def load(source: str, device: Device = "auto", dtype: Dtype = "auto") -> Loaded:
    """Loads a causal LM and its tokenizer; weights as safetensors only, and no code from the checkpoint.

    Args:
        source: a built-in name, a local folder, or a Hugging Face hub id.
        device: ``auto`` takes the first accelerator that is there, else the CPU.
        dtype: ``auto`` takes the checkpoint's own, but float32 instead of float16 on a CPU, which has no fast half.

    Raises:
        ConfigurationError: it cannot be loaded; the message says why and what to do.
    """
    path = str(BUILTIN_DIRS.get(source, source))
    target = pick_device(device)
    if _looks_like_a_folder(source) and not Path(path).is_dir():
        raise ConfigurationError(f"Model {source!r} cannot be loaded: there is no such folder.")
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        both: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=_pick_dtype(dtype, config, target), use_safetensors=True, output_loading_info=True
        )
        model, report = both
    except Exception as error:  # a broken checkpoint may raise anything: KeyError, SafetensorError, RuntimeError
        raise ConfigurationError(f"Model {source!r} cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):  # these would be random numbers, and so would the answers
        raise ConfigurationError(
            f"Model {source!r} cannot be loaded: its files hold no weights for {len(missing)} tensors, such as "
            f"{missing[0]}. Download it again, or correct its config.json."
        )
    if tokenizer.chat_template is None:
        raise ConfigurationError(
            f"Model {source!r} has no chat template in its tokenizer, so it cannot take chat messages. "
            "Use an instruction-tuned variant of it."
        )
    try:
        torch.nn.Module.to(model, target)
        torch.nn.Module.eval(model)
    except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
        raise ConfigurationError(f"Model {source!r} does not fit on {target}: {_first_line(error)}") from error
    _warn_of_ignored_settings(source, model)
    return Loaded(model, tokenizer, target, _context_length(config), _eos_ids(model, tokenizer))


def pick_device(device: Device) -> torch.device:
    """The torch device for a choice on the command line.

    Raises:
        ConfigurationError: the device is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        return accelerator or torch.device("cpu")
    if device == "cpu" or (accelerator is not None and accelerator.type == device):
        return torch.device(device)
    have = f"only {accelerator.type} and cpu" if accelerator else "only the cpu"
    raise ConfigurationError(
        f"Device {device!r} is not available to this PyTorch ({torch.__version__}): it sees {have}."
    )


def set_threads(threads: int | None) -> None:
    """Fixes torch's CPU threads: its default of all cores collapses as soon as another process wants one."""
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 2) - 1))


def _looks_like_a_folder(source: str) -> bool:
    """Hub ids are ``name`` or ``owner/name``, and begin with a letter or a digit."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1


def _pick_dtype(dtype: Dtype, config: Any, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    own = config.get_text_config().dtype or torch.float32
    return torch.float32 if device.type == "cpu" and own == torch.float16 else own


def _context_length(config: Any) -> int | None:
    """Read from the text config as it stands: on transformers 5 a rope factor is already in it."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _warn_of_ignored_settings(source: str, model: PreTrainedModel) -> None:
    """Says which parts of the model's generation_config.json ``generate`` would apply and this engine does not."""
    config = model.generation_config
    ignored = {
        name: value
        for name, neutral in PROCESSORS.items()
        if (value := getattr(config, name, None)) is not None and value != neutral
    }
    if ignored:
        log.warning("generation_config entries are not applied", model=source, entries=ignored)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a generation: the ids that ``generate`` stops at, or else the tokenizer's."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    if eos is None:
        eos = tokenizer.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _first_line(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"a JSON file of it is broken: {error}"
    if isinstance(error, KeyError):
        return f"an unknown or missing entry in its configuration: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines) if lines[0].endswith(":") else lines[0]
