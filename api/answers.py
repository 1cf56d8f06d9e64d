"""How the answer of each form looks, whole and streamed: from a job's view and events alone, whenever they are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import Delta, End, Event
from fastchat_q.records import JobRecord

from . import counts, render, response_output, text_completion, vectors
from .anthropic import answer as anthropic
from .render import View, Writer
from .stream import INVALID_EVENT_ID, EventId
from .streaming import PING


@dataclass(frozen=True, slots=True)
class _Functions:
    whole: Callable[[View, Sequence[Event], End], dict[str, Any]]
    writer: Callable[[View, Any], Writer] | None = None
    state: Callable[[View, JobRecord | None, Sequence[Delta]], dict[str, Any]] | None = None
    """Of a job that nobody waits for: how far its answer is."""
    ping: bytes = PING
    """What tells a client of a silent stream that its server is there."""
    reads_all: bool = False
    """Its writer is fed from the first entry of the log on, whatever its client has."""
    ids: type[int | EventId] = int
    """Of its events."""


FORMS: Mapping[render.Form, _Functions] = {
    "chat": _Functions(render.completion, render.ChunkWriter),
    "completion": _Functions(text_completion.completion, text_completion.TextWriter, reads_all=True),
    "tokens": _Functions(counts.tokens),
    "text": _Functions(counts.text),
    "embeddings": _Functions(vectors.embeddings),
    "input_tokens": _Functions(counts.input_tokens),
    "message": _Functions(anthropic.message, anthropic.MessageWriter, ping=anthropic.PING, reads_all=True, ids=EventId),
    "message_tokens": _Functions(anthropic.count),
    "rerank": _Functions(vectors.ranking),
    "response": _Functions(response_output.whole, response_output.EventWriter, response_output.state, reads_all=True),
}


def whole(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The body of the answer of a job that succeeded."""
    return FORMS[view.form].whole(view, events, end)


def ping(view: View) -> bytes:
    """What goes out between two events of a stream that is silent."""
    return FORMS[view.form].ping


def writer(view: View, request_id: str, after: int | EventId | None = None) -> Writer:
    """Writes the answer as it comes.

    Args:
        request_id: of the request that reads it, which need not be the one that asked.
        after: the id of the last event that the client has; None: it has none yet.

    Raises:
        InvalidRequestError: an answer of this form comes whole, or its events have other ids.
    """
    form = FORMS[view.form]
    if form.writer is None:
        raise InvalidRequestError(
            f"A job of this form ({view.form}) has no events. Send the request again with its Idempotency-Key."
        )
    if after is not None and not isinstance(after, form.ids):
        raise InvalidRequestError(
            "There is no going on behind this event id: no event of this job can have had it. Read the job from its "
            "beginning, without Last-Event-ID.",
            code=INVALID_EVENT_ID,
        )
    return form.writer(replace(view, extra={**view.extra, "request_id": request_id}), after)


def state(view: View, record: JobRecord | None, deltas: Sequence[Delta]) -> dict[str, Any]:
    """How far an answer is that its client comes back for; without a record: of a job that was accepted just now."""
    tell = FORMS[view.form].state
    if tell is None:
        raise InvalidRequestError(f"A job of this form ({view.form}) has no answer before its end.")
    return tell(view, record, deltas)


def reads_all(view: View) -> bool:
    """Whether the writer of this form needs the log from its beginning, whatever the client has of the events."""
    return FORMS[view.form].reads_all
