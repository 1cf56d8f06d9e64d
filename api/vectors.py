"""What embeddings and rankings share: many inputs, one vector for each, and no completion."""

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from fastchat_q.errors import InvalidRequestError, JobFailedError
from fastchat_q.events import Delta, End, Event
from fastchat_q.settings import Settings

from .render import View


def check_count(count: int, param: str, settings: Settings) -> None:
    """Refuses more inputs than the server takes.

    Raises:
        InvalidRequestError: it names the limit.
    """
    if count > settings.max_inputs:
        raise InvalidRequestError(
            f"Invalid value for '{param}': it has {count} entries, the limit is {settings.max_inputs}. Send them in "
            "several requests.",
            param=param,
            code="too_many_inputs",
        )


def vectors(count: int, events: Sequence[Event]) -> list[str]:
    """The vector of each input, as base64 of little-endian float32.

    Raises:
        JobFailedError: one is missing.
    """
    found = {
        piece.choice: piece.vector
        for event in events
        if isinstance(event, Delta)
        for piece in event.pieces
        if piece.vector
    }
    missing = [index for index in range(count) if index not in found]
    if missing:
        raise JobFailedError(f"The worker answered without a vector for input {missing[0]}.", code="no_vector")
    return [found[index] for index in range(count)]


def floats(vector: str) -> list[float]:
    """The numbers of a vector."""
    numbers = array("f", base64.b64decode(vector))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def prompt_usage(end: End) -> dict[str, int]:
    """The ``usage`` object of a job that completes nothing."""
    tokens = end.result.usage.prompt_tokens if end.result and end.result.usage else 0
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def embeddings(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """OpenAI's list of embeddings; ``extra`` says whether they go out as ``base64``."""
    data = [
        {"object": "embedding", "index": index, "embedding": vector if view.extra.get("base64") else floats(vector)}
        for index, vector in enumerate(vectors(view.n, events))
    ]
    return {"object": "list", "data": data, "model": view.model, "usage": prompt_usage(end)}


def ranking(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """Documents by their scores; ``extra`` has ``top_n``, and ``documents`` where they are to be in the answer."""
    scores = [floats(vector)[0] for vector in vectors(view.n, events)]
    order = sorted(range(view.n), key=lambda index: -scores[index])[: view.extra.get("top_n") or None]
    documents = view.extra.get("documents")
    results = [
        {"index": index, "relevance_score": scores[index]}
        | ({"document": {"text": documents[index]}} if documents else {})
        for index in order
    ]
    return {"id": f"rerank-{view.job_id}", "model": view.model, "results": results, "usage": prompt_usage(end)}
