"""``POST /v1/chat/completions``: parse, ask, render, nothing else."""

import asyncio
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .asking import answer
from .guard import check_rest
from .media import Images
from .render import View, completion
from .schemas import ChatRequest
from .service import Service, service_of

INLINE_BYTES = 256 * 1024
"""The images of a larger request are decoded on another thread: other streams must not wait for that."""

router = APIRouter(tags=["chat"])


@router.post(
    "/v1/chat/completions",
    summary="Create a chat completion",
    responses={200: {"description": "A chat.completion object, or server-sent events if `stream` is true."}},
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Queues the request as a job and answers with what a worker makes of it."""
    settings = service_of(request).settings
    size = len(await request.body())
    images = await _images(body, service_of(request))
    job = body.to_job(images) if size <= INLINE_BYTES else await asyncio.to_thread(body.to_job, images)
    check_rest(size, images.url_bytes, settings.max_body_bytes)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    view = View(job.id, job.model, int(time.time()), job.lane, include_usage, n=job.sampling.n)
    return await answer(
        request,
        body,
        job,
        view,
        completion,
        stream=bool(body.stream),
        detached=body.on_disconnect == "continue",
        spelt=body.spelt(),
        images=images.blobs,
    )


async def _images(body: ChatRequest, service: Service) -> Images:
    """What takes the images of a request in, those fetched already that it names by URL."""
    settings, fetcher = service.settings, service.fetcher
    images = Images(settings.max_images, settings.max_image_bytes, remote=fetcher is not None)
    if fetcher is not None and (named := body.remote_images()):
        images.fetched = await fetcher.fetch_all(named[: settings.max_images])
    return images
