"""How the answer of each form looks, whole and streamed: from a job's view and events alone, whenever they are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import Delta, End, Event
from fastchat_q.records import JobRecord

from . import render, response_output, vectors
from .render import View, Writer


@dataclass(frozen=True, slots=True)
class _Functions:
    whole: Callable[[View, Sequence[Event], End], dict[str, Any]]
    writer: Callable[[View, int | None], Writer] | None = None
    state: Callable[[View, JobRecord | None, Sequence[Delta]], dict[str, Any]] | None = None
    """Of a job that nobody waits for: how far its answer is. Its writer needs the log from the beginning on."""


FORMS: Mapping[render.Form, _Functions] = {
    "chat": _Functions(render.completion, render.ChunkWriter),
    "embeddings": _Functions(vectors.embeddings),
    "rerank": _Functions(vectors.ranking),
    "response": _Functions(response_output.whole, response_output.EventWriter, response_output.state),
}


def whole(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The body of the answer of a job that succeeded."""
    return FORMS[view.form].whole(view, events, end)


def writer(view: View, after: int | None = None) -> Writer:
    """Writes the answer as it comes.

    Args:
        after: the id of the last event that the client has; None: it has none yet.

    Raises:
        InvalidRequestError: an answer of this form comes whole.
    """
    make = FORMS[view.form].writer
    if make is None:
        raise InvalidRequestError(
            f"A job of this form ({view.form}) has no events. Send the request again with its Idempotency-Key."
        )
    return make(view, after)


def state(view: View, record: JobRecord | None, deltas: Sequence[Delta]) -> dict[str, Any]:
    """How far an answer is that its client comes back for; without a record: of a job that was accepted just now."""
    tell = FORMS[view.form].state
    if tell is None:
        raise InvalidRequestError(f"A job of this form ({view.form}) has no answer before its end.")
    return tell(view, record, deltas)


def begins_anew(view: View) -> bool:
    """Whether the writer of this form needs the log from its beginning, whatever the client has of the events."""
    return FORMS[view.form].state is not None
