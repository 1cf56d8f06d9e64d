"""Events become OpenAI's bytes. The frame of a stream's chunks is encoded once; a token costs one string encoding.

That is for plain tokens; what is more (choices, tool calls, reasoning, log probabilities) goes through ``parts``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

import orjson

from fastchat_q.errors import FastchatQError
from fastchat_q.events import Delta, End, Event, Piece, Result, merged
from fastchat_q.jobs import Lane
from fastchat_q.versions import known_fields

from . import parts

SERVICE_TIERS: dict[Lane, str] = {"hi": "default", "lo": "flex"}
Form = Literal[
    "chat",
    "completion",
    "embeddings",
    "input_tokens",
    "message",
    "message_tokens",
    "rerank",
    "response",
    "text",
    "tokens",
]
"""How an answer looks; ``answers`` has the functions of each."""
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
    form: Form = "chat"
    n: int = 1
    """How many choices there are; of embeddings: how many inputs."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What its form needs beside the rest; JSON."""
    spelt: Mapping[str, str] = field(default_factory=dict)
    """Parameters that have another name in the request than in the job."""
    slug: str = ""
    """Of the queue that the job is in, which is another one than that of ``model`` if this is an alias."""

    def to_json(self) -> str:
        """JSON for the job record."""
        return orjson.dumps(self).decode()

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """The inverse of `to_json`."""
        return cls(**known_fields(cls, orjson.loads(raw)))

    def failure(self, end: End) -> FastchatQError | None:
        """What a job failed of, in the words of its request; None: it succeeded."""
        error = end.error()
        if error is not None:
            error.respell(self.spelt)
        return error

    @property
    def completion_id(self) -> str:
        """The ``id`` of the completion, and of each of its chunks."""
        return f"{'cmpl' if self.form == 'completion' else 'chatcmpl'}-{self.job_id}"


def completion(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The ``chat.completion`` object of a job that succeeded."""
    pieces = [piece for event in events if isinstance(event, Delta) for piece in event.pieces]
    said = {piece.choice: piece for piece in merged(pieces)} if pieces else {}
    result = end.result
    return {
        "id": view.completion_id,
        "object": "chat.completion",
        "created": view.created,
        "model": view.model,
        "choices": [_choice(index, said.get(index, Piece()), result) for index in range(view.n)],
        "usage": usage(result),
        "service_tier": SERVICE_TIERS[view.lane],
        "system_fingerprint": None,
    }


def _choice(index: int, piece: Piece, result: Result | None) -> dict[str, Any]:
    return {
        "index": index,
        "message": parts.message(piece),
        "logprobs": parts.logprobs(piece.logprobs),
        "finish_reason": piece.finish or (result and result.finish_reason) or "stop",
    }


def usage(result: Result | None) -> dict[str, int] | None:
    """The ``usage`` object of a job that has ended."""
    return result.usage.to_dict() if result and result.usage else None


class Writer(Protocol):
    """Writes the server-sent events of one stream, in the form of its answer."""

    def role(self) -> bytes:
        """What comes before the first token."""

    def events(self, events: Sequence[Event]) -> bytes:
        """What some events make; the last one may be the end."""


@runtime_checkable
class Opening(Protocol):
    """A writer that has something to say before the job has begun."""

    def opening(self) -> bytes:
        """What there is as soon as the queue has the job."""


class ChunkWriter:
    """Writes one stream's server-sent events.

    Each carries ``id: <n>``, n tokens so far, with which a client that was cut off goes on. What follows the last of N
    tokens has the ids N + 1 (finish reason), N + 2 (usage) and N + 3 ([DONE]). An error has none: who comes back after
    it goes on behind its last token, though the job was given another life meanwhile. Of an entry that makes several
    chunks see ``parts``. Where there are several choices each has had its finish reason when the job ends.

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
        self._view = view
        self._after = after
        self._n = view.n
        self._usage_field = b',"usage":null' if view.include_usage else b""
        self._include_usage = view.include_usage
        self._content_open = b"\ndata: " + self._head + b',"choices":[{"index":0,"delta":{"content":'
        self._content_close = b'},"logprobs":null,"finish_reason":null}]' + self._usage_field + b"}\n\n"

    def role(self) -> bytes:
        """The first chunk, one for each choice; nothing for a client that has it."""
        if self._after is not None:
            return b""
        roles = [
            self._chunk([parts.choice(index, {"role": "assistant", "content": "", "refusal": None})])
            for index in range(self._n)
        ]
        # Only the last has the id, so that who was cut off between them begins again and gets all of them.
        return b"".join([b"data: %b\n\n" % role for role in roles[:-1]]) + _event(0, roles[-1])

    def events(self, events: Sequence[Event]) -> bytes:
        """The chunks of some events: text that came together goes out together."""
        last = events[-1]
        end = last if isinstance(last, End) else None
        deltas: Sequence[Delta] = events if end is None else events[:-1]  # type: ignore[assignment]
        said = [delta.pieces[0].text for delta in deltas if delta.is_plain]
        if len(said) < len(deltas):
            body = b"".join([self.events([delta]) if delta.is_plain else self._rich(delta) for delta in deltas])
        else:
            text, body = "".join(said), b""
            if text:
                body = b"id: %d" % deltas[-1].n + self._content_open + orjson.dumps(text) + self._content_close
        return body if end is None else body + self._end(end)

    def _rich(self, delta: Delta) -> bytes:
        after = self._after or 0
        return b"".join([_event(n, self._chunk(choices)) for n, choices in parts.chunks(delta) if n > after])

    def _end(self, end: End) -> bytes:
        error = self._view.failure(end)
        if error is not None:
            return b"data: %b\n\n" % orjson.dumps(error.body())  # no [DONE] follows: the answer is not whole
        result = end.result
        closing = []
        if self._n == 1:
            finish = result.finish_reason if result else "stop"
            closing.append((end.n + 1, self._chunk([parts.choice(0, {}, finish)])))
        if self._include_usage:
            counts = orjson.dumps(usage(result))
            closing.append((end.n + 2, self._head + b',"choices":[],"usage":' + counts + b"}"))
        closing.append((end.n + ENDING_IDS, b"[DONE]"))
        return b"".join([_event(n, data) for n, data in closing if self._after is None or n > self._after])

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        return self._head + b',"choices":' + orjson.dumps(choices) + self._usage_field + b"}"


def _event(n: int, data: bytes) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (n, data)


def queue_comment(place: int | None, eta_s: float | None) -> bytes:
    """A comment that keeps a waiting stream alive; clients ignore it, people read it."""
    if place is None:
        return b": waiting for the first token\n\n"
    eta = b"" if eta_s is None else b" eta=%.1f" % eta_s
    return b": queued position=%d%b\n\n" % (place, eta)
