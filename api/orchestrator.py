"""The orchestrator: an arq worker with short ticks, which drive batches and keep house.

Nothing is lost while it is away; batches wait for it, and nobody else does.

arq's default serializer is pickle, with which anybody who can write to Redis owns this process: JSON both ways instead.
"""

import asyncio
import os
import time
from dataclasses import asdict
from typing import Any

import orjson
import structlog
import uvloop
from arq import cron, func
from arq.connections import ArqRedis
from arq.worker import Worker
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, ResponseError

from fastchat_q import keys, upkeep
from fastchat_q.batches import Batches
from fastchat_q.capabilities import check_orchestrator_redis
from fastchat_q.connection import connect
from fastchat_q.errors import StorageUnavailableError
from fastchat_q.files import Files
from fastchat_q.queue import Queue
from fastchat_q.registry import Registry
from fastchat_q.settings import Settings
from fastchat_q.storage import Storage

from .batch_tick import Driver
from .catalog import Catalog
from .remote_images import Fetcher

log = structlog.get_logger()

TICK_TIMEOUT_S = 30
ADVANCE_TIMEOUT_S = 900
"""Bounds on ticks. One of a batch ends after some 15 s, but to read a large input, to put its files together, or to
find all batches again, takes as long as the storage needs. After a crash arq keeps its own mark on a tick for so long:
a batch does not wait for it, for its next tick has another name."""
NAMED_S = 15
"""So long the next tick keeps its name. A process that is killed when arq has made its mark, but the tick has not yet
counted itself, holds up the batch no longer."""
POLL_S = 0.1
NICE = 10
"""Where processors are short, API servers, workers and Redis go first: batches feed on what is left."""
MAX_TICKS = 32
"""At a time, in one process."""
HEALTH_INTERVAL_S = 5
COMPLETION_S = 5
"""On a signal, a tick may end first: arq stops with a traceback when it cancels one that is just being concluded."""
ADVANCE = "advance_batch"
IDLE_CONSUMER_MS = 3600 * 1000


def run(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: arq's queue would be on a server in cluster mode, or the storage cannot be used.
    """
    os.nice(NICE)
    redis_url = settings.resolved_redis_url
    client, own = connect(redis_url), connect(settings.orchestrator_redis_url or redis_url)
    asyncio.set_event_loop(uvloop.new_event_loop())
    driver = make_driver(client, settings)

    async def start(ctx: dict[str, Any]) -> None:
        await check_orchestrator_redis(own)
        ctx["catalog"] = asyncio.create_task(driver.catalog.run())

    async def stop(ctx: dict[str, Any]) -> None:
        if (looking := ctx.get("catalog")) is not None:  # else it could not start
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    pool = ArqRedis(
        connection_pool=own.connection_pool,
        job_serializer=orjson.dumps,
        job_deserializer=orjson.loads,
        default_queue_name=keys.ORCHESTRATOR_QUEUE,
    )
    worker = Worker(
        functions=[func(advance_batch, name=ADVANCE, timeout=ADVANCE_TIMEOUT_S)],
        cron_jobs=[
            cron(housekeeping, second={0, 30}, run_at_startup=True, timeout=TICK_TIMEOUT_S, unique=True),
            cron(tidy_files, second={15, 45}, run_at_startup=True, timeout=TICK_TIMEOUT_S, unique=True),
            cron(find_batches, second=set(range(60)), run_at_startup=True, timeout=ADVANCE_TIMEOUT_S, unique=True),
        ],
        max_jobs=MAX_TICKS,
        poll_delay=POLL_S,
        log_results=False,
        queue_name=keys.ORCHESTRATOR_QUEUE,
        redis_pool=pool,
        job_serializer=orjson.dumps,
        job_deserializer=orjson.loads,
        health_check_key=keys.ORCHESTRATOR_HEALTH,
        health_check_interval=HEALTH_INTERVAL_S,
        job_timeout=TICK_TIMEOUT_S,
        job_completion_wait=COMPLETION_S,
        keep_result=0,
        on_startup=start,
        on_shutdown=stop,
        ctx={"client": client, "driver": driver, "files": driver.files},
    )
    log.info("orchestrating", queue=keys.ORCHESTRATOR_QUEUE)
    worker.run()


def make_driver(redis: "Redis", settings: Settings) -> Driver:
    """What drives batches."""
    storage = Storage.of(settings)
    fetcher = Fetcher(settings.max_image_bytes) if settings.allow_remote_images else None
    batches, files = Batches(redis, storage), Files(redis, storage)
    return Driver(redis, Queue(redis), Catalog(redis), batches, files, settings, fetcher)


async def find_batches(ctx: dict[str, Any]) -> None:
    """Has each open batch that nobody drives driven; then brings all back if Redis lost its data.

    While that takes its time, the ticks that begin meanwhile drive what is back.
    """
    batches: Batches = ctx["driver"].batches
    try:
        if not await batches.are_ours():
            return
        for batch_id, tick in await batches.idle(await batches.open_ids()):
            await _next_tick(ctx, batch_id, tick)
        found = await batches.reindex()
    except StorageUnavailableError as error:
        log.warning("batches were not looked for", error=error.message)
        return
    if found:
        log.info("batches are back from the storage", batches=found)


async def advance_batch(ctx: dict[str, Any], batch_id: str) -> None:
    """Drives a batch for a while, and leaves it to the next tick."""
    try:
        if not await ctx["driver"].batches.are_ours():
            return  # to an orchestrator that has its storage
        tick = await ctx["driver"].advance(batch_id)
    except Exception:
        log.exception("tick failed", batch=batch_id)
        return  # found again within a second
    if tick is not None:
        await _next_tick(ctx, batch_id, tick)


async def _next_tick(ctx: dict[str, Any], batch_id: str, tick: int) -> None:
    """Whoever asks for it: there is one of each name, and so hardly more than one that waits."""
    name = f"{batch_id}:{tick}:{int(ctx['driver'].clock() // NAMED_S)}"
    try:
        await ctx["redis"].enqueue_job(ADVANCE, batch_id, _job_id=name)
    except OutOfMemoryError as error:  # asked for again within a second
        log.warning("a tick cannot be asked for", batch=batch_id, error=str(error))


async def housekeeping(ctx: dict[str, Any]) -> dict[str, int]:
    """Removes consumers of workers that are long gone; reaps and reconciles queues that no process looks after."""
    redis: Redis = ctx["client"]
    started = time.monotonic()
    removed = reaped = mended = 0
    models = await Registry(redis).known_models()
    for model in models:
        done = await Queue(redis).reap(model)
        reaped += done.handed_back + done.dead + done.expired
        mended += await Queue(redis).reconcile(model)
        for lane in keys.ALL_LANES:
            removed += await _remove_idle_consumers(redis, keys.model_keys(model).stream(lane))
    took = round(time.monotonic() - started, 3)
    log.info("housekeeping", models=len(models), consumers_removed=removed, reaped=reaped, mended=mended, seconds=took)
    return {"consumers_removed": removed, "reaped": reaped, "mended": mended}


async def tidy_files(ctx: dict[str, Any]) -> dict[str, int]:
    """Deletes files that expired and what dead uploads left; brings back an index that Redis lost."""
    started = time.monotonic()
    try:
        done = asdict(await upkeep.tick(ctx["files"], ctx["client"]))
    except StorageUnavailableError as error:
        log.warning("files were not tidied", error=error.message)
        return {}
    log.info("files tidied", **done, seconds=round(time.monotonic() - started, 3))
    return done


async def _remove_idle_consumers(redis: "Redis", stream: str, idle_ms: int = IDLE_CONSUMER_MS) -> int:
    """Only consumers without pending entries: XGROUP DELCONSUMER silently drops what is pending."""
    try:
        consumers = await redis.xinfo_consumers(stream, keys.GROUP)
    except ResponseError:  # no stream or no group: nobody claimed from it yet
        return 0
    idle = [c["name"] for c in consumers if c["pending"] == 0 and c["idle"] > idle_ms]
    for name in idle:
        await redis.xgroup_delconsumer(stream, keys.GROUP, name)
    return len(idle)
