"""``POST /v1/messages``: parse, ask, render, nothing else."""

import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fastchat_q.settings import Settings

from ..asked import Asked, off_the_loop_if_large
from ..asking import answer
from ..guard import check_rest
from ..media import Images
from ..render import View
from ..service import service_of
from .request import MessageRequest

router = APIRouter(tags=["anthropic"])


@router.post(
    "/v1/messages",
    summary="Create a message",
    responses={200: {"description": "A message object of Anthropic's, or server-sent events if `stream` is true."}},
)
async def create_message(body: MessageRequest, request: Request) -> Response:
    """Queues the request as a job and answers with what a worker makes of it, as Anthropic's Messages API does."""
    settings = service_of(request).settings
    size = len(await request.body())
    return await answer(request, await off_the_loop_if_large(size, asked, body, settings, size))


def asked(body: MessageRequest, settings: Settings, size: int) -> Asked:
    """What the request asks for.

    Args:
        size: of the request's body, in bytes.

    Raises:
        InvalidRequestError: an image cannot be taken.
        RequestTooLargeError: the body is too large without its images.
    """
    images = Images(settings.max_images, settings.max_image_bytes, remote=settings.allow_remote_images)
    job = body.to_job(images)
    check_rest(size, images.url_bytes, settings.max_body_bytes)
    omit = body.thinking is not None and body.thinking.display == "omitted"
    extra = {"max_tokens": body.max_tokens} | ({"omit_thinking": True} if omit else {})
    view = View(job.id, job.model, int(time.time()), job.lane, form="message", extra=extra)
    return Asked(body, job, view, stream=bool(body.stream), spelt=body.spelt(), images=images)
