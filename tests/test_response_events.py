"""The events of a response are a function of its log alone: whoever writes them, however it comes, cut wherever."""

import itertools
import json
from random import Random
from typing import Any

import pytest
from fastchat_q.api.render import View
from fastchat_q.api.response_items import unsealed
from fastchat_q.api.response_output import EventWriter, events_so_far, state, whole
from fastchat_q.api.response_request import ResponseRequest
from openai import omit
from openai._streaming import SSEDecoder
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from fastchat_q.events import Alternative, Delta, End, Event, Piece, Result, TokenLogprob, ToolCallDelta, Usage

JOB_ID = "01M7YSN24098N6EY5MJ6FR9HZN"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}

LOGPROB = TokenLogprob(4, "four", -0.5, (Alternative(5, "\ufffd", -1.5), Alternative(6, "six", float("-inf"))))
LOG: list[tuple[Piece, ...]] = [
    (Piece((1,), reasoning="Let me"),),
    (Piece((2, 3), reasoning=" think."),),
    (Piece((), "", units=1),),  # held back
    (Piece((4,), "", logprobs=(LOGPROB,)),),
    (Piece((5,), "It says ", logprobs=(LOGPROB,)),),
    (Piece((6, 7, 8), "four"), Piece((9,), " words\n")),
    (Piece((10,), reasoning="Hm.", text="And", tool_calls=(ToolCallDelta(0, '{"ci', "call_a", "weather"),)),),
    (Piece((11, 12), tool_calls=(ToolCallDelta(0, 'ty": 1}'), ToolCallDelta(1, "", "call_b", "weather"))),),
    (Piece((13,), tool_calls=(ToolCallDelta(1, "{}"),)),),
    (Piece((14,), tool_calls=(ToolCallDelta(0, " "),)),),  # an upstream server that takes turns
    (Piece((15,), "Done."),),
]
"""What no model says in one answer: everything, several things in an entry, and a call that comes back."""


def deltas(log: list[tuple[Piece, ...]] = LOG) -> list[Delta]:
    counts = itertools.accumulate(sum(piece.k for piece in pieces) for pieces in log)
    return [Delta(n, sum(piece.k for piece in pieces), pieces) for n, pieces in zip(counts, log, strict=True)]


def ended(state: str = "succeeded", finish: str = "stop", error: dict[str, Any] | None = None) -> End:
    result = Result(error=error) if error else Result(finish, Usage(7, 15)) if state == "succeeded" else None  # type: ignore[arg-type]
    return End(15, state, "why", result, 1_795_300_043_999)


def view(**fields: Any) -> View:
    body = ResponseRequest.model_validate({"model": "m/M", "input": "Hi", "tools": [WEATHER], **fields})
    return View(JOB_ID, "m/M", 1_795_300_000, "hi", form="response", extra=body.to_extra([]))


def written(view: View, batches: list[list[Event]], after: int | None = None) -> bytes:
    writer = EventWriter(view, after)
    body = writer.opening()
    if not (isinstance(batches[0][0], End) and batches[0][0].error()):
        body += writer.role()
    return body + b"".join([writer.events(batch) for batch in batches])


def decoded(wire: bytes) -> list[dict[str, Any]]:
    found = []
    for event in SSEDecoder().iter_bytes(iter([wire])):
        data = event.json()
        assert event.event == data["type"]
        if event.event != "error":
            assert event.id == str(data["sequence_number"])
        found.append(data)
    return found


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("end", [ended(), ended(finish="length"), ended("cancelled"), ended("expired")])
def test_numbers_have_no_gap_and_every_event_is_of_openais_shape(background: bool, end: End) -> None:
    events = decoded(written(view(background=background), [[*deltas(), end]]))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    error = events[-1]["response"]["error"]
    if error:
        error["code"] = "server_error"  # the client's list is of what OpenAI's models and images can fail with
    for event in events:
        parsed = EVENT.validate_python(event, strict=True)
        assert type(parsed).model_fields["type"].annotation.__args__ == (event["type"],)  # type: ignore[union-attr]
        assert not parsed.model_extra or parsed.model_extra.keys() <= {"name"}
    opening = ["response.created", *(["response.queued"] if background else []), "response.in_progress"]
    assert [event["type"] for event in events][: len(opening)] == opening
    assert events_so_far(view(background=background), deltas(), end) == len(events)


@pytest.mark.parametrize("background", [False, True])
def test_a_reader_that_was_cut_behind_any_event_gets_exactly_the_rest(background: bool) -> None:
    shown = view(background=background)
    wire = written(shown, [[*deltas(), ended()]])
    blocks = wire.split(b"\n\n")[:-1]
    for after in range(len(blocks)):
        rest = b"".join([block + b"\n\n" for block in blocks[after + 1 :]])
        assert written(shown, [[*deltas(), ended()]], after) == rest, after
    assert written(shown, [[*deltas(), ended()]], len(blocks)) == b""


def test_it_is_the_same_however_the_entries_come() -> None:
    """Live they come one by one or some together; from the log in pages."""
    entries: list[Event] = [*deltas(), ended()]
    expected = written(view(), [entries])
    for seed in range(200):
        random = Random(seed)
        cuts = sorted(random.sample(range(1, len(entries)), random.randrange(len(entries))))
        batches = [entries[i:j] for i, j in itertools.pairwise([0, *cuts, len(entries)])]
        assert written(view(), batches) == expected


def test_the_events_add_up_to_the_response_that_is_retrieved_later() -> None:
    events = decoded(written(view(), [[*deltas(), ended()]]))
    response = events[-1]["response"]
    assert response == whole(view(), [*deltas(), ended()], ended())
    Response.model_validate(response, strict=True)
    grown: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            grown[event["output_index"]] = grown.get(event["output_index"], "") + event["delta"]
    kinds = [(item["type"], item["status"]) for item in response["output"]]
    assert kinds == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "completed"),
        ("function_call", "completed"),
        ("message", "completed"),
    ]
    for index, item in enumerate(response["output"]):
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert text == grown[index]
    assert [item["call_id"] for item in response["output"] if item["type"] == "function_call"] == ["call_a", "call_b"]
    assert response["output"][1]["content"][0]["logprobs"][0] == {
        "token": "four",
        "bytes": list(b"four"),
        "logprob": -0.5,
        "top_logprobs": [
            {"token": "\ufffd", "bytes": [], "logprob": -1.5},
            {"token": "six", "bytes": list(b"six"), "logprob": -9999.0},
        ],
    }
    assert len(response["output"][1]["content"][0]["logprobs"]) == 2, "that of the token that was held back too"
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}
    assert response["completed_at"] == 1_795_300_043


def test_every_item_is_opened_before_it_grows_and_closed_once_it_ends() -> None:
    open_items: dict[int, str] = {}
    for event in decoded(written(view(), [[*deltas(), ended()]])):
        kind, index = event["type"], event.get("output_index", -1)
        if kind == "response.output_item.added":
            assert event["item"]["id"] not in open_items.values()
            open_items[index] = event["item"]["id"]
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == open_items[index]
        elif index >= 0:
            assert event["item_id"] == open_items[index]


def test_the_official_accumulator_takes_the_stream() -> None:
    accumulator: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in decoded(written(view(tools=[]), [[*deltas(), ended()]])):
        accumulator.handle_event(EVENT.validate_python(event))
    assert accumulator._completed_response.output_text == "It says four words\nAndDone."


def test_an_answer_of_nothing_is_an_empty_message() -> None:
    end = End(1, "succeeded", "stop", Result("stop", Usage(7, 1)), 1)
    [item] = whole(view(), [Delta(1, 1, (Piece((1,), ""),)), end], end)["output"]
    assert item["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]


@pytest.mark.parametrize(
    ("end", "event", "status", "detail"),
    [
        (ended(), "response.completed", "completed", None),
        (ended(finish="tool_calls"), "response.completed", "completed", None),
        (ended(finish="length"), "response.incomplete", "incomplete", {"reason": "max_output_tokens"}),
        (ended(finish="content_filter"), "response.incomplete", "incomplete", {"reason": "content_filter"}),
        (ended("cancelled"), "response.incomplete", "cancelled", None),
        (ended("expired"), "response.failed", "failed", "deadline_exceeded"),
        (ended("dead"), "response.failed", "failed", "job_dead"),
        (ended("failed", error={"message": "Oh", "status": 500}), "response.failed", "failed", "server_error"),
    ],
)
def test_each_end_has_its_event_and_status(end: End, event: str, status: str, detail: Any) -> None:
    last = decoded(written(view(), [[*deltas(), end]]))[-1]
    response = last["response"]
    assert (last["type"], response["status"]) == (event, status)
    if status == "failed":
        assert response["error"]["code"] == detail
    else:
        assert (response["error"], response["incomplete_details"]) == (None, detail)
    if status in ("failed", "cancelled"):
        assert response["output"][-1]["status"] == "incomplete", "what came stays, and says that it is not whole"
        assert response["usage"] is None


def test_an_end_that_is_the_readers_alone_has_the_number_of_the_event_before() -> None:
    lost = End(15, "lost", "the job record is gone", None)
    *before, error = decoded(written(view(), [[*deltas(), lost]]))
    assert error.keys() == {"type", "code", "message", "param", "sequence_number"}
    assert error["code"] == "queue_unavailable"
    assert error["sequence_number"] == before[-1]["sequence_number"]
    assert events_so_far(view(), deltas(), None) == len(before)


def test_reasoning_is_sealed_only_for_those_who_ask() -> None:
    sealed = view(include=["reasoning.encrypted_content"])
    first = whole(sealed, [*deltas(), ended()], ended())["output"][0]
    assert unsealed(first["encrypted_content"], "input") == "Let me think."
    assert whole(view(), [*deltas(), ended()], ended())["output"][0]["encrypted_content"] is None


def test_a_response_that_was_just_accepted_is_queued() -> None:
    response = state(view(background=True), None, ())
    assert (response["status"], response["output"], response["usage"]) == ("queued", [], None)
    Response.model_validate(response, strict=True)
    json.dumps(response)
