"""How the answer of each form looks, whole and streamed: from a job's view and events alone, whenever they are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import End, Event

from . import counts, render, text_completion, vectors
from .render import View, Writer


@dataclass(frozen=True, slots=True)
class _Functions:
    whole: Callable[[View, Sequence[Event], End], dict[str, Any]]
    writer: Callable[[View, int | None], Writer] | None = None


FORMS: Mapping[render.Form, _Functions] = {
    "chat": _Functions(render.completion, render.ChunkWriter),
    "completion": _Functions(text_completion.completion, text_completion.TextWriter),
    "tokens": _Functions(counts.tokens),
    "text": _Functions(counts.text),
    "embeddings": _Functions(vectors.embeddings),
    "rerank": _Functions(vectors.ranking),
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
