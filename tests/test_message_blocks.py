"""What a job's log looks like as a stream of Anthropic's events, however it is read and wherever it is cut."""

import json
from collections.abc import Sequence
from typing import Any

from anthropic._streaming import SSEDecoder
from fastchat_q.api.anthropic.answer import PING, MessageWriter, message
from fastchat_q.api.render import View
from fastchat_q.api.stream import EventId
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_q.events import Delta, End, Event, Piece, Result, ToolCallDelta, Usage

VIEW = View("JOB", "m", 0, "hi", form="message", extra={"max_tokens": 1000})
Saying = list[tuple[EventId | None, dict[str, Any]]]


@st.composite
def logs(draw: st.DrawFn) -> list[Event]:
    """The events of a whole job: thoughts, texts and calls in any order, in entries of one piece or several."""
    events: list[Event] = []
    n = calls = 0
    for _ in range(draw(st.integers(0, 12))):
        pieces = []
        for _ in range(draw(st.integers(1, 2))):
            kind = draw(st.sampled_from(["text", "text", "thought", "call", "more", "nothing"]))
            word = draw(st.sampled_from(["a", "b ", "\n\n", "ü🦊"]))
            deltas: tuple[ToolCallDelta, ...] = ()
            if kind == "call":
                deltas = (ToolCallDelta(calls, "{", f"c{calls}", "f"),)
                calls += 1
            elif kind == "more" and calls:
                deltas = (ToolCallDelta(calls - 1, " "),)
            text = word if kind == "text" else ""
            thought = word if kind == "thought" else ""
            pieces.append(Piece(tuple(range(draw(st.integers(1, 3)))), text, 0, thought, deltas))
        k = sum(piece.k for piece in pieces)
        n += k
        events.append(Delta(n, k, tuple(pieces)))
    return [*events, End(n, "succeeded", "stop", Result("stop", Usage(3, n)))]


def said(raw: bytes) -> Saying:
    """(id, data) of each event."""
    found: Saying = []
    for block in raw.decode().split("\n\n")[:-1]:
        at, lines = None, block.split("\n")
        if lines[0].startswith("id: "):
            at = EventId(*map(int, lines.pop(0).removeprefix("id: ").split(".")))
        assert lines[0].startswith("event: ")
        data = json.loads(lines[1].removeprefix("data: "))
        assert lines[0] == f"event: {data['type']}"
        found.append((at, data))
    return found


def written(events: Sequence[Event], cuts: Sequence[bool], after: EventId | None = None) -> Saying:
    """The stream when a read ends behind each event whose cut is true."""
    writer, raw, some = MessageWriter(VIEW, after), b"", []
    raw = writer.role()
    for event, cut in zip(events, cuts, strict=True):
        some.append(event)
        if cut or isinstance(event, End):
            raw += writer.events(some)
            some = []
    return said(raw)


def content(events: Saying) -> list[dict[str, Any]]:
    """The blocks that a client makes of a stream; fails on one that is out of order."""
    blocks: list[dict[str, Any]] = []
    is_open = False
    for _, event in events:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(blocks)
            is_open = True
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            block = blocks[event["index"]]
            for name, value in event["delta"].items():
                field = "json" if name == "partial_json" else name
                if name != "type":
                    block[field] += value
        elif event["type"] == "content_block_stop":
            assert is_open
            is_open = False
    assert not is_open
    return blocks


@settings(deadline=None)
@given(logs(), st.data())
def test_a_stream_cut_at_any_event_and_read_in_any_pieces_is_the_same_answer(
    events: list[Event], data: st.DataObject
) -> None:
    pieces = st.lists(st.booleans(), min_size=len(events), max_size=len(events))
    first = written(events, data.draw(pieces))
    ids = [at for at, _ in first]
    assert None not in ids
    assert ids == sorted(set(ids)), "each once, and they grow"
    assert [event["type"] for _, event in first][-2:] == ["message_delta", "message_stop"]
    expected = content(first)
    for cut in range(len(first)):
        rest = written(events, data.draw(pieces), ids[cut])
        assert content(first[: cut + 1] + rest) == expected, ids[cut]
        assert [event["type"] for _, event in rest].count("message_start") == 0


@settings(deadline=None)
@given(logs(), st.data())
def test_a_whole_answer_has_the_blocks_of_its_stream(events: list[Event], data: st.DataObject) -> None:
    pieces = st.lists(st.booleans(), min_size=len(events), max_size=len(events))
    end = events[-1]
    assert isinstance(end, End)
    streamed = content(written(events, data.draw(pieces)))
    for block, whole in zip(streamed, message(VIEW, events, end)["content"], strict=True):
        text = block.pop("json")
        if whole["type"] == "tool_use":
            assert text.startswith("{")
        assert block == whole


def test_a_ping_between_two_events_is_nothing_to_the_official_client() -> None:
    writer = MessageWriter(VIEW)
    first, second = (writer.events([Delta(n, 1, (Piece((n,), word),))]) for n, word in ((1, "a"), (2, "b")))
    wire = b": waiting for the first token\n\n" + writer.role() + PING + first + PING + second
    found = [event for event in SSEDecoder().iter_bytes(iter([wire])) if event.event not in (None, "ping")]
    assert [event.json()["type"] for event in found] == [event.event for event in found]
    deltas = [event.json()["delta"]["text"] for event in found if event.event == "content_block_delta"]
    assert deltas == ["a", "b"]


@settings(deadline=None)
@given(logs(), st.integers(0, 40), st.integers(0, 9))
def test_an_id_that_no_event_has_is_an_error_and_nothing_else(events: list[Event], n: int, m: int) -> None:
    every = [True] * len(events)
    if EventId(n, m) not in [at for at, _ in written(events, every)]:
        [(at, error)] = written(events, every, EventId(n, m))
        assert (at, error["type"], error["error"]["type"]) == (None, "error", "invalid_request_error")
