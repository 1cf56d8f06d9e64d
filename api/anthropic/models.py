"""The list of models as Anthropic's client reads it: for requests that name the version of its API."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastchat_q.errors import InvalidRequestError
from fastchat_q.registry import ModelCard

LIMIT = 20
MAX_LIMIT = 1000


def model_info(name: str, created: int, card: ModelCard | None) -> dict[str, Any]:
    """One model; what an alias can do depends on where it leads."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": card.context_length if card is not None else None,
        "max_tokens": card.context_length if card is not None else None,
    }


def page(
    models: Sequence[dict[str, Any]], limit: int | None, after_id: str | None, before_id: str | None
) -> dict[str, Any]:
    """A part of the list: behind the model ``after_id``, or before ``before_id``.

    Raises:
        InvalidRequestError: there is no such model.
    """
    ids = [model["id"] for model in models]
    size = LIMIT if limit is None else limit
    start, end = 0, len(ids)
    for name, given in (("after_id", after_id), ("before_id", before_id)):
        if given is not None and given not in ids:
            raise InvalidRequestError(f"Invalid value for '{name}': there is no model {given!r}.", param=name)
    if after_id is not None:
        start = ids.index(after_id) + 1
    if before_id is not None:
        end = ids.index(before_id)
    backwards = before_id is not None and after_id is None
    shown = list(models[start:end])
    found = shown[-size:] if backwards else shown[:size]
    return {
        "data": found,
        "has_more": len(found) < len(shown),
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
    }
