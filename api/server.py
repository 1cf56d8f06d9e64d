"""The API server process: the application under uvicorn, and the loops beside it."""

import asyncio
import logging
import signal
from types import FrameType

import structlog
import uvicorn
import uvloop

from fastchat_q.addresses import check_exposure, check_port_free, http_base
from fastchat_q.connection import connect
from fastchat_q.credentials import KEY_FILE, load_or_create_api_key
from fastchat_q.loops import every
from fastchat_q.queue import REAP_S, Queue
from fastchat_q.registry import HEARTBEAT_S, Registry, process_id
from fastchat_q.settings import Settings

from .app import create_app
from .catalog import Catalog
from .relay import Relay
from .service import Service

log = structlog.get_logger()

SETTLE_S = 2.0
"""How long a stopping server goes on telling the queue which clients it has left."""


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; open streams may go on for ``settings.drain_s``.

    Raises:
        ConfigurationError: no authentication on an address that others can reach, or the address is taken.
    """
    check_exposure(settings)
    check_port_free(settings.host, settings.port)
    api_key = _api_key(settings)
    uvloop.run(_serve(settings, api_key))


def _api_key(settings: Settings) -> str | None:
    if not settings.auth:
        return None
    if settings.api_key is not None:
        return settings.api_key.get_secret_value().strip()
    key, created = load_or_create_api_key(settings.state_dir)
    if created:
        log.info("api key created", file=str(settings.state_dir / KEY_FILE))
    return key


async def _serve(settings: Settings, api_key: str | None) -> None:
    url, api_id = settings.resolved_redis_url, process_id("api")
    redis, blocking = connect(url), connect(url, blocking=True)
    catalog, registry, queue = Catalog(redis), Registry(redis), Queue(redis)
    relay = Relay(redis, blocking, api_id, settings)
    service = Service(settings, api_key, catalog, relay)

    async def reap() -> None:
        for model in catalog.known():
            await queue.reap(model)

    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            host=settings.host,
            port=settings.port,
            http="httptools",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            access_log=False,
            log_level=logging.WARNING,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=round(settings.drain_s) + 2,
        )
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _nothing)  # uvicorn raises the signal again when it is done; our loops still have work
    try:
        async with asyncio.TaskGroup() as duties:
            loops = [
                duties.create_task(relay.run()),
                duties.create_task(catalog.run()),
                duties.create_task(every(HEARTBEAT_S, lambda: registry.announce_api(api_id), "heartbeat")),
                duties.create_task(every(REAP_S, reap, "reap")),
            ]
            log.info("serving", url=http_base(settings.host, settings.port), api=api_id, auth=settings.auth)
            await server.serve()
            await relay.settled(SETTLE_S)
            for task in loops:
                task.cancel()
    finally:
        await redis.aclose()
        await blocking.aclose()


def _nothing(number: int, frame: FrameType | None) -> None:
    pass
