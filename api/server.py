"""The API server process: the application under uvicorn, and the loops beside it."""

import asyncio
import logging
import signal
from types import FrameType

import structlog
import uvicorn
import uvloop
from redis.asyncio import Redis

from fastchat_q.addresses import check_exposure, check_port_free, http_base
from fastchat_q.batches import Batches
from fastchat_q.connection import connect
from fastchat_q.credentials import KEY_FILE, load_or_create_api_key, load_or_create_pepper
from fastchat_q.files import Files
from fastchat_q.keystore import KeyStore
from fastchat_q.loops import every
from fastchat_q.queue import REAP_S, RECONCILE_S, Queue
from fastchat_q.registry import HEARTBEAT_S, Registry, process_id
from fastchat_q.sentinel import FOLLOW_S, follow_master
from fastchat_q.settings import Settings
from fastchat_q.storage import Storage

from .app import create_app
from .auth import Authenticator
from .catalog import Catalog
from .durability import Durability
from .limits import Limits
from .protocol import HttpProtocol
from .relay import Relay
from .remote_images import Fetcher
from .service import Service

log = structlog.get_logger()

SETTLE_S = 2.0
"""How long a stopping server goes on telling the queue which clients it has left."""


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; open streams may go on for ``settings.drain_s``.

    Raises:
        ConfigurationError: no authentication on an address that others can reach, the address is taken, or Redis
            evicts keys.
    """
    check_exposure(settings)
    check_port_free(settings.host, settings.port)
    secrets = (_api_key(settings), load_or_create_pepper(settings)) if settings.auth else None
    uvloop.run(_serve(settings, secrets))


def _api_key(settings: Settings) -> str:
    if settings.api_key is not None:
        return settings.api_key.get_secret_value().strip()
    key, created = load_or_create_api_key(settings.state_dir)
    if created:
        log.info("api key created", file=str(settings.state_dir / KEY_FILE))
    return key


def _authenticator(redis: "Redis", secrets: tuple[str, str] | None) -> Authenticator:
    if secrets is None:
        return Authenticator(None, None)
    api_key, pepper = secrets
    return Authenticator(KeyStore(redis, pepper), api_key)


async def _serve(settings: Settings, secrets: tuple[str, str] | None) -> None:
    url, api_id = settings.resolved_redis_url, process_id("api")
    redis, blocking = connect(url), connect(url, blocking=True)
    catalog, registry, queue = Catalog(redis), Registry(redis), Queue(redis)
    relay, limits = Relay(redis, blocking, api_id, settings, catalog.slots), Limits(redis)
    durability, files = Durability(redis), Files(redis, Storage.of(settings))
    fetcher = Fetcher(settings.max_image_bytes) if settings.allow_remote_images else None
    authenticator = _authenticator(redis, secrets)
    service = Service(
        settings,
        authenticator,
        catalog,
        limits,
        relay,
        redis,
        queue,
        durability,
        files,
        Batches(redis, files.storage),
        fetcher,
    )

    async def reap() -> None:
        for model in catalog.known():
            await queue.reap(model)

    async def reconcile() -> None:
        for model in catalog.known():
            await queue.reconcile(model)

    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            host=settings.host,
            port=settings.port,
            http=HttpProtocol,
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
        await durability.check_at_start()
        async with asyncio.TaskGroup() as duties:
            loops = [
                duties.create_task(relay.run()),
                duties.create_task(limits.run()),
                duties.create_task(catalog.run()),
                duties.create_task(durability.run()),
                duties.create_task(every(HEARTBEAT_S, lambda: registry.announce_api(api_id), "heartbeat")),
                duties.create_task(every(REAP_S, reap, "reap")),
                duties.create_task(every(RECONCILE_S, reconcile, "reconcile")),
                duties.create_task(every(FOLLOW_S, lambda: follow_master(redis, blocking), "sentinel")),
            ]
            log.info("serving", url=http_base(settings.host, settings.port), api=api_id, auth=settings.auth)
            await server.serve()
            await relay.settled(SETTLE_S)
            await limits.settled(SETTLE_S)
            for task in loops:
                task.cancel()
    finally:
        await redis.aclose()
        await blocking.aclose()


def _nothing(number: int, frame: FrameType | None) -> None:
    pass
