"""What a job's events look like as a message of Anthropic's, whole and streamed."""

from collections.abc import Sequence
from typing import Any

import orjson

from fastchat_q.errors import FastchatQError, InvalidRequestError
from fastchat_q.events import Delta, End, Event, Result
from fastchat_q.jobs import call_arguments

from ..counts import told
from ..render import View
from ..stream import INVALID_EVENT_ID, EventId
from .blocks import Blocks, Said, collected
from .errors import body_of

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


def message(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The ``message`` object of a job that succeeded."""
    blocks = _blocks(view)
    said = [event for delta in events if isinstance(delta, Delta) for event in blocks.events(delta)]
    content = collected(said + blocks.close())
    for block in content:
        if block["type"] == "tool_use":
            block["input"] = call_arguments(block["input"])
    return _message(view, end.result) | {"content": content, **_stop(view, end)}


def count(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The answer of ``POST /v1/messages/count_tokens``."""
    return {"input_tokens": told(events)[1]["count"]}


class MessageWriter:
    """Writes one stream's server-sent events, each with an `EventId`, but for an error: as in ``render.ChunkWriter``.

    That of the first is ``0.0``; the last ones belong to no entry, and have the n behind the last token's. It is fed
    from the job's first entry on, and leaves out what its client has.

    Args:
        after: the id of the last event that the client has; None: it has none yet.
    """

    def __init__(self, view: View, after: EventId | None = None) -> None:
        self._view = view
        self._after = after
        self._met = after is None or after == EventId(0, 0)
        """The event with the id ``after`` was made once more: what follows it is what its client lacks."""
        self._refused = False
        self._blocks = _blocks(view)

    def role(self) -> bytes:
        """``message_start``; nothing for a client that has it. How long the prompt is will be known at the end."""
        if self._after is not None:
            return b""
        return _event(EventId(0, 0), {"type": "message_start", "message": _message(self._view)})

    def events(self, events: Sequence[Event]) -> bytes:
        """What some events make: text that came together goes out together."""
        written: list[bytes] = []
        text: list[str] = []
        n = 0
        for event in events:
            if isinstance(event, Delta) and event.is_plain and self._met and self._blocks.open == "text":
                if event.pieces[0].text:
                    text.append(event.pieces[0].text)
                    n = event.n
                continue
            if text:
                written.append(self._text(n, "".join(text)))
                text.clear()
            written += self._made(event)
        if text:
            written.append(self._text(n, "".join(text)))
        return b"".join(written)

    def _made(self, event: Event) -> list[bytes]:
        """What one event makes that its client lacks; an error if it has what this job never said."""
        if isinstance(event, Delta):
            made, n = self._blocks.events(event), event.n
        elif (error := self._view.failure(event)) is not None:
            return [self._error(error)]
        else:
            made, n = self._closing(event), event.n + 1
        written = [_event(at, said) for at, said in self._numbered(n, made) if self._lacks(at)]
        beyond = self._after is not None and (n >= self._after.n or isinstance(event, End))
        if not self._met and beyond and not self._refused:
            self._refused = True
            return [self._error(_no_such_event(self._after))]
        return written

    def _error(self, error: FastchatQError) -> bytes:
        return _named("error", body_of(error, self._view.extra.get("request_id")))

    def _closing(self, end: End) -> list[Said]:
        delta = {"type": "message_delta", "delta": _stop(self._view, end), "usage": _usage(end.result)}
        return [*self._blocks.close(), delta, {"type": "message_stop"}]

    def _numbered(self, n: int, made: list[Said]) -> list[tuple[EventId, Said]]:
        return [(EventId(n, m), said) for m, said in enumerate(made, 1)]

    def _lacks(self, at: EventId) -> bool:
        if not self._met:
            self._met = at == self._after and not self._refused
            return False
        return True

    def _text(self, n: int, text: str) -> bytes:
        head = b"id: %d.1\nevent: content_block_delta\ndata: " % n
        return head + b'{"type":"content_block_delta","index":%d,"delta":{"type":"text_delta","text":%b}}\n\n' % (
            self._blocks.index,
            orjson.dumps(text),
        )


def _blocks(view: View) -> Blocks:
    return Blocks(view.job_id, show_thinking=not view.extra.get("omit_thinking"))


def _message(view: View, result: Result | None = None) -> dict[str, Any]:
    """A message of which nothing has been said yet."""
    return {
        "id": f"msg_{view.job_id}",
        "type": "message",
        "role": "assistant",
        "model": view.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(result) | {"service_tier": "standard"},
    }


def _usage(result: Result | None) -> dict[str, Any]:
    """No part of a prompt is counted apart for having been cached."""
    usage = result.usage if result else None
    return {
        "input_tokens": usage.prompt_tokens if usage else 0,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": usage.completion_tokens if usage else 0,
    }


def _stop(view: View, end: End) -> dict[str, Any]:
    """Why it ended. An answer that is cut off before its ``max_tokens`` has filled the model's context."""
    result = end.result
    finish = (result and result.finish_reason) or "stop"
    stop = result.stop if result and finish == "stop" else None
    reason = "stop_sequence" if stop is not None else REASONS[finish]
    tokens = result.usage.completion_tokens if result and result.usage else None
    if finish == "length" and tokens is not None and tokens < view.extra.get("max_tokens", 0):
        reason = "model_context_window_exceeded"
    return {"stop_reason": reason, "stop_sequence": stop}


def _event(at: EventId, said: Said) -> bytes:
    return b"id: %d.%d\n" % at + _named(said["type"], said)


def _named(name: str, said: Said) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(said))


def _no_such_event(after: EventId | None) -> InvalidRequestError:
    shown = "" if after is None else f" {after.n}.{after.m}"
    return InvalidRequestError(
        f"There is no going on behind the event id{shown}: it is none that an event of this job has had. Read the job "
        "from its beginning, without Last-Event-ID.",
        code=INVALID_EVENT_ID,
    )
