"""The worker process: loads the engine that was chosen, then serves until SIGTERM or SIGINT."""

import asyncio
import signal
from dataclasses import dataclass

import structlog
import uvloop

from fastchat_q.choices import Device, Dtype, EngineName
from fastchat_q.connection import connect
from fastchat_q.errors import ConfigurationError
from fastchat_q.models import served_name

from .engines.base import Engine
from .worker import Worker

log = structlog.get_logger()

DEFAULT_SLOTS = {"transformers": 16, "echo": 64}


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
    drain_s: float
    redis_url: str


def run(options: WorkerOptions) -> None:
    """Runs a worker to its end. Raises ConfigurationError when the model cannot be served."""
    engine = build_engine(options)
    uvloop.run(_serve(options, engine))


def build_engine(options: WorkerOptions) -> Engine:
    """Loads the chosen engine; heavy imports happen here and only here."""
    slots = options.slots or DEFAULT_SLOTS[options.engine]
    name = options.name or served_name(options.model)
    if options.engine == "echo":
        from .engines.echo import EchoEngine

        return EchoEngine(name, slots, options.token_delay_ms / 1000)
    try:
        from .engines import loading
        from .engines.transformers_engine import TransformersEngine
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"The transformers engine needs {error.name}, which is not installed: pip install 'fastchat-q[worker]', "
            "or take --engine echo, which needs no model."
        ) from error
    loading.set_threads(options.threads)
    log.info("loading", model=options.model, device=options.device, dtype=options.dtype)
    loaded = loading.load(options.model, options.device, options.dtype)
    return TransformersEngine(name, slots, loaded)


async def _serve(options: WorkerOptions, engine: Engine) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    redis, blocking = connect(options.redis_url), connect(options.redis_url, blocking=True)
    try:
        await Worker(redis, blocking, engine, options.drain_s).run(stop)
    finally:
        await redis.aclose()
        await blocking.aclose()
