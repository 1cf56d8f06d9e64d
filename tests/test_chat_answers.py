"""What the pieces of an answer look like to the official client: choices, tool calls, thoughts, log probabilities."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fastchat_q.api.parts import chunks, is_inside
from fastchat_q.api.render import ChunkWriter, View
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fastchat_q.events import Alternative, Delta, Piece, TokenLogprob, ToolCallDelta

from .http_client import Connection, post
from .scripted_worker import script
from .stack import Stack
from .streams import resume

ROME = ToolCallDelta(0, '{"city":', "call_1", "weather")
TIME = ToolCallDelta(1, "{}", "call_2", "time")
LOGPROBS = (
    TokenLogprob(5, "é", -0.5, (Alternative(5, "é", -0.5), Alternative(7, "\ufffd", -1.5))),
    TokenLogprob(6, "x", float("-inf")),
)
TWO = [
    [Piece((1,), "a"), Piece((2,), "A", choice=1)],
    [Piece((3,), "b")],
    [Piece((4, 5), "c", finish="stop"), Piece((6,), "B", choice=1)],
    [Piece((7, 8), "C", choice=1, finish="stop")],
]
CALLS = [
    Piece((1,), reasoning="Let me "),
    Piece((2, 3), reasoning="see.", text="I look."),
    Piece((4, 5, 6), tool_calls=(ROME,)),
    Piece((7, 8, 9), tool_calls=(ToolCallDelta(0, '"Rome"}'), TIME)),
]


def body(*steps: Any, finish: str = "stop", delay_ms: float = 0, **fields: Any) -> dict[str, Any]:
    """A request for a scripted answer."""
    content = script(*steps, finish=finish, delay_ms=delay_ms)
    return {"model": "script", "messages": [{"role": "user", "content": content}], **fields}


@pytest.fixture
def client(scripted_stack: Stack) -> Iterator[openai.OpenAI]:
    with scripted_stack.client() as client:
        yield client


def whole(client: openai.OpenAI, request: dict[str, Any]) -> ChatCompletion:
    """The answer as it is without a stream, valid to the letter."""
    found: Any = client.chat.completions.with_raw_response.create(**request)
    return ChatCompletion.model_validate_json(found.text, strict=True)


def streamed(client: openai.OpenAI, request: dict[str, Any]) -> ChatCompletion:
    """The answer as the client's own accumulator makes it of a stream."""
    options = {"include_usage": True}
    with client.chat.completions.stream(**request, stream_options=options) as events:
        for event in events:
            if event.type == "chunk":
                ChatCompletionChunk.model_validate(event.chunk.model_dump(exclude_unset=True), strict=True)
        return events.get_final_completion()


@pytest.mark.parametrize("get", [whole, streamed])
def test_choices_are_told_apart_and_each_has_its_finish_reason(client: openai.OpenAI, get: Any) -> None:
    answer = get(client, body(*TWO, n=2))
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (0, "abc", "stop"),
        (1, "ABC", "stop"),
    ]
    assert [choice.message.role for choice in answer.choices] == ["assistant", "assistant"]
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize("get", [whole, streamed])
def test_tool_calls_and_thoughts_stand_beside_the_content(client: openai.OpenAI, get: Any) -> None:
    [choice] = get(client, body(*CALLS, finish="tool_calls")).choices
    message = choice.message
    assert (choice.finish_reason, message.content) == ("tool_calls", "I look.")
    assert [(call.id, call.type, call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("call_1", "function", "weather", '{"city":"Rome"}'),
        ("call_2", "function", "time", "{}"),
    ]
    assert message.reasoning_content == message.reasoning == "Let me see."


def test_an_answer_of_nothing_but_calls_has_no_content(client: openai.OpenAI) -> None:
    [choice] = whole(client, body(Piece((1,), tool_calls=(TIME._replace(call=0),)), finish="tool_calls")).choices
    assert choice.message.content is None


@pytest.mark.parametrize("get", [whole, streamed])
def test_log_probabilities_have_openais_shape(client: openai.OpenAI, get: Any) -> None:
    [choice] = get(client, body(Piece((5, 6), "éx", logprobs=LOGPROBS), logprobs=True, top_logprobs=2)).choices
    assert choice.logprobs.model_dump(exclude_unset=True) == {
        "content": [
            {
                "token": "é",
                "logprob": -0.5,
                "bytes": [195, 169],
                "top_logprobs": [
                    {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                    {"token": "\ufffd", "logprob": -1.5, "bytes": None},
                ],
            },
            {"token": "x", "logprob": -9999.0, "bytes": [120], "top_logprobs": []},
        ],
        "refusal": None,
    }


def test_a_token_that_shows_nothing_yet_still_has_its_log_probability(client: openai.OpenAI) -> None:
    request = body(Piece((5,), logprobs=LOGPROBS[:1]), Piece((6,), "éx", logprobs=LOGPROBS[1:]), logprobs=True)
    [choice] = streamed(client, request).choices
    assert choice.logprobs is not None
    assert [one.token for one in choice.logprobs.content or []] == ["é", "x"]


def test_a_chunk_has_one_choice_and_says_one_thing_of_it(scripted_stack: Stack) -> None:
    """There are clients that look at choices[0] only, and some that look for content only where no thought is."""
    for request in (body(*TWO, n=2), body(*CALLS, finish="tool_calls")):
        for _, chunk in events(scripted_stack, request):
            [choice] = chunk["choices"]
            assert len({"content", "reasoning", "tool_calls"} & choice["delta"].keys()) <= 1
            assert len(choice["delta"].get("tool_calls", [0])) == 1


def events(stack: Stack, request: dict[str, Any]) -> list[tuple[int | None, dict[str, Any]]]:
    """(id, chunk) of a whole stream."""
    connection = Connection(stack.port)
    connection.send({**request, "stream": True})
    connection.head()
    return list(_chunks(connection))


def _chunks(connection: Connection) -> Iterator[tuple[int | None, dict[str, Any]]]:
    for block in connection.events():
        if block.startswith("data: {"):
            yield (connection.ids[-1] if connection.ids else None), json.loads(block.removeprefix("data: "))


@pytest.mark.parametrize("delay_ms", [0, 40])
@pytest.mark.parametrize(("steps", "fields"), [(TWO, {"n": 2}), (CALLS, {})])
def test_who_was_cut_off_behind_any_event_gets_exactly_the_rest(
    scripted_stack: Stack, steps: list[Any], fields: dict[str, Any], delay_ms: int
) -> None:
    """Without a delay all is in two entries or so of the log, with it in one a step."""
    connection = Connection(scripted_stack.port)
    connection.send(body(*steps, delay_ms=delay_ms, stream=True, **fields))
    _, head = connection.head()
    found = list(_chunks(connection))
    ids = [event_id for event_id, _ in found if event_id is not None]
    assert ids == sorted(set(ids)), "each id once"
    assert len(ids) > 4
    for at, (event_id, _) in enumerate(found):
        if event_id is not None:
            tail = resume(scripted_stack.port, head["x-job-id"], event_id)
            assert tail.head()[0] == 200
            assert list(_chunks(tail)) == found[at + 1 :]


def test_an_id_inside_of_an_entry_that_no_event_had_is_refused(scripted_stack: Stack) -> None:
    connection = Connection(scripted_stack.port)
    connection.send(body(Piece((1, 2, 3, 4), "a", reasoning="b"), stream=True))
    _, head = connection.head()
    list(connection.events())
    assert connection.ids[1:3] == [1, 4]
    for event_id, status in ((1, 200), (2, 400), (3, 400), (4, 200)):
        assert resume(scripted_stack.port, head["x-job-id"], event_id).head()[0] == status


def test_a_worker_that_dies_between_two_choices_is_not_noticed(stack: Stack) -> None:
    pieces = [[Piece((n,), f" a{n}"), Piece((n, n), f" b{n}", choice=1)] for n in range(60)]
    pieces.append([Piece((9,), choice=0, finish="stop"), Piece((9,), choice=1, finish="length")])
    first = stack.start_scripted_worker("script")
    connection = Connection(stack.port)
    connection.send(body(*pieces, n=2, delay_ms=20, stream=True))
    connection.head()
    texts, reasons = {0: "", 1: ""}, {}
    for event_id, chunk in _chunks(connection):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
            reasons[choice["index"]] = choice["finish_reason"]
        if event_id is not None and event_id > 30 and first.alive:
            first.kill()
            stack.start_scripted_worker("script")
    assert texts == {0: "".join(f" a{n}" for n in range(60)), 1: "".join(f" b{n}" for n in range(60))}
    assert reasons == {0: "stop", 1: "length"}


def test_the_same_request_with_a_key_gets_the_same_choices(scripted_stack: Stack) -> None:
    headers = {"idempotency-key": "two"}
    replies = [post(scripted_stack.port, body(*TWO, n=2), headers=headers).json() for _ in range(2)]
    assert replies[0] == replies[1]
    assert len(replies[0]["choices"]) == 2


TEXTS = st.text(max_size=2)
CALL = st.builds(ToolCallDelta, st.integers(0, 2), TEXTS, st.none() | st.just("id"), st.none() | st.just("f"))
PIECES = st.builds(
    Piece,
    ids=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    text=TEXTS,
    choice=st.integers(0, 2),
    reasoning=TEXTS,
    tool_calls=st.lists(CALL, max_size=2, unique_by=lambda call: call.call).map(tuple),
    logprobs=st.just(()),
    finish=st.none() | st.just("stop"),
    vector=st.just(""),
    units=st.integers(0, 3),
)


def said(chunk_list: Any) -> dict[int, list[Any]]:
    """All that chunks say of each choice, each field by itself."""
    found: dict[int, list[Any]] = {}
    for choices in chunk_list:
        for choice in choices:
            text, thought, calls, finish = found.setdefault(choice["index"], ["", "", [], None])
            delta = choice["delta"]
            found[choice["index"]] = [
                text + delta.get("content", ""),
                thought + delta.get("reasoning", ""),
                calls + delta.get("tool_calls", []),
                finish or choice["finish_reason"],
            ]
    return {index: one for index, one in found.items() if any(one)}


@given(st.lists(PIECES, min_size=1, max_size=4, unique_by=lambda piece: piece.choice))
def test_the_chunks_of_any_entry_say_all_of_it_under_ids_of_their_own(pieces: list[Piece]) -> None:
    k = sum(piece.k for piece in pieces)
    if k == 0:
        return  # no such entry: nothing would count it
    delta = Delta(10 + k, k, tuple(pieces))
    found = chunks(delta)
    ids = [chunk.n for chunk in found]
    assert ids == sorted(set(ids))
    assert all(10 < n <= delta.n for n in ids)
    everything = said(
        [choices for _, choices in chunks(Delta(1000, 1000, tuple(p._replace(units=99) for p in pieces)))]
    )
    assert said(chunk.choices for chunk in found) == everything
    for n in range(11, delta.n):
        assert is_inside(delta, n) == (n in ids and not delta.is_plain)


def test_role_chunks_but_the_last_have_no_id_so_that_who_lacks_one_begins_again() -> None:
    wire = ChunkWriter(View("JOB", "m", 0, "hi", n=3)).role()
    found = list(SSEDecoder().iter_bytes(iter([wire])))
    assert [event.id for event in found] == [None, None, "0"]
    assert [event.json()["choices"][0]["index"] for event in found] == [0, 1, 2]
