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
from .service import service_of

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
    images = Images(settings.max_images, settings.max_image_bytes, remote=settings.allow_remote_images)
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
        images=images,
    )
