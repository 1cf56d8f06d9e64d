"""``POST /v1/chat/completions``: parse, ask, render, nothing else."""

import hashlib
import time

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from fastchat_q.errors import FastchatQError, InvalidRequestError
from fastchat_q.events import End
from fastchat_q.jobs import Job
from fastchat_q.keys import public_job_id
from fastchat_q.loops import PreemptedError, unless
from fastchat_q.queue import KEEP_S, Terms
from fastchat_q.tenants import Caller

from . import render
from .admission import admit, resolve
from .auth import caller_of
from .limits import NOTHING, Reservation
from .problems import error_response
from .schemas import ChatRequest
from .service import Service, service_of
from .streaming import JobStreamResponse, disconnected, raise_if_failed, sse

router = APIRouter(tags=["chat"])

CLIENT_CLOSED_REQUEST = 499
MAX_IDEMPOTENCY_KEY = 255
MODEL_HEADER = "x-fastchat-q-model"
"""The model that the answer is of; the body names what was asked for, which may be an alias."""


@router.post(
    "/v1/chat/completions",
    summary="Create a chat completion",
    responses={200: {"description": "A chat.completion object, or server-sent events if `stream` is true."}},
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Queues the request as a job and answers with what a worker makes of it."""
    service = service_of(request)
    job, caller = body.to_job(), caller_of(request)
    idempotency = _idempotency(body, request)
    key_digest = idempotency[0] if idempotency else ""
    model = await resolve(service.catalog, service.queue, caller.tenant, body.model, job.id, key_digest)
    job = job.model_copy(update={"model": model})
    known = idempotency is not None and await service.queue.is_known(job.model, caller.tenant, idempotency[0])
    if not known:  # an answer that is there needs no worker
        await admit(service.catalog, caller, job.model, job.lane, asked=body.model)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    view = render.View(job.id, body.model, int(time.time()), job.lane, include_usage)
    terms = _terms(service, caller, body, job, view, idempotency)
    reservation = Reservation(caller) if known else await service.limits.reserve(caller, job)
    try:
        stream = await service.relay.submit(job, terms)
    except BaseException:
        service.limits.settle(reservation, NOTHING)
        raise
    if stream.view:  # the idempotency key found an earlier job
        view = render.View.from_json(stream.view)
    headers = {MODEL_HEADER: job.model, "x-job-id": public_job_id(job.model, stream.job_id), **reservation.headers}

    def leave() -> None:
        service.relay.leave(stream, grace_s)
        service.limits.settle(reservation, NOTHING if stream.view else stream.usage)  # an earlier job has paid

    grace_s = service.settings.disconnect_grace_s if body.stream or terms.idempotency else 0.0
    handed_over = False
    try:
        if not body.stream:
            events, end = await unless(disconnected(request), stream.collect())
            raise_if_failed(end)
            return Response(render.to_json(render.completion(view, events, end)), 200, headers, "application/json")
        first = await unless(disconnected(request), stream.take(service.settings.queue_comment_after_s))
        if first and isinstance(first[-1], End):
            raise_if_failed(first[-1])  # still a status of its own: no byte is out
        chunks = sse(stream, first, render.ChunkWriter(view))
        response = JobStreamResponse(stream, leave, chunks, headers, service.settings.drain_s)
        handed_over = True
        return response
    except PreemptedError:  # the client is gone: nobody is left to answer
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except FastchatQError as error:
        return error_response(error, headers)
    finally:
        if not handed_over:
            leave()


def _terms(
    service: Service,
    caller: Caller,
    body: ChatRequest,
    job: Job,
    view: render.View,
    idempotency: tuple[str, str] | None,
) -> Terms:
    settings = service.settings
    detached = body.on_disconnect == "continue"
    return Terms(
        tenant=caller.tenant,
        weight=caller.weight,
        max_queued=caller.max_queued or 0,
        max_parallel=caller.max_parallel or 0,
        max_waiting=settings.max_waiting,
        queue_deadline_s=settings.queue_deadline_s,
        deadline_s=settings.deadline_s,
        keep_s=settings.result_ttl_s if detached or idempotency else KEEP_S,
        detached=detached,
        view=view.to_json(),
        idempotency=idempotency,
        slots=service.catalog.slots(job.model),
    )


def _idempotency(body: ChatRequest, request: Request) -> tuple[str, str] | None:
    """Digests of the client's key and of what the request asks for, in whatever order its fields came."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= MAX_IDEMPOTENCY_KEY:
        raise InvalidRequestError(
            f"The header Idempotency-Key has {len(key)} characters; it needs 1 to {MAX_IDEMPOTENCY_KEY}.",
            code="invalid_idempotency_key",
        )
    canonical = orjson.dumps(body.model_dump(mode="json", exclude_unset=True), option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(key.encode()).hexdigest(), hashlib.sha256(canonical).hexdigest()
