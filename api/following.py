"""Goes on with the stream of a job for a client that was cut off: on any server, behind the last event that it has."""

from typing import Annotated

from fastapi import Header, Query

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import End
from fastchat_q.keys import public_job_id

from . import answers
from .render import View
from .service import Service
from .stream import INVALID_EVENT_ID, JobStream
from .streaming import JobStreamResponse, raise_if_failed, sse

LastEventId = Annotated[str | None, Header(description="The id of the last event that came.")]
StartingAfter = Annotated[
    int | None, Query(ge=0, lt=2**31, description="The same as Last-Event-ID, for clients without it.")
]
MAX_EVENT_ID_DIGITS = 9
"""No job has so many tokens; a greater number would be no id that Redis can look for."""


def event_id(header: str | None) -> int | None:
    """The number in a Last-Event-ID.

    Raises:
        InvalidRequestError: it is none.
    """
    if header is None:
        return None
    if not header.isdecimal() or len(header) > MAX_EVENT_ID_DIGITS:
        raise InvalidRequestError(
            f"The header Last-Event-ID is {header[:80]!r}; event ids are whole numbers of at the most "
            f"{MAX_EVENT_ID_DIGITS} digits.",
            code=INVALID_EVENT_ID,
        )
    return int(header)


async def follow(service: Service, model: str, job_id: str, tenant: str | None, after: int | None) -> JobStreamResponse:
    """The events of a job behind the one with the id ``after``; None: all of them.

    Raises:
        JobNotFoundError: there is no such job, or it is somebody else's.
        InvalidRequestError: there is no going on behind this event.
    """
    stream = await service.relay.follow(model, job_id, after or 0, tenant)

    def leave() -> None:
        service.relay.leave(stream, service.settings.disconnect_grace_s)

    try:
        view = View.from_json(stream.view)
        if after and answers.begins_anew(view):
            stream = await _from_the_beginning(service, stream, tenant, after)
        writer = answers.writer(view, after)
        first = await stream.take(service.settings.queue_comment_after_s)
        if first and isinstance(first[0], End) and first[0].reason == INVALID_EVENT_ID:
            raise_if_failed(first[0])
    except BaseException:
        leave()
        raise
    chunks = sse(stream, first, writer)
    headers = {"x-job-id": public_job_id(model, job_id)}
    return JobStreamResponse(stream, leave, chunks, headers, service.settings.drain_s)


async def _from_the_beginning(service: Service, stream: JobStream, tenant: str | None, had: int) -> JobStream:
    """The same job for a writer that needs the whole log."""
    whole = await service.relay.follow(stream.model, stream.job_id, 0, tenant, had=had)
    service.relay.leave(stream, service.settings.disconnect_grace_s)  # the job is read on: nothing comes of it
    return whole
