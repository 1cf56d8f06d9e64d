"""The engine's process: loads the engine that was chosen, then serves until SIGTERM or SIGINT."""

import asyncio
import faulthandler
import os
import signal
import sys

import structlog
import uvloop

from fastchat_q.choices import KIND_OF_ENGINE, UNDERSTOOD, WorkerOptions, check_understood
from fastchat_q.errors import ConfigurationError
from fastchat_q.sizes import parse_bytes

from . import forwarders
from .active import Links
from .adapters import Generates
from .engines.base import Engine
from .progress import Progress
from .watch import EngineHungError
from .worker import Limits, Worker

log = structlog.get_logger()

DEFAULT_SLOTS = {
    "transformers": 16,
    "embeddings": 32,
    "rerank": 32,
    "echo": 64,
    "openai": 64,
    "anthropic": 16,
    "gemini": 16,
    "llama-cpp": 4,
}
EXIT_FAILED = 1
EXIT_HUNG = 70
"""The engine's thread hangs: of its own, so that a supervisor of any kind can tell it from a crash."""


def run(options: WorkerOptions, limits: Limits, redis_url: str, worker_id: str | None) -> None:
    """Runs a worker to its end. Raises ConfigurationError when the model cannot be served.

    Args:
        worker_id: given by a supervisor, which this process is then a child of.
    """
    serve(build_engine(options), limits, redis_url, worker_id)


def serve(engine: Engine, limits: Limits, redis_url: str, worker_id: str | None) -> None:
    """Serves an engine to the end of this process; its last words on stderr say why, if that was not asked for.

    Raises:
        SystemExit: it failed.
    """
    try:
        uvloop.run(_serve(engine, limits, redis_url, worker_id))
    except Exception as error:
        cause = _root_cause(error)
        if not isinstance(cause, EngineHungError):
            log.exception("worker failed")
            print(f"fastchat-q: {_in_words(cause)}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_FAILED) from None
        faulthandler.dump_traceback()  # where it hangs
        print(f"fastchat-q: {cause}", file=sys.stderr, flush=True)
        os._exit(EXIT_HUNG)  # anything else may wait for the thread


def build_engine(options: WorkerOptions) -> Engine:
    """Loads the chosen engine; heavy imports happen here and only here."""
    name = options.served_as
    if options.engine == "vllm":
        return _vllm(options, name)
    slots = options.slots or DEFAULT_SLOTS[options.engine]
    if options.engine == "echo":
        from .engines.echo import EchoEngine

        return EchoEngine(name, slots, options.token_delay_ms / 1000)
    if options.engine in forwarders.KINDS:
        return forwarders.build(options, name, slots)
    progress = Progress()
    progress(0.0, "import")
    try:
        from .engines.batching import engine as transformers_engine
        from .engines.batching import lora
        from .engines.loading import devices
        from .engines.loading import model as loading
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"The {options.engine} engine needs {error.name}, which is not installed: "
            "pip install 'fastchat-q[worker]', or take --engine echo, which needs no model."
        ) from error
    devices.set_threads(options.threads)
    folders = lora.fetch(options.adapters, options.load)
    log.info("loading", model=options.model, device=options.device, dtype=options.dtype)
    if options.engine in KIND_OF_ENGINE:
        from .engines.encoding import engine as encoding

        return encoding.build(options, name, slots, progress)
    loaded = loading.load(options.model, options.device, options.dtype, options.load, progress)
    if isinstance(loaded.adapter, Generates):
        from .engines.adapted import AdaptedEngine

        if options.lora:
            raise ConfigurationError(f"--lora: {options.model!r} is run by Python code of its own, without adapters.")

        engine: Engine = AdaptedEngine(name, slots, loaded, loaded.adapter)
    else:
        asked = options.load.kv_memory
        kv_bytes = parse_bytes(asked, "--kv-memory") if asked is not None else None
        adapters = lora.load(loaded.model, options.model, folders)
        engine = transformers_engine.build(name, slots, loaded, kv_bytes, adapters)
    if engine.card.batching == "generate":
        uncounted = "it goes through generate, where nobody counts keys and values. Leave it out."
        check_understood(options.load, UNDERSTOOD["transformers"] - {"kv_memory"}, repr(options.model), uncounted)
    return engine


def _vllm(options: WorkerOptions, name: str) -> Engine:
    try:
        from .engines.vllm import setup as vllm_setup
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"The vLLM engine needs {error.name}, which is not installed: docs/workers/vllm.md says how."
        ) from error
    return vllm_setup.build(options, name, options.adapters)


async def _serve(engine: Engine, limits: Limits, redis_url: str, worker_id: str | None) -> None:
    links = Links.to(redis_url, len(engine.cards))
    worker = Worker(links, engine, limits, worker_id, supervisor=os.getppid() if worker_id else 0)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    try:
        await worker.run()
    finally:
        await links.aclose()


def _root_cause(error: BaseException) -> BaseException:
    """The first error inside of groups, and what an engine died of."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _in_words(error: BaseException) -> str:
    cause = f": {type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ is not None else ""
    return " ".join(f"{type(error).__name__}: {error}{cause}".split())
