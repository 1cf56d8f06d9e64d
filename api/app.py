"""The ASGI application: routes, error handlers, the guard around them."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from fastchat_q import __version__

from . import chat, completions, embeddings, jobs, models, problems, rerank, tokenize
from .auth import required_scope
from .guard import Guard
from .service import Service

SUMMARY = "OpenAI-compatible API in front of a durable job queue"


def create_app(service: Service) -> FastAPI:
    """An application around a service; it owns no connection and starts no task."""
    app = FastAPI(title="fastchat-q", version=__version__, summary=SUMMARY, redoc_url=None)
    app.state.service = service
    for router in (
        chat.router,
        completions.router,
        embeddings.router,
        rerank.router,
        jobs.router,
        models.router,
        tokenize.router,
    ):  # include_router would match every request twice: 15 % of its cost
        app.router.routes.extend(router.routes)
    problems.install(app)
    settings = service.settings
    app.add_middleware(
        Guard,
        authenticator=service.authenticator,
        max_body_bytes=settings.max_body_bytes,
        max_image_body_bytes=settings.max_image_body_bytes,
    )
    if service.authenticator.on:
        document = _with_bearer_keys(app)
        app.openapi = lambda: document  # type: ignore[method-assign]
    return app


def _with_bearer_keys(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, which says where a key is needed: the guard checks it, not a dependency of each route."""
    document = get_openapi(title=app.title, version=app.version, summary=SUMMARY, routes=app.routes)
    document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        if required_scope(path) is not None:
            for operation in operations.values():
                operation["security"] = [{"bearer": []}]
    return document
