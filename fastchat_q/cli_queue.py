"""``fastchat-q queue``: the queues in figures; pause, resume and drain one."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import (
    EXIT_FAILED,
    EXIT_USAGE,
    AsJson,
    RedisUrl,
    StateDir,
    duration,
    fail,
    load_settings,
    print_json,
    print_table,
    say,
    with_redis,
)
from .cli_jobs import OneModel, models

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .operations import Mode
    from .overview import QueueStatus
    from .settings import Settings

COLUMNS = (
    *("model", "mode", "hi", "lo", "sus", "delayed", "parked", "running", "slots", "workers"),
    *("oldest", "service", "eta", "succeeded", "failed", "cancelled", "expired", "dead"),
)
POLL_S = 0.5
"""How often a drain that waits looks at the queue."""

ThisModel = Annotated[str, typer.Argument(metavar="MODEL", help="Its name or slug.")]

app = typer.Typer(
    name="queue", help="Look at queues; pause, resume, drain.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("ls")
def list_queues(
    model: OneModel = None, as_json: AsJson = False, redis_url: RedisUrl = None, state_dir: StateDir = None
) -> None:
    """Each queue in figures: who waits, who runs, who serves, how long it takes, how jobs ended."""

    async def read(redis: "Redis") -> "list[QueueStatus]":
        from .overview import queue_statuses

        return await queue_statuses(redis, await models(redis, model))

    queues = with_redis(load_settings(redis_url=redis_url, state_dir=state_dir), read)
    if as_json:
        print_json({"object": "list", "data": [queue.to_dict() for queue in queues]})
        return
    print_table(COLUMNS, [_row(queue) for queue in queues])
    if not queues:
        say("No model was served within the last 24 hours. Start one: fastchat-q worker --model tiny")


@app.command()
def pause(model: ThisModel, as_json: AsJson = False, redis_url: RedisUrl = None, state_dir: StateDir = None) -> None:
    """Workers begin nothing; requests are accepted and wait; what runs goes on."""
    _set(load_settings(redis_url=redis_url, state_dir=state_dir), model, "paused", as_json)


@app.command()
def resume(model: ThisModel, as_json: AsJson = False, redis_url: RedisUrl = None, state_dir: StateDir = None) -> None:
    """Lift pause and drain; workers look within a second."""
    _set(load_settings(redis_url=redis_url, state_dir=state_dir), model, None, as_json)


@app.command()
def drain(
    model: ThisModel,
    wait: Annotated[bool, typer.Option("--wait", help="Until no job is left.")] = False,
    timeout_s: Annotated[float | None, typer.Option("--timeout-s", min=0, help="Wait no longer than that.")] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """New requests are refused (503 queue_draining); workers finish what is there."""
    settings = load_settings(redis_url=redis_url, state_dir=state_dir)
    if timeout_s is not None and not wait:
        fail("--timeout-s is about --wait.", EXIT_USAGE)
    if not wait:
        _set(settings, model, "draining", as_json)
        return
    before, status = with_redis(settings, lambda redis: _drained(redis, model, timeout_s))
    _say_mode(status.model, before, status, as_json)
    if status.live:
        fail(
            f"{status.live} jobs are left after {timeout_s:g} s; {status.model} goes on draining. "
            f"See them: fastchat-q jobs ls --model {status.model}",
            EXIT_FAILED,
        )


def _set(settings: "Settings", model: str, mode: "Mode | None", as_json: bool) -> None:
    async def change(redis: "Redis") -> "tuple[str | None, QueueStatus]":
        from . import operations
        from .overview import queue_status

        [name] = await models(redis, model)
        if mode is not None:
            before = await operations.set_mode(redis, name, mode)
        else:
            before = await operations.resume(redis, name)
        return before, await queue_status(redis, name)

    before, status = with_redis(settings, change)
    _say_mode(status.model, before, status, as_json)


async def _drained(redis: "Redis", model: str, timeout_s: float | None) -> "tuple[str | None, QueueStatus]":
    import asyncio

    from . import operations
    from .loops import check_cancelled
    from .overview import queue_status

    [name] = await models(redis, model)
    before = await operations.set_mode(redis, name, "draining")
    loop = asyncio.get_running_loop()
    until = None if timeout_s is None else loop.time() + timeout_s
    said = ""
    while (status := await queue_status(redis, name)).live and (until is None or loop.time() < until):
        check_cancelled()
        waiting = status.live - status.running
        line = f"{waiting} wait, {status.running} run, eta {duration(status.eta_s) or 'unknown'}"
        if not status.workers:
            line += "; nobody serves it: start a worker, or cancel what is left"
        if line != said:
            say(f"{name}: {line}")
            said = line
        await asyncio.sleep(POLL_S)
    return before, status


def _say_mode(model: str, before: str | None, status: "QueueStatus", as_json: bool) -> None:
    was = before or "open"
    if as_json:
        print_json({**status.to_dict(), "mode_before": was})
        return
    waiting = status.live - status.running
    print(f"{model} is {status.mode} (was {was}): {waiting} wait, {status.running} run, {status.workers} workers")


def _row(queue: "QueueStatus") -> tuple[Any, ...]:
    service_s = None if queue.service_ms is None else queue.service_ms / 1000
    lanes = (queue.waiting["hi"], queue.waiting["lo"], queue.waiting["sus"])
    work = (queue.delayed, queue.parked, queue.running, queue.slots, queue.workers)
    times = (duration(queue.oldest_wait_s), duration(service_s), duration(queue.eta_s))
    ended = (queue.ended[state] for state in ("succeeded", "failed", "cancelled", "expired", "dead"))
    return (queue.model, queue.mode, *lanes, *work, *times, *ended)
