"""What may be chosen on the command line. Here, so that the command line need not import what it runs."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from .errors import ConfigurationError
from .models import served_name

if TYPE_CHECKING:
    from .jobs import Kind

EngineName = Literal[
    "transformers", "embeddings", "rerank", "vllm", "echo", "openai", "anthropic", "gemini", "llama-cpp"
]
KIND_OF_ENGINE: "dict[str, Kind]" = {"embeddings": "embed", "rerank": "rerank"}
"""Which jobs an engine takes, if not chats."""
FORWARDING: frozenset[EngineName] = frozenset({"openai", "anthropic", "gemini", "llama-cpp"})
"""Engines whose model is another server, which may think for minutes without a word; sent again, it is paid again."""
STALL_S, FORWARDED_STALL_S = 60.0, 600.0
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
DialectName = Literal["vllm", "sglang", "llamacpp", "ollama", "openai", "fastchat-q"]
"""Kinds of servers that speak OpenAI's API."""
TOKEN_DELAY_MS = 20.0
"""Pace of the echo engine."""
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
    dialect: DialectName | None = field(
        default=None, metadata=_help("openai: the kind of server. [default: what its list of models says]")
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


_PLACED = frozenset({"device", "dtype", "threads", "trust_remote_code", "revision", "max_model_len"})
_OURS = _PLACED | {
    *("quantization", "num_gpus", "max_gpu_memory", "cpu_offload", "max_cpu_memory", "offload_dir", "allow_pickle"),
}
_SERVER = frozenset({"base_url", "api_key_env"})
UNDERSTOOD: dict[EngineName, frozenset[str]] = {
    "transformers": _OURS | {"chat_template", "tool_call_parser", "reasoning_parser", "kv_memory", "lora"},
    "embeddings": _OURS | {"pooling", "prompt_name", "batch_tokens"},
    "rerank": _OURS | {"batch_tokens"},
    "vllm": _PLACED | {"num_gpus", "chat_template", "tool_call_parser", "reasoning_parser", "engine_arg", "lora"},
    "echo": frozenset({"token_delay_ms"}),
    "openai": _SERVER | {"dialect"},
    "anthropic": _SERVER,
    "gemini": _SERVER,
    "llama-cpp": frozenset({"device", "threads", "max_model_len"}),
}
"""Which engine does something with which option; model, name and slots are for all."""
INSTEAD: dict[EngineName, str] = {
    "vllm": "vLLM has options of its own for most such things: --engine-arg KEY=VALUE.",
    "llama-cpp": "llama.cpp takes what is in the file, and every GPU that it sees: CUDA_VISIBLE_DEVICES=0,1.",
    "openai": "The server behind has its own.",
    "anthropic": "The server behind has its own.",
    "gemini": "The server behind has its own.",
}
"""The way out, where it is not another engine."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker is told on its command line.

    Raises:
        ConfigurationError: the engine would not do anything with one of them.
    """

    model: str
    name: str | None = None
    engine: EngineName = "transformers"
    slots: int | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    threads: int | None = None
    token_delay_ms: float = TOKEN_DELAY_MS
    load: LoadOptions = AS_IT_IS
    upstream: UpstreamOptions = NO_UPSTREAM
    engine_arg: tuple[str, ...] = ()
    """Of vLLM's own options, as ``key=value``."""
    lora: tuple[str, ...] = ()
    """LoRA adapters of the model, as ``name=source``."""
    encoder: EncoderOptions = AS_THE_CHECKPOINT_SAYS

    def __post_init__(self) -> None:
        understood = UNDERSTOOD[self.engine] | {"model", "name", "engine", "slots"}
        if unknown := set(given(self)) - understood:
            name = min(unknown)
            engines = [engine for engine in UNDERSTOOD if name in UNDERSTOOD[engine]]
            way_out = INSTEAD.get(
                self.engine, f"Leave it out, or take {'that' if len(engines) == 1 else 'such an'} engine."
            )
            refuse(name, f"--engine {self.engine}", f"only for --engine {', '.join(engines)}. {way_out}")

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


def given(options: Any) -> Iterator[str]:
    """The options that ask for something: those that are not their default."""
    for entry in fields(options):
        value = getattr(options, entry.name)
        if is_dataclass(value):
            yield from given(value)
        elif value != entry.default:
            yield entry.name


def check_understood(options: LoadOptions, understood: Collection[str], whose: str, way_out: str) -> None:
    """Refuses options of loading that were given and would be dropped.

    Raises:
        ConfigurationError: it names the first of them.
    """
    if unknown := set(given(options)) - set(understood):
        refuse(min(unknown), whose, way_out)


def refuse(name: str, whose: str, way_out: str) -> NoReturn:
    """Raises the ConfigurationError for an option that would be dropped."""
    raise ConfigurationError(f"{flag(name)} is not for {whose}: {way_out}")


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


def stall_s(engine: EngineName, asked: float | None) -> float:
    """How long a job of this engine may be without a token before it is tried again."""
    if asked is not None:
        return asked
    return FORWARDED_STALL_S if engine in FORWARDING else STALL_S


def flag(name: str) -> str:
    """The option of a field: ``num_gpus`` is ``--num-gpus``."""
    return "--" + name.replace("_", "-")
