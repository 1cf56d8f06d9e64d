"""``POST /v1/chat/completions``: parse, ask, render, nothing else."""

import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .asking import answer
from .media import Images
from .render import View, completion
from .schemas import ChatRequest
from .service import service_of

router = APIRouter(tags=["chat"])


@router.post(
    "/v1/chat/completions",
    summary="Create a chat completion",
    responses={200: {"description": "A chat.completion object, or server-sent events if `stream` is true."}},
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Queues the request as a job and answers with what a worker makes of it."""
    settings = service_of(request).settings
    images = Images(settings.max_images, settings.max_image_bytes)
    job = body.to_job(images)
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
    )
