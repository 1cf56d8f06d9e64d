"""Goes on with the stream of a job for a client that was cut off: on any server, behind the last event that it has."""

import re
from typing import Annotated

from fastapi import Header, Query

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import End
from fastchat_q.keys import public_job_id

from . import answers
from .render import View
from .service import Service
from .stream import INVALID_EVENT_ID, EventId, JobStream
from .streaming import JobStreamResponse, raise_if_failed, sse

LastEventId = Annotated[str | None, Header(description="The id of the last event that came.")]
StartingAfter = Annotated[str | None, Query(description="The same as Last-Event-ID, for clients without it.")]
EVENT_ID = re.compile(r"(\d{1,9})(?:\.(\d{1,9}))?", re.ASCII)
"""No job has more tokens; a greater number would be no id that Redis can look for."""


def event_id(given: str | None, param: str | None = None) -> int | EventId | None:
    """What an id of an event says; ``param`` names it in errors.

    Raises:
        InvalidRequestError: it is none.
    """
    if given is None:
        return None
    found = EVENT_ID.fullmatch(given)
    if found is None:
        raise InvalidRequestError(
            f"The id of the last event is {given[:80]!r}; event ids are whole numbers of at the most 9 digits, or two "
            "of them with a point between.",
            param=param,
            code=INVALID_EVENT_ID,
        )
    return int(found[1]) if found[2] is None else EventId(int(found[1]), int(found[2]))


async def follow(
    service: Service, request_id: str, model: str, job_id: str, tenant: str | None, after: int | EventId | None
) -> JobStreamResponse:
    """The events of a job behind the one with the id ``after``; None: all of them.

    Raises:
        JobNotFoundError: there is no such job, or it is somebody else's.
        InvalidRequestError: there is no going on behind this event.
    """
    has = after.n if isinstance(after, EventId) else after or 0
    stream = await service.relay.follow(model, job_id, has, tenant, whole=isinstance(after, EventId))

    def leave() -> None:
        service.relay.leave(stream, service.settings.disconnect_grace_s)

    try:
        view = View.from_json(stream.view)
        if stream.start and answers.reads_all(view):
            stream = await _from_the_beginning(service, stream, tenant)
        writer = answers.writer(view, request_id, after)
        first = await stream.take(service.settings.queue_comment_after_s)
        if first and isinstance(first[0], End) and first[0].reason == INVALID_EVENT_ID:
            raise_if_failed(first[0], view)
    except BaseException:
        leave()
        raise
    chunks = sse(stream, first, writer)
    headers = {"x-job-id": public_job_id(model, job_id)}
    return JobStreamResponse(stream, leave, chunks, headers, service.settings.drain_s, answers.ping(view))


async def _from_the_beginning(service: Service, stream: JobStream, tenant: str | None) -> JobStream:
    """The same job for a writer that needs the whole log."""
    whole = await service.relay.follow(stream.model, stream.job_id, stream.start, tenant, whole=True, in_events=True)
    service.relay.leave(stream, service.settings.disconnect_grace_s)  # the job is read on: nothing comes of it
    return whole
