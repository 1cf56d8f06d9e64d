"""A parsed request as the line of all endpoints takes it: the job, and how its answer is to look."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel

from fastchat_q.jobs import Job
from fastchat_q.settings import Settings

from .guard import INLINE_BYTES, check_rest
from .media import Images
from .render import View


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request asks for."""

    body: BaseModel
    """As parsed: what an idempotency key stands for."""
    job: Job
    view: View
    stream: bool = False
    """With server-sent events, as they come."""
    detached: bool = False
    """The job is done though its client goes."""
    background: bool = False
    """The answer says that the job was accepted, and does not wait for it."""
    keep: bool = False
    """The answer can be had again for the time that results are kept."""
    spelt: Mapping[str, str] = field(default_factory=dict)
    """Parameters that have another name in the request than in the job."""
    images: Images | None = None
    """Of the job; those that it names by URL are fetched when nothing else can refuse it."""


async def off_the_loop_if_large(size: int, function: Callable[..., Asked], *args: Any) -> Asked:
    """What ``function(*args)`` says a request asks for; the images of a large one are decoded on another thread.

    Other streams must not wait for that.
    """
    if size <= INLINE_BYTES:
        return function(*args)
    return await asyncio.to_thread(function, *args)


class _Body(Protocol):
    def to_job(self, images: Images) -> Job: ...


def job_with_images(body: _Body, settings: Settings, size: int) -> tuple[Job, Images]:
    """The job of a body of ``size`` bytes, and its images.

    Raises:
        InvalidRequestError: an image cannot be taken.
        RequestTooLargeError: the body is too large without its images.
    """
    images = Images.within(settings)
    job = body.to_job(images)
    check_rest(size, images.url_bytes, settings.max_body_bytes)
    return job, images
