"""What may be chosen on the command line. Here, so that the command line need not import what it runs."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigurationError
from .models import served_name

if TYPE_CHECKING:
    from .jobs import Kind

EngineName = Literal[
    "transformers", "embeddings", "rerank", "vllm", "echo", "openai", "anthropic", "gemini", "llama-cpp"
]
KIND_OF_ENGINE: "dict[str, Kind]" = {"embeddings": "embed", "rerank": "rerank"}
"""Which jobs an engine takes, if not chats."""
Pooling = Literal["auto", "mean", "cls", "last"]
"""What becomes the vector of a text: the mean of its tokens, the first, or the last."""
Device = Literal["auto", "cpu", "cuda", "mps", "xpu", "npu"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Quantization = Literal[
    "auto",
    "none",
    "bitsandbytes-8bit",
    "bitsandbytes-4bit",
    "torchao-int8wo",
    "torchao-int4wo",
    "gptq",
    "awq",
    "compressed-tensors",
    "gguf",
]
"""``auto``: as the checkpoint is. bitsandbytes and torchao quantise while loading, the rest are kinds of checkpoint."""
Role = Literal["api", "worker", "orchestrator", "metrics", "admin"]
"""Kinds of process, and ``admin`` for people, that have a Redis user each."""
ServerVersion = Literal["6.2", "7.0"]
JobFilter = Literal["running", "queued", "delayed", "parked"]
"""Jobs that have not ended: ``queued`` is all that wait, ``delayed`` and ``parked`` are those that are not in line."""


def _help(text: str, least: int | None = None) -> dict[str, Any]:
    return {"help": text, "min": least}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a checkpoint is fetched and placed, beside device and dtype: an option of the command line per field."""

    quantization: Quantization = field(
        default="auto", metadata=_help("bitsandbytes and torchao quantise while loading; auto: as the checkpoint is.")
    )
    num_gpus: int | None = field(default=None, metadata=_help("Spread the layers over this many GPUs.", 1))
    max_gpu_memory: str | None = field(
        default=None, metadata=_help("Weights per GPU, such as 20GiB. [default: 90 % of what is free]")
    )
    cpu_offload: bool = field(default=False, metadata=_help("Keep in main memory what does not fit on the GPUs; slow."))
    max_cpu_memory: str | None = field(
        default=None, metadata=_help("Weights in main memory, such as 64GiB. [default: 90 % of what is free]")
    )
    offload_dir: str | None = field(
        default=None, metadata=_help("Keep on disk, by this folder, what fits nowhere else; very slow.")
    )
    revision: str | None = field(default=None, metadata=_help("Branch, tag or commit on the hub. [default: main]"))
    trust_remote_code: bool = field(default=False, metadata=_help("Run Python code that comes with the checkpoint."))
    allow_pickle: bool = field(
        default=False, metadata=_help("Take pickled weights, which can run code, where no safetensors are.")
    )
    chat_template: str | None = field(
        default=None,
        metadata=_help("A family (see models families), a .jinja file or a .toml row. [default: the model's own]"),
    )
    tool_call_parser: str | None = field(
        default=None, metadata=_help("How the model writes tool calls, such as hermes. [default: its family's]")
    )
    reasoning_parser: str | None = field(
        default=None, metadata=_help("How the model writes reasoning, such as qwen3. [default: its family's]")
    )
    max_model_len: int | None = field(default=None, metadata=_help("Cap the context length. [default: the model's]", 1))
    kv_memory: str | None = field(
        default=None,
        metadata=_help(
            "Keys and values of all requests, such as 8GiB. [default: 80 % of a GPU's free memory, 25 % of RAM's]"
        ),
    )


AS_IT_IS = LoadOptions()
"""Nothing asked for."""


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """The server that a forwarding engine asks."""

    base_url: str | None = field(
        default=None, metadata=_help("Forwarding engines: the server, such as http://host/v1.")
    )
    api_key_env: str | None = field(
        default=None, metadata=_help("Forwarding engines: the environment variable that holds the server's key.")
    )


NO_UPSTREAM = UpstreamOptions()


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """How the engines for embeddings and rankings compute."""

    pooling: Pooling = field(default="auto", metadata=_help("Embeddings: auto is what the checkpoint says."))
    prompt_name: str | None = field(
        default=None, metadata=_help("Embeddings: put this prompt of the checkpoint before each text, such as query.")
    )
    batch_tokens: int | None = field(
        default=None,
        metadata=_help("Embeddings, rerank: tokens of a forward pass. [default: 16384, on a CPU 1024]", 1),
    )


AS_THE_CHECKPOINT_SAYS = EncoderOptions()


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker is told on its command line."""

    model: str
    name: str | None
    engine: EngineName
    slots: int | None
    device: Device
    dtype: Dtype
    threads: int | None
    token_delay_ms: float
    load: LoadOptions = AS_IT_IS
    upstream: UpstreamOptions = NO_UPSTREAM
    engine_arg: tuple[str, ...] = ()
    """Of vLLM's own options, as ``key=value``."""
    lora: tuple[str, ...] = ()
    """LoRA adapters of the model, as ``name=source``."""
    encoder: EncoderOptions = AS_THE_CHECKPOINT_SAYS

    @property
    def served_as(self) -> str:
        """The name clients use."""
        return self.name or served_name(self.model)

    @property
    def adapters(self) -> dict[str, str]:
        """Names of models that are adapters of this one -> a folder or hub id.

        Raises:
            ConfigurationError: something is not of that form, or two names are the same.
        """
        found: dict[str, str] = {}
        for words in self.lora:
            name, _, source = words.partition("=")
            if not name or not source:
                raise ConfigurationError(f"--lora {words!r}: expected NAME=FOLDER or NAME=HUB_ID.")
            if name in (self.served_as, *found):
                raise ConfigurationError(f"--lora {words}: another model of this worker is called {name!r}.")
            found[name] = source
        return found

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        return list(_words(self))


@dataclass(frozen=True, slots=True)
class DemandOptions:
    """Which further models a worker is told to serve, and when they come and go."""

    more: tuple[str, ...] = ()
    """Beside the one of `WorkerOptions`; each may be ``NAME=MODEL``."""
    on_demand: bool = False
    keep_alive: str = "5m"
    max_loaded: int = 1

    @property
    def applies(self) -> bool:
        """Whether models are loaded on demand."""
        return self.on_demand or bool(self.more)

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        words = [word for model in self.more for word in ("--model", model)]
        words += ["--on-demand"] if self.on_demand else []
        return [*words, "--keep-alive", self.keep_alive, "--max-loaded", str(self.max_loaded)]


def _words(options: Any) -> Iterator[str]:
    for entry in fields(options):
        value = getattr(options, entry.name)
        if is_dataclass(value):
            yield from _words(value)
        elif isinstance(value, tuple):
            for one in value:
                yield from (flag(entry.name), one)
        elif value is True:
            yield flag(entry.name)
        elif value is not None and value is not False:
            yield from (flag(entry.name), str(value))


def flag(name: str) -> str:
    """The option of a field: ``num_gpus`` is ``--num-gpus``."""
    return "--" + name.replace("_", "-")
