"""``POST /v1/chat/completions``: parse, ask, render, nothing else."""

import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fastchat_q.settings import Settings

from .asked import Asked, job_with_images
from .asking import ask
from .render import View
from .schemas import ChatRequest

router = APIRouter(tags=["chat"])


@router.post(
    "/v1/chat/completions",
    summary="Create a chat completion",
    responses={200: {"description": "A chat.completion object, or server-sent events if `stream` is true."}},
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Queues the request as a job and answers with what a worker makes of it."""
    return await ask(request, body, asked)


def asked(body: ChatRequest, settings: Settings, size: int) -> Asked:
    """What the request asks for.

    Args:
        size: of the request's body, in bytes.

    Raises:
        InvalidRequestError: an image cannot be taken.
        RequestTooLargeError: the body is too large without its images.
    """
    job, images = job_with_images(body, settings, size)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    view = View(job.id, job.model, int(time.time()), job.lane, include_usage, n=job.sampling.n)
    return Asked(
        body,
        job,
        view,
        stream=bool(body.stream),
        detached=body.on_disconnect == "continue",
        spelt=body.spelt(),
        images=images,
    )
