"""The orchestrator: an arq worker with short ticks of housekeeping. Nothing is lost and nobody waits while it is away.

arq's default serializer is pickle, with which anybody who can write to Redis owns this process: JSON both ways instead.
"""

import time
from dataclasses import asdict
from typing import Any

import orjson
import structlog
from arq import cron
from arq.connections import ArqRedis
from arq.worker import Worker
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastchat_q import keys, upkeep
from fastchat_q.capabilities import check_orchestrator_redis
from fastchat_q.connection import connect
from fastchat_q.errors import StorageUnavailableError
from fastchat_q.files import Files
from fastchat_q.queue import Queue
from fastchat_q.registry import Registry
from fastchat_q.settings import Settings
from fastchat_q.storage import Storage

log = structlog.get_logger()

TICK_TIMEOUT_S = 30
"""Bound on every tick: arq's own recovery time after a crash is the longest of these, plus 10 s."""
HEALTH_INTERVAL_S = 5
COMPLETION_S = 5
"""On a signal, a tick may end first: arq stops with a traceback when it cancels one that is just being concluded."""
IDLE_CONSUMER_MS = 3600 * 1000


def run(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: arq's queue would be on a server in cluster mode, or the storage cannot be used.
    """
    url = settings.resolved_redis_url
    client, own = connect(url), connect(settings.orchestrator_redis_url or url)
    files = Files(client, Storage.of(settings))

    async def check(ctx: dict[str, Any]) -> None:
        await check_orchestrator_redis(own)

    pool = ArqRedis(
        connection_pool=own.connection_pool,
        job_serializer=orjson.dumps,
        job_deserializer=orjson.loads,
        default_queue_name=keys.ORCHESTRATOR_QUEUE,
    )
    worker = Worker(
        cron_jobs=[
            cron(housekeeping, second={0, 30}, run_at_startup=True, timeout=TICK_TIMEOUT_S, unique=True),
            cron(tidy_files, second={15, 45}, run_at_startup=True, timeout=TICK_TIMEOUT_S, unique=True),
        ],
        queue_name=keys.ORCHESTRATOR_QUEUE,
        redis_pool=pool,
        job_serializer=orjson.dumps,
        job_deserializer=orjson.loads,
        health_check_key=keys.ORCHESTRATOR_HEALTH,
        health_check_interval=HEALTH_INTERVAL_S,
        job_timeout=TICK_TIMEOUT_S,
        job_completion_wait=COMPLETION_S,
        keep_result=0,
        on_startup=check,
        ctx={"client": client, "files": files},
    )
    log.info("orchestrating", queue=keys.ORCHESTRATOR_QUEUE)
    worker.run()


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
