"""``/v1/jobs``: look at a job, go on reading it, cancel it. Extensions: OpenAI's API has no such thing for a chat."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response

from fastchat_q.errors import InvalidRequestError, JobNotFoundError
from fastchat_q.events import End
from fastchat_q.keys import parse_public_job_id
from fastchat_q.records import read_record

from . import answers
from .render import View, to_json
from .service import Service, service_of, tenant_of
from .stream import INVALID_EVENT_ID, EventId
from .streaming import JobStreamResponse, raise_if_failed, sse

router = APIRouter(tags=["jobs"])

CANCELLED = "cancelled by request"
LastEventId = Annotated[str | None, Header(description="The id of the last event that came.")]
StartingAfter = Annotated[str | None, Query(description="The same as Last-Event-ID, for clients without it.")]
EVENT_ID = re.compile(r"(\d{1,9})(?:\.(\d{1,9}))?", re.ASCII)
"""No job has more tokens; a greater number would be no id that Redis can look for."""


@router.get("/v1/jobs/{job_id}", summary="Retrieve a job")
async def retrieve_job(job_id: str, request: Request) -> Response:
    """State, place in the queue, estimated wait, and every attempt so far."""
    return _reply(await _job(service_of(request), job_id, tenant_of(request)))


@router.post("/v1/jobs/{job_id}/cancel", summary="Cancel a job")
async def cancel_job(job_id: str, request: Request) -> Response:
    """Ends a waiting or running job at once; one that has ended stays as it is."""
    service, tenant = service_of(request), tenant_of(request)
    if await service.queue.cancel(*_parse(job_id), CANCELLED, tenant=tenant) == "none":
        raise JobNotFoundError(job_id)
    return _reply(await _job(service, job_id, tenant))


@router.get(
    "/v1/jobs/{job_id}/events",
    summary="Stream a job",
    responses={200: {"description": "Server-sent events, as the request that made the job gets them with `stream`."}},
)
async def stream_job(
    job_id: str, request: Request, last_event_id: LastEventId = None, starting_after: StartingAfter = None
) -> Response:
    """Continues behind an event, or starts from the beginning; on any server, as often as wanted, while it is kept.

    An id that cannot be continued behind is refused with 400, code `invalid_event_id`: no event had it, or the job was
    started over.
    """
    service = service_of(request)
    model, name = _parse(job_id)
    after = _event_id(last_event_id if starting_after is None else starting_after)
    whole = isinstance(after, EventId)
    tokens = after.n if isinstance(after, EventId) else after or 0
    stream = await service.relay.follow(model, name, tokens, tenant_of(request), whole=whole)

    def leave() -> None:
        service.relay.leave(stream, service.settings.disconnect_grace_s)

    try:
        view = View.from_json(stream.view)
        writer = answers.writer(view, after)
        first = await stream.take(service.settings.queue_comment_after_s)
        if first and isinstance(first[0], End) and first[0].reason == INVALID_EVENT_ID:
            raise_if_failed(first[0])
    except BaseException:
        leave()
        raise
    chunks = sse(stream, first, writer)
    return JobStreamResponse(stream, leave, chunks, {"x-job-id": job_id}, service.settings.drain_s, answers.ping(view))


async def _job(service: Service, public_id: str, tenant: str | None) -> dict[str, Any]:
    model, name = _parse(public_id)
    record = await read_record(service.redis, model, name, slots=service.catalog.slots(model))
    if record is None or tenant not in (None, record.tenant):
        raise JobNotFoundError(public_id)
    return record.to_dict()


def _reply(job: dict[str, Any]) -> Response:
    return Response(to_json(job), headers={"x-job-id": job["id"]}, media_type="application/json")


def _parse(public_id: str) -> tuple[str, str]:
    parsed = parse_public_job_id(public_id)
    if parsed is None:
        raise JobNotFoundError(public_id)
    return parsed


def _event_id(given: str | None) -> int | EventId | None:
    if given is None:
        return None
    found = EVENT_ID.fullmatch(given)
    if found is None:
        raise InvalidRequestError(
            f"The id of the last event is {given[:80]!r}; event ids are whole numbers of at the most 9 digits, or two "
            "of them with a point between.",
            code=INVALID_EVENT_ID,
        )
    n, m = found.groups()
    return int(n) if m is None else EventId(int(n), int(m))
