"""From a worker's options to a running vLLM, or to an error that says what to do. Importing it imports vLLM."""

import os

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM reports its use to its makers unless it is told not to

import argparse
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from fastchat_q.workers.parsing import format_of
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from fastchat_q.choices import LoadOptions, WorkerOptions, given, refuse
from fastchat_q.errors import ConfigurationError

from ..base import STOP_S
from ..loading.builtin import BUILTIN_DIRS
from . import lora as vllm_lora
from . import tether as vllm_tether
from .engine import VllmEngine
from .lora import in_a_line, is_cpu

BIND = "VLLM_CPU_OMP_THREADS_BIND"
OURS = {
    *("revision", "tensor-parallel-size", "max-model-len", "trust-remote-code"),
    *("model", "served-model-name", "dtype", "max-num-seqs", "enable-log-requests", "enable-lora"),
    *("structured-outputs-config", "reasoning-parser", "reasoning-parser-plugin"),
}
"""What this program sets, from its own options."""
ALWAYS = ("--structured-outputs-config.backend=guidance",)
"""Grammars are llguidance's, as in the transformers engine (docs/decisions/0011): vLLM's own choice would be xgrammar
for those that it can read, and one process has one backend."""
DEFAULTS = {"tokenizer-mode": "hf"}
"""Unless --engine-arg says otherwise: prompts are rendered here, by transformers' tokenizer."""
VLLM_NAMES = {"revision": "revision", "num_gpus": "tensor-parallel-size", "max_model_len": "max-model-len"}
"""Our options of loading -> vLLM's."""


def build(options: WorkerOptions, name: str, adapters: Mapping[str, str] | None = None) -> VllmEngine:
    """Starts vLLM's processes and loads the model.

    Args:
        adapters: the name of a model -> the folder or hub id of the LoRA adapter of this model that it is.

    Raises:
        ConfigurationError: it cannot be started; the message says why.
    """
    _check_device(options.device)
    format_of(options.load.tool_call_parser, options.load.reasoning_parser)  # a wrong name is told before all else
    arguments = [f"--model={BUILTIN_DIRS.get(options.model, options.model)}", f"--dtype={options.dtype}"]
    arguments += _load_arguments(options.load)
    if options.slots is not None:
        arguments.append(f"--max-num-seqs={options.slots}")
    loras = vllm_lora.requests(adapters or {})
    arguments += vllm_lora.arguments(loras)
    given = engine_arguments(options.engine_arg)
    named = {word.removeprefix("--").partition("=")[0] for word in given}
    arguments += [*ALWAYS, *(f"--{option}={value}" for option, value in DEFAULTS.items() if option not in named)]
    args = _parse(arguments + given)
    if is_cpu():
        _place_threads(args, options.threads)
    elif options.threads is not None:
        refuse("threads", "vLLM on a GPU", "it computes there. Leave it out.")
    vllm_tether.own()
    vllm_lora.check(args.max_loras, loras)
    try:
        llm = AsyncLLM.from_engine_args(args)
    except Exception as error:  # of many kinds: what its configs refuse, and what its processes died of
        raise ConfigurationError(f"vLLM cannot serve {options.model!r}: {in_a_line(error)}") from error
    try:
        return VllmEngine(name, llm, options.load, loras)
    except BaseException:
        llm.shutdown(timeout=STOP_S)
        raise


def _place_threads(args: Any, threads: int | None) -> None:
    """How many threads compute on a CPU, and in which process.

    vLLM gives the model a process of its own, which the engine's awaits in a busy loop: on few cores that takes time
    away from what computes. It is there to bind threads to the cores of a memory node, so with one node and one rank
    the engine's process computes itself.
    """
    ranks = args.tensor_parallel_size * args.pipeline_parallel_size * args.data_parallel_size
    cores = sorted(os.sched_getaffinity(0))
    if ranks == 1 and args.distributed_executor_backend is None and BIND not in os.environ and _memory_nodes() == 1:
        args.distributed_executor_backend = UniProcExecutor
        os.environ.setdefault("OMP_NUM_THREADS", str(threads or max(1, len(cores) - 1)))
    elif threads is not None:
        os.environ.setdefault(BIND, ",".join(map(str, cores[:threads])))


def _memory_nodes() -> int:
    try:
        return sum(path.name[4:].isdigit() for path in Path("/sys/devices/system/node").glob("node*")) or 1
    except OSError:
        return 1


def engine_arguments(pairs: Iterable[str]) -> list[str]:
    """``key=value`` pairs as the command line of ``vllm serve`` that says the same; checked against its options.

    Raises:
        ConfigurationError: not such a pair, or no such option.
    """
    known = {
        word.removeprefix("--"): action
        for action in _parser()._actions
        for word in action.option_strings
        if word.startswith("--")
    }
    arguments = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        option = key.strip().removeprefix("--").replace("_", "-")
        first = option.split(".")[0]
        action = known.get(first)
        if first in OURS:
            raise ConfigurationError(f"--engine-arg {option}: this program sets it from its own options; see --help.")
        if action is None:
            near = get_close_matches(option, known.keys() - OURS, n=3, cutoff=0.6)
            hint = f"Did you mean {' or '.join(near)}?" if near else "`vllm serve --help=all` lists them."
            raise ConfigurationError(f"--engine-arg {key}: vLLM's engine has no such option. {hint}")
        if not isinstance(action, argparse.BooleanOptionalAction):
            if not equals:
                raise ConfigurationError(f"--engine-arg {key}: it needs a value, as in {key}=...")
            arguments.append(f"--{option}={value}")
        elif value.lower() in ("", "true", "1", "yes"):
            arguments.append(f"--{option}")
        elif value.lower() in ("false", "0", "no"):
            arguments.append(f"--no-{option}")
        else:
            raise ConfigurationError(f"--engine-arg {pair}: true or false is wanted.")
    return arguments


def _load_arguments(load: LoadOptions) -> list[str]:
    """How a checkpoint is to be loaded, in vLLM's words; `choices.UNDERSTOOD` says what may be asked for."""
    words = [f"--{VLLM_NAMES[name]}={getattr(load, name)}" for name in given(load) if name in VLLM_NAMES]
    return words + (["--trust-remote-code"] if load.trust_remote_code else [])


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM is not there for the static check
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"--engine-arg: {message}")


def _parser() -> Any:
    return AsyncEngineArgs.add_cli_args(_Parser(add_help=False))


def _parse(arguments: Sequence[str]) -> AsyncEngineArgs:
    args = AsyncEngineArgs.from_cli_args(_parser().parse_args(list(arguments)))
    args.disable_log_stats = True  # this worker has figures of its own
    return args


def _check_device(device: str) -> None:
    have = current_platform.device_type
    if device not in ("auto", have):
        raise ConfigurationError(f"Device {device!r}: the vLLM that is installed here is built for {have!r}.")
