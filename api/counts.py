"""What jobs that tokenize or detokenize answer, as vLLM's objects and OpenAI's."""

from collections.abc import Sequence
from typing import Any

import orjson

from fastchat_q.errors import JobFailedError
from fastchat_q.events import Delta, End, Event, Piece

from .render import View


def told(events: Sequence[Event]) -> tuple[Piece, dict[str, Any]]:
    """The one piece of the answer of a job that tokenizes, and what it says beside the ids.

    ``count``, ``max_model_len`` (of the model; may be null), and ``token_strs`` if it was asked for them.

    Raises:
        JobFailedError: there is none.
    """
    piece = _piece(events)
    found: dict[str, Any] = orjson.loads(piece.text)
    return piece, found


def tokens(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The answer of ``POST /tokenize``."""
    piece, found = told(events)
    return {
        "count": found["count"],
        "max_model_len": found["max_model_len"],
        "tokens": piece.ids,
        "token_strs": found.get("token_strs"),
    }


def input_tokens(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The answer of ``POST /v1/responses/input_tokens``, as OpenAI's."""
    return {"object": "response.input_tokens", "input_tokens": told(events)[1]["count"]}


def text(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The answer of ``POST /detokenize``."""
    return {"prompt": _piece(events).text}


def _piece(events: Sequence[Event]) -> Piece:
    for event in events:
        if isinstance(event, Delta):
            return event.pieces[0]
    raise JobFailedError("The worker answered without tokens.", code="no_tokens")
