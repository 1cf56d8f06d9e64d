"""How a response looks at any moment: its token log becomes items, and the events that tell how they came to be.

Everything here is a function of the job's view and of its log, entry by entry: whoever reads the log, wherever and
whenever, gets the same items and the same events under the same numbers. So an event is made of one entry at the most,
and a reader that comes back gets the log from its beginning with the events that it has left out.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from fastchat_q import keys
from fastchat_q.errors import FastchatQError
from fastchat_q.events import Delta, End, Event, FinishReason, Piece, TokenLogprob, ToolCallDelta, token_bytes
from fastchat_q.records import JobRecord

from .parts import LEAST_LOGPROB, shown
from .render import SERVICE_TIERS, View
from .response_items import Item, sealed

ID_PREFIX = "resp_"
ITEM_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
NOBODY_SAYS = {"stop": None, "tool_calls": None, "length": "max_output_tokens", "content_filter": "content_filter"}
"""Finish reason -> why the response is incomplete; None: it is complete."""
STATUSES = {"failed": "failed", "expired": "failed", "dead": "failed", "cancelled": "cancelled"}
"""State of a job that ended without success -> status of its response."""

Fields = dict[str, Any]
Said = tuple[str, Fields]
"""An event without its number: its type, and what else it holds."""


def public_id(view: View) -> str:
    """The job's public id: what stands behind ``resp_`` in the response's."""
    return keys.public_job_id(view.slug or view.model, view.job_id)


def response_id(view: View) -> str:
    """The id of the response."""
    return ID_PREFIX + public_id(view)


def item_id(kind: str, place: str, public: str) -> str:
    """The id of an item, by which any server finds the response that it is of.

    Args:
        place: its index in the output, or ``i`` and its index in the input.
    """
    return f"{ITEM_PREFIXES[kind]}_{place}_{public}"


class _Item:
    """An item of the output while it grows."""

    def __init__(self, kind: str, index: int, own_id: str, **fields: Any) -> None:
        self.kind, self.index, self.id, self.fields = kind, index, own_id, fields
        self.said: list[str] = []
        self.logprobs: list[Fields] = []
        self.status = "in_progress"

    @property
    def text(self) -> str:
        """All that it says so far: content, a thought, or a call's arguments."""
        return "".join(self.said)

    def part(self, *, empty: bool = False) -> Fields:
        """Its only part of content."""
        text = "" if empty else self.text
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if empty else self.logprobs
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def to_object(self, *, empty: bool = False) -> Item:
        """As the API shows it; ``empty``: as it was when it began."""
        head = {"id": self.id, "type": self.kind, "status": "in_progress" if empty else self.status}
        if self.kind == "function_call":
            return {**head, **self.fields, "arguments": "" if empty else self.text}
        content = [] if empty else [self.part()]
        if self.kind == "message":
            return {**head, "role": "assistant", "content": content}
        seal = sealed(self.text) if self.fields["sealed"] and not empty else None
        return {**head, "summary": [], "content": content, "encrypted_content": seal}

    @property
    def where(self) -> Fields:
        """How events name it."""
        return {"item_id": self.id, "output_index": self.index}


class Output:
    """The items of a response, in the order in which they began."""

    def __init__(self, public: str, *, seal: bool = False) -> None:
        self._public, self._seal = public, seal
        self._items: list[_Item] = []
        self._calls: dict[int, _Item] = {}
        self._open: _Item | None = None
        self._silent_logprobs: list[TokenLogprob] = []
        self.reasoning_tokens = 0

    def objects(self) -> list[Item]:
        """All items as the API shows them."""
        return [item.to_object() for item in self._items]

    def feed(self, deltas: Iterable[Delta]) -> list[Said]:
        """Takes entries of the log in, and says what happens."""
        return [said for delta in deltas for piece in delta.pieces for said in self._feed(piece)]

    def close(self, status: str) -> list[Said]:
        """Ends what is open; without any item there is an empty message."""
        said = [] if self._items else self._begin("message")
        if self._open is not None and self._open.kind == "message":
            self._open.logprobs += map(_logprob, self._silent_logprobs)
        return said + self._end_open(status)

    def stop(self) -> None:
        """What is open stays as it is: the job has ended without success."""
        if self._open is not None:
            self._open.status = "incomplete"

    def _feed(self, piece: Piece) -> list[Said]:
        said: list[Said] = []
        if piece.reasoning:
            said += self._turn_to("reasoning")
            said.append(self._grow("response.reasoning_text.delta", piece.reasoning, content_index=0))
            if not piece.text and not piece.tool_calls:
                self.reasoning_tokens += piece.k
        elif not piece.text and not piece.tool_calls:
            self._silent_logprobs += piece.logprobs
        if piece.text:
            said += self._turn_to("message")
            found = [_logprob(one) for one in (*self._silent_logprobs, *piece.logprobs)]
            self._silent_logprobs = []
            assert self._open is not None
            self._open.logprobs += found
            said.append(self._grow("response.output_text.delta", piece.text, content_index=0, logprobs=_short(found)))
        for call in piece.tool_calls:
            said += self._call(call)
        return said

    def _call(self, call: ToolCallDelta) -> list[Said]:
        item, said = self._calls.get(call.call), []
        if item is None:
            said += self._end_open("completed")
            said += self._begin("function_call", call_id=call.id or f"call_{call.call}", name=call.name or "")
            assert self._open is not None
            self._calls[call.call] = self._open
        elif item is not self._open:  # an upstream server that says two calls by turns: this one ends once more
            said += self._end_open("completed")
            self._open, item.status = item, "in_progress"
        if call.arguments:
            said.append(self._grow("response.function_call_arguments.delta", call.arguments))
        return said

    def _turn_to(self, kind: str) -> list[Said]:
        if self._open is not None and self._open.kind == kind:
            return []
        said = self._end_open("completed")
        return said + self._begin(kind, **({"sealed": self._seal} if kind == "reasoning" else {}))

    def _begin(self, kind: str, **fields: Any) -> list[Said]:
        index = len(self._items)
        item = self._open = _Item(kind, index, item_id(kind, str(index), self._public), **fields)
        self._items.append(item)
        said = [("response.output_item.added", {"output_index": index, "item": item.to_object(empty=True)})]
        if kind != "function_call":
            part = {**item.where, "content_index": 0, "part": item.part(empty=True)}
            said.append(("response.content_part.added", part))
        return said

    def _grow(self, event: str, text: str, **fields: Any) -> Said:
        assert self._open is not None
        self._open.said.append(text)
        return event, {**self._open.where, **fields, "delta": text}

    def _end_open(self, status: str) -> list[Said]:
        item, self._open = self._open, None
        if item is None:
            return []
        item.status = status
        done = {"output_index": item.index, "item": item.to_object()}
        if item.kind == "function_call":
            arguments = {**item.where, "name": item.fields["name"], "arguments": item.text}
            return [("response.function_call_arguments.done", arguments), ("response.output_item.done", done)]
        text: Fields = {**item.where, "content_index": 0, "text": item.text}
        event = "response.reasoning_text.done"
        if item.kind == "message":
            event, text["logprobs"] = "response.output_text.done", _short(item.logprobs)
        part = {**item.where, "content_index": 0, "part": item.part()}
        return [(event, text), ("response.content_part.done", part), ("response.output_item.done", done)]


class EventWriter:
    """Writes the server-sent events of one response.

    ``id`` is the ``sequence_number``, from 0 on without a gap. An ``error`` that is none of the response's own (the
    queue lost it, or its tokens) has the number of the event before, so that who comes back goes on behind that.

    Args:
        after: the number of the last event that the client has; None: it has none yet.
    """

    def __init__(self, view: View, after: int | None = None) -> None:
        self._view = view
        self._after = -1 if after is None else after
        self._output = _output_of(view)
        self._created = orjson.dumps(_object(view, "queued" if _in_background(view) else "in_progress", []))
        self.number = 0
        """Of the next event."""

    def opening(self) -> bytes:
        """What is there as soon as the queue has the job: the client learns the id."""
        if _in_background(self._view):
            return self._of_all("response.created") + self._of_all("response.queued")
        return self._of_all("response.created") + self._of_all("response.in_progress")

    def role(self) -> bytes:
        """What comes before the first token."""
        return self._of_all("response.in_progress") if _in_background(self._view) else b""

    def events(self, events: Sequence[Event]) -> bytes:
        """What some events make; the last one may be the end."""
        last = events[-1]
        deltas: Sequence[Delta] = events[:-1] if isinstance(last, End) else events  # type: ignore[assignment]
        body = self._written(self._output.feed(deltas))
        return body + self._end(last) if isinstance(last, End) else body

    def _end(self, end: End) -> bytes:
        error = self._view.failure(end)
        if error is not None and end.ended_ms is None:
            fields = {"code": error.code, "message": error.message, "param": error.param}
            number = max(self.number - 1, 0)
            return _event("error", orjson.dumps({"type": "error", **fields, "sequence_number": number}))
        said, event = _finish(self._output, end)
        response = _object(self._view, *_ending(self._view, self._output, end))
        return self._written([*said, (event, {"response": response})])

    def _of_all(self, event: str) -> bytes:
        number = self._next()
        if number <= self._after:
            return b""
        body = b'{"type":"%b","response":%b,"sequence_number":%d}'
        return _event(event, body % (event.encode(), self._created, number), number)

    def _written(self, said: Iterable[Said]) -> bytes:
        body = []
        for event, fields in said:
            number = self._next()
            if number > self._after:
                encoded = orjson.dumps({"type": event, **fields, "sequence_number": number})
                body.append(_event(event, encoded, number))
        return b"".join(body)

    def _next(self) -> int:
        number, self.number = self.number, self.number + 1
        return number


def events_so_far(view: View, deltas: Sequence[Delta], end: End | None) -> int:
    """How many events there are."""
    writer = EventWriter(view)
    writer.opening()
    if deltas or (end is not None and end.error() is None):
        writer.role()
    if deltas or end is not None:
        writer.events([*deltas, end] if end is not None else deltas)
    return writer.number


def whole(view: View, events: Sequence[Event], end: End) -> Fields:
    """The ``response`` object of a job that has ended."""
    output = _output_of(view)
    output.feed(event for event in events if isinstance(event, Delta))
    _finish(output, end)
    return _object(view, *_ending(view, output, end))


def state(view: View, record: JobRecord | None, deltas: Sequence[Delta]) -> Fields:
    """The ``response`` object as far as it is; without a record: of a job that was accepted just now."""
    end = record.end() if record is not None else None
    if end is not None:
        return whole(view, deltas, end)
    output = _output_of(view)
    output.feed(deltas)
    begun = record is not None and (record.state != "queued" or record.attempt or deltas)
    return _object(view, "in_progress" if begun else "queued", output.objects())


def _output_of(view: View) -> Output:
    return Output(public_id(view), seal=bool(view.extra.get("sealed")))


def _in_background(view: View) -> bool:
    return bool(view.extra["background"])


def _finish(output: Output, end: End) -> tuple[list[Said], str]:
    """Ends what is open; returns what there is to say of that, and the type of the last event."""
    if end.state != "succeeded":
        output.stop()
        # OpenAI has no event for a response that was cancelled. It is no failure: what came until then stays.
        return [], "response.incomplete" if end.state == "cancelled" else "response.failed"
    cut = _cut(end)
    said = output.close("incomplete" if cut else "completed")
    return said, "response.incomplete" if cut else "response.completed"


def _ending(view: View, output: Output, end: End) -> tuple[str, list[Item], Fields]:
    """Status, items and the fields of a response that has ended."""
    usage = end.result.usage if end.result else None
    fields: Fields = {
        "completed_at": end.ended_ms // 1000 if end.ended_ms is not None and end.state == "succeeded" else None,
        "usage": None
        if usage is None
        else {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": min(output.reasoning_tokens, usage.completion_tokens)},
            "total_tokens": usage.total_tokens,
        },
    }
    if end.state == "succeeded":
        cut = _cut(end)
        if cut:
            fields["incomplete_details"] = {"reason": cut}
        return "incomplete" if cut else "completed", output.objects(), fields
    error = view.failure(end)
    if error is not None and end.state != "cancelled":
        fields["error"] = _error(error)
    return STATUSES.get(end.state, "failed"), output.objects(), fields


def _cut(end: End) -> str | None:
    reason: FinishReason = (end.result and end.result.finish_reason) or "stop"
    return NOBODY_SAYS[reason]


def _error(error: FastchatQError) -> Fields:
    return {"code": error.code or "server_error", "message": error.message, "param": error.param, "type": error.type}


def _object(view: View, status: str, output: list[Item], ending: Fields | None = None) -> Fields:
    return {
        "id": response_id(view),
        "object": "response",
        "created_at": view.created,
        "status": status,
        "background": _in_background(view),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "model": view.model,
        "output": output,
        "service_tier": SERVICE_TIERS[view.lane],
        "usage": None,
        **view.extra["echo"],
        **(ending or {}),
    }


def _event(event: str, data: bytes, number: int | None = None) -> bytes:
    head = b"" if number is None else b"id: %d\n" % number
    return head + b"event: %b\ndata: %b\n\n" % (event.encode(), data)


def _logprob(one: TokenLogprob) -> Fields:
    others = [
        {"token": shown(other.token), "bytes": _bytes(other.token), "logprob": _log(other.logprob)} for other in one.top
    ]
    return {"token": shown(one.token), "bytes": _bytes(one.token), "logprob": _log(one.logprob), "top_logprobs": others}


def _short(found: Sequence[Fields]) -> list[Fields]:
    """As events have them: without the bytes."""
    return [
        {
            "token": one["token"],
            "logprob": one["logprob"],
            "top_logprobs": [{"token": other["token"], "logprob": other["logprob"]} for other in one["top_logprobs"]],
        }
        for one in found
    ]


def _log(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _bytes(token: str) -> list[int]:
    """None where the engine does not tell those of a part of a character."""
    return list(token_bytes(token) or b"")
