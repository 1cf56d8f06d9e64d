"""A job's events as a response of server-sent events, and what becomes of the job when the client goes."""

import asyncio
from collections.abc import AsyncIterator, Callable

import structlog
from fastapi import Request
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from fastchat_q.events import End, Event

from .render import Opening, View, Writer, queue_comment
from .stream import JobStream

log = structlog.get_logger()

COMMENT_S = 5.0
"""A waiting stream gets a comment when its place changes, and this often in any case."""
PING_S = 15
PING = b": ping\n"
"""Without an empty line behind it: OpenAI's clients take one for the end of an event once they have seen an id, and
fail on its missing data."""


class JobStreamResponse(EventSourceResponse):
    """Server-sent events that leave the job's stream however the response ends, even before its first byte."""

    def __init__(
        self,
        stream: JobStream,
        leave: Callable[[], None],
        body: AsyncIterator[bytes],
        headers: dict[str, str],
        drain_s: float,
        ping: bytes = PING,
    ) -> None:
        # Without sse-starlette's send_timeout, which opens a cancel scope for every chunk, a sixth of a token's cost:
        # the relay looks after clients that read nothing, once a second for all of them.
        super().__init__(
            body,
            headers=headers,
            sep="\n",
            ping=PING_S,
            ping_message_factory=lambda: ping,  # type: ignore[arg-type, return-value]  # bytes are sent as they are
            shutdown_grace_period=drain_s,
        )
        self._stream, self._leave = stream, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._stream.reader = asyncio.current_task()
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            if not self._stream.stalled:
                raise
            log.info("client stalled", job=self._stream.job_id, backlog=self._stream.backlog)
        finally:
            self._leave()


async def sse(stream: JobStream, first: list[Event], writer: Writer) -> AsyncIterator[bytes]:
    """The bytes of a stream, from the events that are there already to the end."""
    has_ids = isinstance(writer, Opening)
    if isinstance(writer, Opening):
        yield writer.opening()
    events = first
    place: int | None = -1
    quiet_s = 0.0
    while not events:
        if stream.place != place or quiet_s >= COMMENT_S:
            place, quiet_s = stream.place, 0.0
            comment = queue_comment(place, stream.eta_s)
            yield comment[:-1] if has_ids else comment  # behind an id an empty line is an event: see _ping
        events = await stream.take(1.0)
        quiet_s += 1.0
    failed = isinstance(events[0], End) and events[0].error() is not None
    opening = writer.events(events) if failed else writer.role() + writer.events(events)
    if opening:
        yield opening
    while not isinstance(events[-1], End):
        events = await stream.take()
        chunk = writer.events(events)
        if chunk:
            yield chunk


async def disconnected(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def raise_if_failed(end: End, view: View) -> None:
    """Raises the error that a job ended with."""
    error = view.failure(end)
    if error is not None:
        raise error
