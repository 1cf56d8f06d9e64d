"""``/v1/jobs``: look at a job, go on reading it, cancel it. Extensions: OpenAI's API has no such thing for a chat."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fastchat_q.errors import JobNotFoundError
from fastchat_q.keys import parse_public_job_id
from fastchat_q.records import read_record

from .following import LastEventId, StartingAfter, event_id, follow
from .render import to_json
from .service import Service, service_of, tenant_of

router = APIRouter(tags=["jobs"])

CANCELLED = "cancelled by request"


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
    after = event_id(last_event_id if starting_after is None else starting_after)
    return await follow(service_of(request), request.state.request_id, *_parse(job_id), tenant_of(request), after)


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
