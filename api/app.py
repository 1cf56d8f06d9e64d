"""The ASGI application: routes, error handlers, the guard around them."""

from functools import cache, partial

from fastapi import FastAPI

from fastchat_q import __version__

from . import (
    batches,
    chat,
    completions,
    embeddings,
    files,
    jobs,
    models,
    openapi,
    problems,
    rerank,
    responses,
    tokenize,
)
from .anthropic import routes as anthropic
from .anthropic import tokens as anthropic_tokens
from .cors import Cors
from .guard import Guard
from .service import Service

SUMMARY = "OpenAI-compatible API in front of a durable job queue"


def create_app(service: Service) -> FastAPI:
    """An application around a service; it owns no connection and starts no task."""
    app = FastAPI(title="fastchat-q", version=__version__, summary=SUMMARY, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    for router in (
        chat.router,
        completions.router,
        embeddings.router,
        rerank.router,
        responses.router,
        anthropic.router,
        anthropic_tokens.router,
        files.router,
        batches.router,
        jobs.router,
        models.router,
        tokenize.router,
    ):  # include_router would match every request twice: 15 % of its cost
        app.router.routes.extend(router.routes)
    app.openapi = cache(partial(openapi.document, app, SUMMARY, keys=service.authenticator.on))  # type: ignore[method-assign]
    problems.install(app)
    settings = service.settings
    app.add_middleware(
        Guard,
        authenticator=service.authenticator,
        max_body_bytes=settings.max_body_bytes,
        max_image_body_bytes=settings.max_image_body_bytes,
        body_timeout_s=settings.body_timeout_s,
    )
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)  # outside of the guard: a preflight has no key
    return app
