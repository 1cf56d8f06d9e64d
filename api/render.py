"""Events become OpenAI's bytes. The frame of a stream's chunks is encoded once; a token costs one string encoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import orjson

from fastchat_q.events import Delta, End, Event, Result
from fastchat_q.jobs import Lane
from fastchat_q.versions import known_fields

SERVICE_TIERS: dict[Lane, str] = {"hi": "default", "lo": "flex"}
ENDING_IDS = 3
"""Ids behind that of the last token: finish reason, usage, [DONE]."""


def to_json(body: dict[str, Any]) -> bytes:
    """The bytes of a JSON answer."""
    return orjson.dumps(body)


@dataclass(frozen=True, slots=True)
class View:
    """What the bytes of a job's answer need beside its events. Kept in the job record, for those who read it later."""

    job_id: str
    model: str
    created: int
    """Unix seconds."""
    lane: Lane
    include_usage: bool = False

    def to_json(self) -> str:
        """JSON for the job record."""
        return orjson.dumps(self).decode()

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """The inverse of `to_json`."""
        return cls(**known_fields(cls, orjson.loads(raw)))

    @property
    def completion_id(self) -> str:
        """The ``id`` of the completion, and of each of its chunks."""
        return f"chatcmpl-{self.job_id}"


def completion(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The ``chat.completion`` object of a job that succeeded."""
    text = "".join(piece.text for event in events if isinstance(event, Delta) for piece in event.pieces)
    result = end.result
    return {
        "id": view.completion_id,
        "object": "chat.completion",
        "created": view.created,
        "model": view.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": result.finish_reason if result else "stop",
            }
        ],
        "usage": usage(result),
        "service_tier": SERVICE_TIERS[view.lane],
        "system_fingerprint": None,
    }


def usage(result: Result | None) -> dict[str, int] | None:
    """The ``usage`` object of a job that has ended."""
    return result.usage.to_dict() if result and result.usage else None


class ChunkWriter:
    """Writes one stream's server-sent events.

    Each carries ``id: <n>``, n tokens so far, with which a client that was cut off goes on. What follows the last of N
    tokens has the ids N + 1 (finish reason), N + 2 (usage) and N + 3 ([DONE]). An error has none: who comes back after
    it goes on behind its last token, though the job was given another life meanwhile.

    Args:
        after: the id of the last event that the client has; None: it has none yet.
    """

    def __init__(self, view: View, after: int | None = None) -> None:
        self._head = orjson.dumps(
            {
                "id": view.completion_id,
                "object": "chat.completion.chunk",
                "created": view.created,
                "model": view.model,
                "service_tier": SERVICE_TIERS[view.lane],
                "system_fingerprint": None,
            }
        )[:-1]
        self._after = after
        self._usage_field = b',"usage":null' if view.include_usage else b""
        self._include_usage = view.include_usage
        self._content_open = b"\ndata: " + self._head + b',"choices":[{"index":0,"delta":{"content":'
        self._content_close = b'},"logprobs":null,"finish_reason":null}]' + self._usage_field + b"}\n\n"

    def role(self) -> bytes:
        """The first chunk; nothing for a client that has it."""
        if self._after is not None:
            return b""
        return _event(0, self._chunk({"role": "assistant", "content": "", "refusal": None}, None))

    def events(self, events: Sequence[Event]) -> bytes:
        """The chunks of some events: text that came together goes out together."""
        last = events[-1]
        deltas = events[:-1] if isinstance(last, End) else events
        text = "".join([piece.text for event in deltas for piece in event.pieces])  # type: ignore[union-attr]
        body = b""
        if text:
            body = b"id: %d" % deltas[-1].n + self._content_open + orjson.dumps(text) + self._content_close
        return body + self._end(last) if isinstance(last, End) else body

    def _end(self, end: End) -> bytes:
        error = end.error()
        if error is not None:
            return b"data: %b\n\n" % orjson.dumps(error.body())  # no [DONE] follows: the answer is not whole
        result = end.result
        parts = [(end.n + 1, self._chunk({}, result.finish_reason if result else "stop"))]
        if self._include_usage:
            counts = orjson.dumps(usage(result))
            parts.append((end.n + 2, self._head + b',"choices":[],"usage":' + counts + b"}"))
        parts.append((end.n + ENDING_IDS, b"[DONE]"))
        return b"".join([_event(n, data) for n, data in parts if self._after is None or n > self._after])

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = orjson.dumps({"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason})
        return self._head + b',"choices":[' + choice + b"]" + self._usage_field + b"}"


def _event(n: int, data: bytes) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (n, data)


def queue_comment(place: int | None, eta_s: float | None) -> bytes:
    """A comment that keeps a waiting stream alive; clients ignore it, people read it."""
    if place is None:
        return b": waiting for the first token\n\n"
    eta = b"" if eta_s is None else b" eta=%.1f" % eta_s
    return b": queued position=%d%b\n\n" % (place, eta)
