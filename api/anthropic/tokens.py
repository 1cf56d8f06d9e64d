"""``POST /v1/messages/count_tokens``: how long the prompt of a message is, by the worker that would answer it."""

from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fastchat_q.settings import Settings

from ..asked import Asked, job_with_images
from ..asking import ask
from ..tokenize import asked_count
from .request import CountRequest

router = APIRouter(tags=["anthropic"])


@router.post("/v1/messages/count_tokens", summary="Count the tokens of a message's prompt")
async def count_tokens(body: CountRequest, request: Request) -> Response:
    """Answers `input_tokens`: of the very prompt that the same message would have."""
    return await ask(request, body, asked)


def asked(body: CountRequest, settings: Settings, size: int) -> Asked:
    """What the request asks for.

    Args:
        size: of the request's body, in bytes.

    Raises:
        InvalidRequestError: an image cannot be taken.
        RequestTooLargeError: the body is too large without its images.
    """
    job, images = job_with_images(body, settings, size)
    tools = () if job.tool_choice == "none" else job.tools  # the chat's prompt leaves them out then
    found = asked_count(
        body,
        body.model,
        job.messages,
        tools=tools,
        template_kwargs=job.template_kwargs,
        images=images,
        form="message_tokens",
    )
    return replace(found, spelt=body.spelt())
