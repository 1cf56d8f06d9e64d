"""From a path or hub id to a model on a device, or to an error that says what to do.

`hub` has the files, `devices` the places, `quantization` the methods, `memory` the sizes, `progress` the bars.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from fastchat_q.workers import adapters
from fastchat_q.workers.families import Choice
from fastchat_q.workers.parsing import Format, format_of
from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastchat_q.choices import AS_IT_IS, UNDERSTOOD, Device, Dtype, LoadOptions, check_understood
from fastchat_q.errors import ConfigurationError
from fastchat_q.jobs import Feature, Kind
from fastchat_q.registry import Batching, ModelCard
from fastchat_q.sizes import in_words

from ..processing.rendering import give_template, stop_ids
from ..processing.speech import written_by
from ..processing.vision import Sight, sight_of
from ..trouble import is_out_of_memory
from . import hub
from .checkpoint import stored_bytes
from .configs import context_length, encoder_class, model_class, takes_images
from .devices import Placement, pick_device, place
from .plan import config_trouble, pick_dtype, read_config, weights_needed
from .progress import OnProgress, Progress
from .quantization import arguments, choose, dtype_for, settle

log = structlog.get_logger()

WIDEST = 8
"""Times that weights can grow while loading: from 4 bits to float32."""
WAYS_OUT = (
    "Take --dtype bfloat16 or --quantization bitsandbytes-4bit, several GPUs with --num-gpus, "
    "or --cpu-offload and --offload-dir."
)

PLACING = {"quantization", "num_gpus", "max_gpu_memory", "cpu_offload", "max_cpu_memory", "offload_dir"}
ADAPTED = UNDERSTOOD["transformers"] - PLACING
"""What is left of the options for a model that its adapter loads."""
PROCESSORS: dict[str, object] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
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
    """Where its inputs go."""
    context_length: int | None
    eos_ids: frozenset[int]
    chat: Choice | None = None
    """Its family and chat template; None: the tokenizer's own, of a family that is not known, or none."""
    adapter: adapters.Adapter | None = None
    format: Format = field(default_factory=Format)
    """How it writes tool calls and reasoning."""
    sight: Sight | None = None
    """What takes images in; None: it takes none."""

    def card(
        self, name: str, engine: str, features: tuple[Feature, ...], batching: Batching = "step loop"
    ) -> ModelCard:
        """What an engine that serves it as ``name`` tells of it."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        made, device = int(time.time()), self.device.type
        kind: Kind = "chat" if self.takes_chats else "completion"
        return ModelCard(
            name, engine, self.context_length, made, device, dtype, kind, features=features, batching=batching
        )

    @property
    def takes_chats(self) -> bool:
        """Whether something makes a prompt of messages."""
        return self.tokenizer.chat_template is not None or isinstance(self.adapter, adapters.Templates)


def load(
    source: str,
    device: Device = "auto",
    dtype: Dtype = "auto",
    options: LoadOptions = AS_IT_IS,
    on_progress: OnProgress | None = None,
) -> Loaded:
    """Loads a language model and its tokenizer.

    Args:
        source: a built-in name, a local folder, a .gguf file, a Hugging Face hub id, or ``owner/name/file.gguf``.
        device: ``auto`` takes the first accelerator that is there, else the CPU.
        dtype: ``auto`` takes the checkpoint's own, but float32 instead of float16 on a CPU, which has no fast half.
        on_progress: is told how far download and load are.

    Raises:
        ConfigurationError: it cannot be loaded; the message says why and what to do.
    """
    format_of(options.tool_call_parser, options.reasoning_parser)  # a wrong name is told before the weights are read
    placement = place(pick_device(device), options)
    progress = Progress(source, on_progress)
    files = hub.fetch(source, options, progress)
    entries = {} if files.gguf else _entries(source, files)
    adapter = adapters.find(entries)
    if isinstance(adapter, adapters.Loads):
        check_understood(options, ADAPTED, repr(source), "its adapter loads it, with device and dtype. Leave it out.")
        model, tokenizer = _adapted(source, files, adapter, placement.device, dtype)
    else:
        model, tokenizer = _from_checkpoint(source, files, options, placement, dtype, progress)
    processor = None if files.gguf or adapter is not None else _processor(source, model, files, options)
    if processor is not None and tokenizer.chat_template is None:
        tokenizer.chat_template = processor.chat_template
    chat = None
    if not isinstance(adapter, adapters.Templates):
        chat = give_template(
            tokenizer, source, files.repo or str(files.folder), entries, options.chat_template, options.revision
        )
    torch.nn.Module.eval(model)
    progress.report("load", 1, 1)
    _warn_of_ignored_settings(source, model)
    length = context_length(model.config, options.max_model_len)
    eos_ids = _eos_ids(model, tokenizer) | (stop_ids(tokenizer, chat) if chat is not None else frozenset())
    written, inputs_to = written_by(options, chat), _input_device(model, placement)
    sight = sight_of(processor, tokenizer.chat_template, model, inputs_to)
    return Loaded(model, tokenizer, inputs_to, length, eos_ids, chat, adapter, written, sight)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model that makes vectors or scores, ready to run."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    """Where its inputs go."""
    context_length: int | None
    folder: Path
    """Where its files are."""


def load_encoder(
    source: str,
    kind: Kind,
    device: Device = "auto",
    dtype: Dtype = "auto",
    options: LoadOptions = AS_IT_IS,
    on_progress: OnProgress | None = None,
) -> Encoder:
    """Loads a model for embeddings, or with its head of one label for rankings; the rest is as in `load`.

    Raises:
        ConfigurationError: it cannot be loaded; the message says why and what to do.
    """
    placement = place(pick_device(device), options)
    progress = Progress(source, on_progress)
    files = hub.fetch(source, options, progress)
    model, tokenizer = _from_checkpoint(source, files, options, placement, dtype, progress, kind)
    torch.nn.Module.eval(model)
    progress.report("load", 1, 1)
    length = context_length(model.config, options.max_model_len)
    return Encoder(model, tokenizer, _input_device(model, placement), length, files.folder)


def _entries(source: str, files: hub.Files) -> dict[str, Any]:
    """config.json as it is in the file: adapters are for models that transformers does not know."""
    try:
        entries: dict[str, Any] = PreTrainedConfig.get_config_dict(files.folder)[0]
    except Exception as error:
        raise ConfigurationError(f"Model {source!r} cannot be loaded: {_first_line(error)}") from error
    return entries


def _adapted(
    source: str, files: hub.Files, adapter: adapters.Loads, device: torch.device, dtype: Dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    try:
        model, tokenizer = adapter.load(str(files.folder), device=device, dtype=wanted)
        torch.nn.Module.to(model, device)
    except ConfigurationError:
        raise
    except Exception as error:  # somebody else's code
        raise ConfigurationError(f"Model {source!r} cannot be loaded: {_first_line(error)}") from error
    return model, tokenizer


def _from_checkpoint(
    source: str,
    files: hub.Files,
    options: LoadOptions,
    placement: Placement,
    dtype: Dtype,
    progress: Progress,
    kind: Kind = "chat",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = read_config(source, files, options)
    method = choose(options.quantization, source, config, placement.device, gguf=files.gguf is not None)
    chosen = dtype_for(method, pick_dtype(dtype, config, placement.device))
    auto, extra = (model_class(config), {}) if kind == "chat" else encoder_class(config, kind)
    _check_room(source, auto, config, files, method, chosen, placement)
    tokenizer = _tokenizer(source, files, options)
    with progress.of_weights():
        model = _weights(source, auto, config, files, options, placement, method, chosen, extra)
    settle(model, method)
    return model, tokenizer


def _tokenizer(source: str, files: hub.Files, options: LoadOptions) -> PreTrainedTokenizerBase:
    extra = {"gguf_file": files.gguf} if files.gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=options.trust_remote_code, **extra)
    except Exception as error:  # a broken checkpoint may raise anything
        raise ConfigurationError(f"Model {source!r} cannot be loaded: {_first_line(error)}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _processor(source: str, model: PreTrainedModel, files: hub.Files, options: LoadOptions) -> Any:
    """What prepares images for a model that takes them; None, with a word in the log, if it cannot be loaded."""
    if not takes_images(model.config):
        return None
    try:
        auto: Any = AutoProcessor
        processor = auto.from_pretrained(files.folder, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # none is there, or a package that it needs
        log.warning("no processor: images are not taken", model=source, why=_first_line(error))
        return None
    return processor if hasattr(processor, "image_processor") else None


def _weights(
    source: str,
    auto: Any,
    config: PreTrainedConfig,
    files: hub.Files,
    options: LoadOptions,
    placement: Placement,
    method: str | None,
    dtype: torch.dtype,
    extra: dict[str, Any],
) -> PreTrainedModel:
    extra = extra | ({"gguf_file": files.gguf} if files.gguf else {"use_safetensors": not files.pickled})
    try:
        both: Any = auto.from_pretrained(
            files.folder,
            config=config,
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            **placement.arguments,
            **arguments(method, dtype),
            **extra,
        )
    except Exception as error:  # a broken checkpoint may raise anything: KeyError, SafetensorError, RuntimeError
        if is_out_of_memory(error):
            raise ConfigurationError(
                f"Model {source!r} does not fit on {placement.device}: {_first_line(error)} {WAYS_OUT}"
            ) from error
        raise ConfigurationError(f"Model {source!r} cannot be loaded: {_first_line(error)}") from error
    model, report = both
    if missing := sorted(report["missing_keys"]):  # these would be random numbers, and so would the answers
        raise ConfigurationError(
            f"Model {source!r} cannot be loaded: its files hold no weights for {len(missing)} tensors, such as "
            f"{missing[0]}. Download it again, or correct its config.json."
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _check_room(
    source: str,
    auto: Any,
    config: PreTrainedConfig,
    files: hub.Files,
    method: str | None,
    dtype: torch.dtype,
    placement: Placement,
) -> None:
    """Refuses files that are damaged, and a load that cannot fit: on a CPU the kernel would end this process."""
    stored = None if files.gguf else stored_bytes(source, files.folder)
    if placement.to_disk or (stored is not None and stored[1] * WIDEST <= placement.budget):
        return
    need = weights_needed(auto, config, method, dtype, stored[1] if stored else None)
    if need is None or need <= placement.budget:
        return
    name = str(dtype).removeprefix("torch.") + (f" with {method}" if method else "")
    there = ", ".join(f"{name} {in_words(size)}" for name, size in placement.budgets.items())
    raise ConfigurationError(
        f"Model {source!r} does not fit: its weights are {in_words(need)} as {name}, and there is room for "
        f"{in_words(placement.budget)} ({there}). {WAYS_OUT} `fastchat-q plan {source}` compares them."
    )


def _input_device(model: PreTrainedModel, placement: Placement) -> torch.device:
    """Where accelerate wants the inputs of a model that is spread: on the device that computes its first layer."""
    places = getattr(model, "hf_device_map", None)
    if not placement.spread or not places:
        return placement.device
    first = next((where for where in places.values() if where not in {"cpu", "disk"}), "cpu")
    return torch.device(placement.device.type, first) if isinstance(first, int) else torch.device(first)


def _warn_of_ignored_settings(source: str, model: PreTrainedModel) -> None:
    """Says which parts of the model's generation_config.json ``generate`` would apply and this engine does not."""
    config = getattr(model, "generation_config", None)  # a model of an adapter need not have one
    ignored = {
        name: value
        for name, neutral in PROCESSORS.items()
        if (value := getattr(config, name, None)) is not None and value != neutral
    }
    if ignored:
        log.warning("generation_config entries are not applied", model=source, entries=ignored)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a generation: the ids that ``generate`` stops at, or else the tokenizer's."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _first_line(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"a JSON file of it is broken: {error}"
    if isinstance(error, KeyError):
        return f"an unknown or missing entry in its configuration: {error}"
    if isinstance(error, ImportError):
        return f"a package is missing: {hub.first_line(error)}"
    return config_trouble(error)
