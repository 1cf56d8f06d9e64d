"""``POST /v1/messages``: parse, ask, render, nothing else."""

import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fastchat_q.settings import Settings

from ..asked import Asked, job_with_images
from ..asking import ask
from ..render import View
from .request import MessageRequest

router = APIRouter(tags=["anthropic"])


@router.post(
    "/v1/messages",
    summary="Create a message",
    responses={200: {"description": "A message object of Anthropic's, or server-sent events if `stream` is true."}},
)
async def create_message(body: MessageRequest, request: Request) -> Response:
    """Queues the request as a job and answers with what a worker makes of it, as Anthropic's Messages API does."""
    return await ask(request, body, asked)


def asked(body: MessageRequest, settings: Settings, size: int) -> Asked:
    """What the request asks for.

    Args:
        size: of the request's body, in bytes.

    Raises:
        InvalidRequestError: an image cannot be taken.
        RequestTooLargeError: the body is too large without its images.
    """
    job, images = job_with_images(body, settings, size)
    omit = body.thinking is not None and body.thinking.display == "omitted"
    extra = {"max_tokens": body.max_tokens} | ({"omit_thinking": True} if omit else {})
    view = View(job.id, job.model, int(time.time()), job.lane, form="message", extra=extra)
    return Asked(body, job, view, stream=bool(body.stream), spelt=body.spelt(), images=images)
