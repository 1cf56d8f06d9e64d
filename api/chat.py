"""``POST /v1/chat/completions``: parse, ask, render, nothing else."""

import asyncio
from collections.abc import AsyncIterator

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from fastchat_q.events import End, Event
from fastchat_q.keys import public_job_id
from fastchat_q.loops import PreemptedError, unless

from . import render
from .admission import admit
from .relay import JobStream, Relay
from .schemas import ChatRequest
from .service import service_of

log = structlog.get_logger()
router = APIRouter(tags=["chat"])

COMMENT_S = 5.0
"""A waiting stream gets a comment when its place changes, and this often in any case."""
PING_S = 15
CLIENT_CLOSED_REQUEST = 499


@router.post(
    "/v1/chat/completions",
    summary="Create a chat completion",
    responses={200: {"description": "A chat.completion object, or server-sent events if `stream` is true."}},
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Queues the request as a job and answers with what a worker makes of it."""
    service = service_of(request)
    await admit(service.catalog, body.model)
    job = body.to_job()
    stream = await service.relay.submit(job)
    headers = {"x-job-id": public_job_id(job.model, job.id)}
    handed_over = False
    try:
        if not body.stream:
            events, end = await unless(_disconnected(request), stream.collect())
            raise_if_failed(end)
            return Response(render.to_json(render.completion(job, events, end)), 200, headers, "application/json")
        first = await unless(_disconnected(request), stream.take(service.settings.queue_comment_after_s))
        if first and isinstance(first[-1], End):
            raise_if_failed(first[-1])  # still a status of its own: no byte is out
        writer = render.ChunkWriter(job, bool(body.stream_options and body.stream_options.include_usage))
        response = JobStreamResponse(
            service.relay, stream, sse(stream, first, writer), headers, service.settings.drain_s
        )
        handed_over = True
        return response
    except PreemptedError:  # the client is gone: nobody is left to answer
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        if not handed_over:
            service.relay.leave(stream)


class JobStreamResponse(EventSourceResponse):
    """Server-sent events that leave the job's stream however the response ends, even before its first byte."""

    def __init__(
        self, relay: Relay, stream: JobStream, body: AsyncIterator[bytes], headers: dict[str, str], drain_s: float
    ) -> None:
        # Without sse-starlette's send_timeout, which opens a cancel scope for every chunk, a sixth of a token's cost:
        # the relay looks after clients that read nothing, once a second for all of them.
        super().__init__(
            body, headers=headers, sep="\n", ping=PING_S, ping_message_factory=_ping, shutdown_grace_period=drain_s
        )
        self._relay, self._stream = relay, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._stream.reader = asyncio.current_task()
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            if not self._stream.stalled:
                raise
            log.info("client stalled", job=self._stream.job.id, backlog=self._stream.backlog)
        finally:
            self._relay.leave(self._stream)


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


async def sse(stream: JobStream, first: list[Event], writer: render.ChunkWriter) -> AsyncIterator[bytes]:
    """The bytes of a stream, from the events that are there already to the end."""
    events = first
    place: int | None = -1
    quiet_s = 0.0
    while not events:
        if stream.place != place or quiet_s >= COMMENT_S:
            place, quiet_s = stream.place, 0.0
            yield render.queue_comment(place)
        events = await stream.take(1.0)
        quiet_s += 1.0
    failed = isinstance(events[0], End) and events[0].error() is not None
    yield writer.events(events) if failed else writer.role() + writer.events(events)
    while not isinstance(events[-1], End):
        events = await stream.take()
        chunk = writer.events(events)
        if chunk:
            yield chunk


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def raise_if_failed(end: End) -> None:
    """Raises the error that a job ended with."""
    error = end.error()
    if error is not None:
        raise error
