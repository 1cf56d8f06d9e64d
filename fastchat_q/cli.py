"""The command line. Every command imports what it runs when it runs: ``--help`` stays fast and needs no torch."""

import sys
import time
from dataclasses import replace
from typing import Annotated

import typer

from . import __version__, cli_batch, cli_dead, cli_jobs, cli_keys, cli_models, cli_queue, cli_run
from .choices import (
    KIND_OF_ENGINE,
    STALL_S,
    TOKEN_DELAY_MS,
    DemandOptions,
    Device,
    Dtype,
    EncoderOptions,
    EngineName,
    LoadOptions,
    UpstreamOptions,
    WorkerOptions,
    stall_s,
)
from .cli_common import EXIT_USAGE, AsJson, RedisUrl, StateDir, load_settings, parse_duration, with_options
from .errors import ConfigurationError

app = typer.Typer(
    name="fastchat-q",
    help="Serve open LLMs through a durable Redis job queue behind one OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: errors stay one line that can be searched for
)
app.add_typer(cli_batch.app)
app.add_typer(cli_keys.app)
app.add_typer(cli_jobs.app)
app.add_typer(cli_dead.app)
app.add_typer(cli_queue.app)
app.add_typer(cli_models.app)

Host = Annotated[str | None, typer.Option("--host", help="Address to listen on. [default: 127.0.0.1]")]
Port = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="[default: 8000]")]
NoAuth = Annotated[bool, typer.Option("--no-auth", help="Ask for no key; on loopback addresses only.")]
DrainS = Annotated[float | None, typer.Option("--drain-s", min=0, help="Seconds running work may take on SIGTERM.")]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="tiny, a folder, a hub id; of another server its name there. Several: each is loaded when a job comes; "
        "NAME=MODEL names one. [default: tiny]",
    ),
]
ModelList = Annotated[str | None, typer.Option("--models", metavar="A,B,…", help="The same as several --model.")]
OnDemand = Annotated[bool, typer.Option("--on-demand", help="Load the model when a job comes, one model too.")]
KeepAlive = Annotated[
    str, typer.Option("--keep-alive", help="On demand: unload what was not used for so long; -1: never, 0: at once.")
]
MaxLoaded = Annotated[int, typer.Option("--max-loaded", min=1, help="On demand: models in memory at a time.")]
Name = Annotated[str | None, typer.Option("--name", help="The name clients use. [default: the model's]")]
Engine = Annotated[EngineName, typer.Option("--engine", help="echo has no model: it repeats the question.")]
Slots = Annotated[int | None, typer.Option("--slots", min=1, help="Jobs at a time. [default: by engine]")]
OnDevice = Annotated[Device, typer.Option("--device", help="auto: the first accelerator, else the CPU.")]
InDtype = Annotated[Dtype, typer.Option("--dtype", help="auto: the checkpoint's own.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of torch. [default: cores - 1]")]
NoSupervise = Annotated[
    bool, typer.Option("--no-supervise", help="Run the engine in this process; something else starts it again.")
]
WorkerId = Annotated[str | None, typer.Option("--id", hidden=True)]
EngineArg = Annotated[
    list[str] | None, typer.Option("--engine-arg", help="An option of vLLM's own, as key=value; may be repeated.")
]
Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", help="A LoRA adapter of the model, as NAME=FOLDER or NAME=HUB_ID: a model by this name."),
]
TokenDelay = Annotated[float, typer.Option("--token-delay-ms", min=0, help="Pace of the echo engine.")]


def all_models(several: list[str] | None, listed: str | None) -> list[str]:
    """What ``--model`` and ``--models`` name, or the built-in model."""
    return [*(several or ()), *(word.strip() for word in (listed or "").split(",") if word.strip())] or ["tiny"]


def offers(options: WorkerOptions, demand: DemandOptions) -> list[WorkerOptions]:
    """The options of each model that a worker is to serve.

    Raises:
        ConfigurationError: they cannot be told apart, or the duration is none.
    """
    from .models import named

    parse_duration(demand.keep_alive)
    if options.name and demand.more:
        raise ConfigurationError("--name is for one model. Name each of several so: --model NAME=MODEL.")
    found = [
        replace(options, model=model, name=name or options.name)
        for name, model in map(named, (options.model, *demand.more))
    ]
    if options.lora and demand.applies:
        raise ConfigurationError(
            "--lora is for one model that is loaded at once, without --on-demand. Start a worker of its own for it and "
            "its adapters; beside it another one can load the other models on demand."
        )
    names = [name for offer in found for name in (offer.served_as, *offer.adapters)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"Several models are called {', '.join(twice)}. Name each: --model NAME=MODEL.")
    return found


def version(value: bool) -> None:
    """``--version``."""
    if value:
        typer.echo(f"fastchat-q {__version__}")
        raise typer.Exit


@app.callback()
def root(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve open LLMs through a durable Redis job queue behind one OpenAI-compatible API."""


@app.command()
@with_options(load=LoadOptions, upstream=UpstreamOptions, encoder=EncoderOptions)
def up(
    host: Host = None,
    port: Port = None,
    state_dir: StateDir = None,
    redis_url: RedisUrl = None,
    no_auth: NoAuth = False,
    drain_s: DrainS = None,
    model: Models = None,
    models: ModelList = None,
    name: Name = None,
    engine: Engine = "transformers",
    slots: Slots = None,
    device: OnDevice = "auto",
    dtype: InDtype = "auto",
    threads: Threads = None,
    token_delay_ms: TokenDelay = TOKEN_DELAY_MS,
    on_demand: OnDemand = False,
    keep_alive: KeepAlive = "5m",
    max_loaded: MaxLoaded = 1,
    engine_arg: EngineArg = None,
    lora: Lora = None,
    *,
    load: LoadOptions,
    upstream: UpstreamOptions,
    encoder: EncoderOptions,
) -> None:
    """Run everything: embedded Redis, API, one worker, orchestrator."""
    import asyncio

    from .addresses import check_exposure, http_base
    from .up import Up, UpOptions, hold_lock

    settings = load_settings(
        host=host, port=port, state_dir=state_dir, redis_url=redis_url, auth=False if no_auth else None, drain_s=drain_s
    )
    check_exposure(settings)
    first, *more = all_models(model, models)
    own, loras = tuple(engine_arg or ()), tuple(lora or ())
    worker = WorkerOptions(
        first, name, engine, slots, device, dtype, threads, token_delay_ms, load, upstream, own, loras, encoder
    )
    demand = DemandOptions(tuple(more), on_demand, keep_alive, max_loaded)
    offered = offers(worker, demand)  # what is wrong is said here, and not in a log
    arguments = (*worker.arguments(), *demand.arguments(), "--drain-s", str(settings.drain_s))
    lock = hold_lock(settings.state_dir, http_base(settings.host, settings.port))
    with lock:
        names = tuple(name for offer in offered for name in (offer.served_as, *offer.adapters))
        told = UpOptions(names, arguments, KIND_OF_ENGINE.get(engine, "chat"))
        asyncio.run(Up(settings, told).run())


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    state_dir: StateDir = None,
    redis_url: RedisUrl = None,
    no_auth: NoAuth = False,
    drain_s: DrainS = None,
) -> None:
    """Run an API server."""
    from . import logs

    logs.configure()
    settings = load_settings(
        host=host, port=port, state_dir=state_dir, redis_url=redis_url, auth=False if no_auth else None, drain_s=drain_s
    )
    from .api.server import run

    run(settings)


@app.command()
@with_options(load=LoadOptions, upstream=UpstreamOptions, encoder=EncoderOptions)
def worker(
    model: Models = None,
    models: ModelList = None,
    name: Name = None,
    engine: Engine = "transformers",
    slots: Slots = None,
    device: OnDevice = "auto",
    dtype: InDtype = "auto",
    threads: Threads = None,
    token_delay_ms: TokenDelay = TOKEN_DELAY_MS,
    on_demand: OnDemand = False,
    keep_alive: KeepAlive = "5m",
    max_loaded: MaxLoaded = 1,
    engine_arg: EngineArg = None,
    lora: Lora = None,
    state_dir: StateDir = None,
    redis_url: RedisUrl = None,
    drain_s: DrainS = None,
    no_supervise: NoSupervise = False,
    worker_id: WorkerId = None,
    *,
    load: LoadOptions,
    upstream: UpstreamOptions,
    encoder: EncoderOptions,
) -> None:
    """Run a worker: an engine in a process of its own, and a supervisor for it.

    With several models, or --on-demand, it loads each when a job for it comes.
    """
    from . import logs

    logs.configure()
    settings = load_settings(state_dir=state_dir, redis_url=redis_url, drain_s=drain_s)
    url = settings.resolved_redis_url
    first, *more = all_models(model, models)
    own, loras = tuple(engine_arg or ()), tuple(lora or ())
    options = WorkerOptions(
        first, name, engine, slots, device, dtype, threads, token_delay_ms, load, upstream, own, loras, encoder
    )
    demand = DemandOptions(tuple(more), on_demand, keep_alive, max_loaded)
    offered = offers(options, demand)
    if no_supervise:
        if demand.applies:
            raise ConfigurationError("--no-supervise is for one model that is loaded at once, without --on-demand.")
        from .workers import main
        from .workers.worker import Limits

        limits = Limits(
            drain_s=settings.drain_s,
            stall_s=stall_s(engine, settings.stall_s),
            hung_s=settings.stall_s or STALL_S,
            batch_reserve=settings.batch_reserve,
            tenant_headroom=settings.tenant_headroom,
        )
        main.run(offered[0], limits, url, worker_id)
        return
    from .registry import ModelCard
    from .workers import ondemand, parent
    from .workers.engine_process import EngineProcess

    kind = KIND_OF_ENGINE.get(engine, "chat")

    def process(offer: WorkerOptions) -> EngineProcess:
        command = [sys.executable, "-m", "fastchat_q.cli", "worker", "--no-supervise", *offer.arguments()]
        command += ["--drain-s", str(settings.drain_s)]
        return EngineProcess(
            command=lambda run_id: [*command, "--id", run_id],
            environment={"FASTCHAT_Q_REDIS_URL": url},  # not on the command line: it may hold a password
            card=ModelCard(offer.served_as, engine, None, int(time.time()), device, dtype, kind),
            slots=slots or 0,
            drain_s=settings.drain_s,
            stall_s=settings.stall_s or STALL_S,
            load_stall_s=settings.load_stall_s,
        )

    processes = [process(offer) for offer in offered]
    if demand.applies:
        policy = ondemand.Policy(parse_duration(keep_alive), max_loaded)
        ondemand.run(processes, policy, url)
    else:
        parent.run(processes[0], url)


@app.command()
@with_options(load=LoadOptions)
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny, a local folder, or a Hugging Face hub id.")],
    device: OnDevice = "auto",
    dtype: InDtype = "auto",
    slots: Annotated[int, typer.Option("--slots", min=1, help="Jobs at a time.")] = 16,
    context_length: Annotated[
        int | None, typer.Option("--context-length", min=1, help="Tokens per slot. [default: the model's context]")
    ] = None,
    as_json: AsJson = False,
    *,
    load: LoadOptions,
) -> None:
    """Count the memory that a model would take, without loading its weights."""
    from . import cli_plan
    from .cli_common import print_json

    try:
        from .workers.engines.loading.plan import plan as count
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"A plan needs {error.name}, which is not installed: pip install 'fastchat-q[worker]'."
        ) from error
    found = count(model, device, dtype, load, slots, context_length).document()
    print_json(found) if as_json else cli_plan.show(found)


@app.command()
def orchestrator(state_dir: StateDir = None, redis_url: RedisUrl = None) -> None:
    """Run the orchestrator: batches and housekeeping, in short ticks."""
    from . import logs

    logs.configure()
    settings = load_settings(state_dir=state_dir, redis_url=redis_url)
    from .api.orchestrator import run

    run(settings)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def redis(context: typer.Context, state_dir: StateDir = None, redis_url: RedisUrl = None) -> None:
    """Open redis-cli (or a small prompt) on the queue's server; ARGS are a command.

    ``redis acl [--role …]`` is ours: it prints an access rule for each role (redis acl --help). With a further word, as
    in ``redis acl list``, it is Redis's own ACL command.
    """
    from . import cli_acl, prompt

    if cli_acl.is_ours(context.args):
        cli_acl.run(context.args[1:])
    settings = load_settings(state_dir=state_dir, redis_url=redis_url)
    raise typer.Exit(prompt.run(settings.resolved_redis_url, context.args))


app.command("run")(cli_run.run)
app.command("embed")(cli_run.embed)


def main() -> None:
    """The console script: known errors are one line and exit code 2, not a traceback."""
    from pydantic import ValidationError

    try:
        app()
    except ConfigurationError as error:
        print(f"fastchat-q: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            where = ".".join(map(str, detail["loc"])).upper()
            print(f"fastchat-q: FASTCHAT_Q_{where}: {detail['msg']} (given: {detail['input']!r})", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None


if __name__ == "__main__":
    main()
