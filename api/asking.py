"""From a parsed request to its answer: admitted, queued as a job, and rendered. The line that all endpoints share."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from fastchat_q.abilities import check_can_do
from fastchat_q.errors import FastchatQError, InvalidRequestError
from fastchat_q.events import End
from fastchat_q.jobs import Job
from fastchat_q.keys import public_job_id, slug
from fastchat_q.loops import PreemptedError, unless
from fastchat_q.queue import KEEP_S, Terms
from fastchat_q.records import read_record
from fastchat_q.settings import Settings
from fastchat_q.tenants import Caller
from fastchat_q.tokens import read

from . import answers, render
from .admission import admit, resolve
from .asked import Asked, off_the_loop_if_large
from .auth import caller_of
from .limits import NOTHING, Reservation
from .problems import error_response
from .service import Service, service_of
from .stream import JobStream
from .streaming import JobStreamResponse, disconnected, raise_if_failed, sse

CLIENT_CLOSED_REQUEST = 499
MAX_IDEMPOTENCY_KEY = 255
MODEL_HEADER = "x-fastchat-q-model"
"""The model that the answer is of; the body names what was asked for, which may be an alias."""


async def ask(request: Request, body: BaseModel, asked: Callable[[Any, Settings, int], Asked]) -> Response:
    """Answers a body, given what makes of it, the settings and its size in bytes what it asks for."""
    settings = service_of(request).settings
    size = len(await request.body())
    return await answer(request, await off_the_loop_if_large(size, asked, body, settings, size))


async def answer(request: Request, asked: Asked) -> Response:
    """Queues a job and answers with what a worker makes of it."""
    service, caller = service_of(request), caller_of(request)
    job, view, images = asked.job, asked.view, asked.images
    idempotency = _idempotency(asked, request)
    key_digest = idempotency[0] if idempotency else ""
    name = job.model
    model = await resolve(service.catalog, service.queue, caller.tenant, name, job.id, key_digest)
    job, view = job.model_copy(update={"model": model}), replace(view, slug=slug(model), spelt=asked.spelt)
    known = idempotency is not None and await service.queue.is_known(job.model, caller.tenant, idempotency[0])
    if not known:  # an answer that is there needs no worker
        card = await admit(service.catalog, caller, job.model, job.lane, asked=name)
        if card is not None:
            check_can_do(card, job, asked.spelt)
    terms = _terms(service, caller, job, replace(asked, view=view), idempotency)
    reservation = Reservation(caller) if known else await service.limits.reserve(caller, job)
    try:
        if images is not None and service.fetcher is not None and not known:
            job = await images.fetch(job, service.fetcher)
        events = await service.relay.submit(job, terms, images.blobs if images is not None else {})
    except BaseException:
        service.limits.settle(reservation, NOTHING)
        raise
    if events.view:  # the idempotency key found an earlier job
        view = render.View.from_json(events.view)
    headers = {MODEL_HEADER: job.model, "x-job-id": public_job_id(job.model, events.job_id), **reservation.headers}

    def leave() -> None:
        service.relay.leave(events, grace_s)
        service.limits.settle(reservation, NOTHING if events.view else events.usage)  # an earlier job has paid

    grace_s = service.settings.disconnect_grace_s if asked.stream or terms.idempotency else 0.0
    handed_over = False
    try:
        if not asked.stream:
            body = _accepted(service, events, view) if asked.background else _whole(request, events, view)
            return Response(render.to_json(await body), 200, headers, "application/json")
        patience_s = 0.0 if asked.background else service.settings.queue_comment_after_s
        first = await unless(disconnected(request), events.take(patience_s))
        if first and isinstance(first[-1], End):
            raise_if_failed(first[-1], view)  # still a status of its own: no byte is out
        chunks = sse(events, first, answers.writer(view, request.state.request_id))
        response = JobStreamResponse(events, leave, chunks, headers, service.settings.drain_s, answers.ping(view))
        handed_over = True
        return response
    except PreemptedError:  # the client is gone: nobody is left to answer
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except FastchatQError as error:
        return error_response(error, request.scope, headers)
    finally:
        if not handed_over:
            leave()


async def _whole(request: Request, events: JobStream, view: render.View) -> dict[str, Any]:
    """The answer, when it is there."""
    received, end = await unless(disconnected(request), events.collect())
    raise_if_failed(end, view)
    return answers.whole(view, received, end)


async def _accepted(service: Service, events: JobStream, view: render.View) -> dict[str, Any]:
    """How far a job is that goes on by itself: at its beginning, unless an idempotency key found an earlier one."""
    if not events.view:
        return answers.state(view, None, ())
    slots = service.catalog.slots(events.model)
    record = await read_record(service.redis, events.model, events.job_id, slots=slots)
    return answers.state(view, record, await read(service.redis, events.model, events.job_id))


def _terms(
    service: Service,
    caller: Caller,
    job: Job,
    asked: Asked,
    idempotency: tuple[str, str] | None,
) -> Terms:
    settings = service.settings
    return Terms(
        tenant=caller.tenant,
        weight=caller.weight,
        max_queued=caller.max_queued or 0,
        max_parallel=caller.max_parallel or 0,
        max_waiting=settings.max_waiting,
        queue_deadline_s=settings.queue_deadline_s,
        deadline_s=settings.deadline_s,
        keep_s=settings.result_ttl_s if asked.detached or asked.keep or idempotency else KEEP_S,
        keep_images=asked.keep,
        detached=asked.detached,
        view=asked.view.to_json(),
        idempotency=idempotency,
        slots=service.catalog.slots(job.model),
    )


def _idempotency(asked: Asked, request: Request) -> tuple[str, str] | None:
    """Digests of the client's key and of what the request asks for, in whatever order its fields came."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= MAX_IDEMPOTENCY_KEY:
        raise InvalidRequestError(
            f"The header Idempotency-Key has {len(key)} characters; it needs 1 to {MAX_IDEMPOTENCY_KEY}.",
            code="invalid_idempotency_key",
        )
    body = asked.body.model_dump(mode="json", exclude_unset=True)
    canonical = orjson.dumps([asked.view.form, body], option=orjson.OPT_SORT_KEYS)  # one body may do for two endpoints
    return hashlib.sha256(key.encode()).hexdigest(), hashlib.sha256(canonical).hexdigest()
