"""The ASGI application: routes, error handlers, the guard around them."""

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer

from fastchat_q import __version__

from . import chat, models, problems
from .guard import Guard
from .service import Service


def create_app(service: Service) -> FastAPI:
    """An application around a service; it owns no connection and starts no task."""
    app = FastAPI(
        title="fastchat-q",
        version=__version__,
        summary="OpenAI-compatible API in front of a durable job queue",
        docs_url="/docs",
        redoc_url=None,
        # The guard does the checking, before any body is parsed; this only puts it into /openapi.json.
        dependencies=[Security(HTTPBearer(auto_error=False))] if service.api_key else [],
    )
    app.state.service = service
    app.include_router(chat.router, tags=["chat"])
    app.include_router(models.router, tags=["models"])
    problems.install(app)
    app.add_middleware(Guard, api_key=service.api_key, max_body_bytes=service.settings.max_body_bytes)
    return app
