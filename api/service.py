"""What the routes of one API process share. Built by ``server``, handed in, never global."""

from dataclasses import dataclass

from fastapi import Request

from fastchat_q.settings import Settings

from .catalog import Catalog
from .relay import Relay


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that a request needs."""

    settings: Settings
    api_key: str | None
    """None: authentication is off."""
    catalog: Catalog
    relay: Relay


def service_of(request: Request) -> Service:
    """The service that the application was created with. No FastAPI dependency: those cost 50 us a request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
