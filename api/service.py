"""What the routes of one API process share. Built by ``server``, handed in, never global."""

from dataclasses import dataclass

from fastapi import Request
from redis.asyncio import Redis

from fastchat_q.batches import Batches
from fastchat_q.files import Files
from fastchat_q.queue import Queue
from fastchat_q.settings import Settings

from .auth import Authenticator, caller_of
from .catalog import Catalog
from .durability import Durability
from .limits import Limits
from .relay import Relay
from .remote_images import Fetcher


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that a request needs."""

    settings: Settings
    authenticator: Authenticator
    catalog: Catalog
    limits: Limits
    relay: Relay
    redis: "Redis"
    queue: Queue
    durability: Durability
    files: Files
    batches: Batches
    fetcher: Fetcher | None = None
    """None: images are not fetched."""


def service_of(request: Request) -> Service:
    """The service that the application was created with. No FastAPI dependency: those cost 50 us a request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def tenant_of(request: Request) -> str | None:
    """Whose jobs the caller may see; None: everybody's."""
    caller = caller_of(request)
    return None if "admin" in caller.scopes else caller.tenant
