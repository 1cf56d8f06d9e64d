"""The forwarder to Anthropic's API: the real client against a server that speaks the wire format of the public docs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("anthropic")

from fastchat_q.workers.engines.base import UPSTREAM_BUSY
from fastchat_q.workers.engines.forwarding.anthropic import FEATURES, connect, request_body
from fastchat_q.workers.engines.forwarding.remote import Upstream

from fastchat_q.errors import ConfigurationError, InvalidRequestError, RetryableError
from fastchat_q.events import Piece, ToolCallDelta, Usage
from fastchat_q.jobs import Guide, Job, Message, Part, Sampling

from .driving import Driver, job
from .scripted import Asked, Reply, Scripted, scripted
from .test_openai_engine import CALL, KEY, PNG, TOOL, error_of, resumed

MODEL = {
    "type": "model",
    "id": "claude",
    "display_name": "Claude",
    "created_at": "2026-01-01T00:00:00Z",
    "lifecycle": "active",
    "max_input_tokens": 200_000,
    "max_tokens": 32_000,
}


def event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


START = event(
    "message_start",
    message={
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 1},
    },
)  # fmt: skip


def block(index: int, content: dict[str, Any], *deltas: dict[str, Any]) -> list[str]:
    begun = event("content_block_start", index=index, content_block=content)
    return [
        begun,
        *(event("content_block_delta", index=index, delta=delta) for delta in deltas),
        event("content_block_stop", index=index),
    ]


def text(index: int, *parts: str) -> list[str]:
    return block(index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": part} for part in parts))


def end(reason: str) -> list[str]:
    delta = {"stop_reason": reason, "stop_sequence": None}
    return [event("message_delta", delta=delta, usage={"output_tokens": 7}), event("message_stop")]


@contextmanager
def forwarding(reply: Reply) -> Iterator[tuple[Driver, Scripted]]:
    with scripted(lambda asked: Reply(MODEL) if asked.method == "GET" else reply) as server:
        engine = connect("c", 4, Upstream("claude", server.base, KEY))
        driver = Driver(engine)
        try:
            yield driver, server
        finally:
            engine.stop()


def test_thinking_text_and_tool_use_arrive_as_pieces() -> None:
    thought = block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "Hm."},
        {"type": "signature_delta", "signature": "EqQB"},
    )
    used = block(
        2,
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
        {"type": "input_json_delta", "partial_json": ""},
        {"type": "input_json_delta", "partial_json": '{"city":'},
        {"type": "input_json_delta", "partial_json": '"Oslo"}'},
    )
    events = [START, event("ping"), *thought, *text(1, "Let me ", "look."), *used, *end("tool_use")]
    with forwarding(Reply(events=events)) as (driver, server):
        (got,) = driver.run(job("j"))
    assert got.pieces == [
        Piece(reasoning="Hm.", units=1),
        Piece(text="Let me ", units=1),
        Piece(text="look.", units=1),
        Piece(tool_calls=(ToolCallDelta(0, "", "toolu_1", "weather"),), units=1),
        Piece(tool_calls=(ToolCallDelta(0, '{"city":'),), units=1),
        Piece(tool_calls=(ToolCallDelta(0, '"Oslo"}'),), units=1),
    ]
    assert (got.finish_reason, got.usage) == ("tool_calls", Usage(15, 7))
    assert KEY in (server.asked[-1].headers.get("authorization", "") + server.asked[-1].headers.get("x-api-key", ""))
    assert (server.asked[-1].path, server.bodies[0]["stream"]) == ("/v1/messages", True)


@pytest.mark.parametrize(
    ("reason", "ours"),
    [("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("refusal", "content_filter")],
)
def test_reasons_to_stop_have_openais_names(reason: str, ours: str) -> None:
    with forwarding(Reply(events=[START, *text(0, "Hi"), *end(reason)])) as (driver, _):
        assert driver.run(job("j"))[0].finish_reason == ours


def test_the_stop_string_that_ended_an_answer_is_told() -> None:
    ended = event(
        "message_delta", delta={"stop_reason": "stop_sequence", "stop_sequence": "END"}, usage={"output_tokens": 7}
    )
    with forwarding(Reply(events=[START, *text(0, "Hi"), ended, event("message_stop")])) as (driver, _):
        (got,) = driver.run(job("j"))
    assert got.ended is not None
    assert (got.finish_reason, got.ended.stop) == ("stop", "END")


def test_an_assistants_last_message_is_what_the_answer_goes_on_with() -> None:
    turns = (Message(role="user", content="Hi"), Message(role="assistant", content="Well"))
    one = Job(id="j", model="c", messages=turns, template_kwargs={"continue_final_message": True})
    body = request_body(one, "claude", 1000, {})
    assert body["messages"][-1] == {"role": "assistant", "content": [{"type": "text", "text": "Well"}]}
    assert set(body) == {"model", "max_tokens", "messages"}


def test_a_conversation_is_sent_as_the_api_wants_it() -> None:
    one = Job(
        id="j",
        model="c",
        messages=(
            Message(role="system", content="Be brief."),
            Message(role="user", content=(Part(type="text", text="Where?"), Part(type="image", blob="abc"))),
            Message(role="assistant", content="I look.", tool_calls=(CALL, {**CALL, "id": "c2"})),
            Message(role="tool", content="rain", tool_call_id="c1"),
            Message(role="tool", content="sun", tool_call_id="c2"),
            Message(role="user", content="So?"),
        ),
        sampling=Sampling(max_tokens=50, temperature=0.5, top_k=3, stop=("END",), seed=5),
        tools=(TOOL,),
        tool_choice="required",
        parallel_tool_calls=False,
        template_kwargs={"reasoning_effort": "low"},
    )
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgogcmVzdA=="}
    assert request_body(one, "claude", 1000, {"abc": PNG}) == {
        "model": "claude",
        "max_tokens": 50,
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Where?"}, {"type": "image", "source": source}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "c1", "name": "weather", "input": {}},
                    {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "rain"},
                    {"type": "tool_result", "tool_use_id": "c2", "content": "sun"},
                    {"type": "text", "text": "So?"},
                ],
            },
        ],
        "extra_body": {"temperature": 0.5, "top_k": 3},
        "extra_headers": {"anthropic-version": "2023-06-01"},
        "stop_sequences": ["END"],
        "tools": [{"name": "weather", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "adaptive", "display": "summarized"},
        "output_config": {"effort": "low"},
    }


def test_the_length_of_an_answer_is_the_models_where_the_job_sets_none() -> None:
    with forwarding(Reply(events=[START, *text(0, "Hi"), *end("end_turn")])) as (driver, server):
        driver.run(job("j", temperature=1.0))
        card = driver.engine.card
    assert (server.bodies[0]["max_tokens"], "temperature" in server.bodies[0]) == (32_000, False)
    assert server.asked[-1].headers["anthropic-version"] != "2023-06-01"
    assert (card.engine, card.context_length, card.features) == ("anthropic", 200_000, FEATURES)


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (Sampling(min_p=0.1), "min_p"),
        (Sampling(ignore_eos=True), "ignore_eos"),
        (Sampling(temperature=1.5), "temperature"),
        (Sampling(guide=Guide(kind="regex", value="a")), "response_format"),
        (Sampling(seed=5, seeded=True), "seed"),
    ],
)
def test_what_the_api_does_not_have_is_refused_by_name(sampling: Sampling, param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        request_body(job("j").model_copy(update={"sampling": sampling}), "claude", 10, {})
    assert raised.value.param == param


@pytest.mark.parametrize("arguments", [{"a": 1}, {"enable_thinking": "yes"}])
def test_arguments_that_no_template_takes_are_refused(arguments: dict[str, Any]) -> None:
    one = job("j").model_copy(update={"template_kwargs": arguments})
    with pytest.raises(InvalidRequestError, match=f"'{next(iter(arguments))}'") as raised:
        request_body(one, "claude", 10, {})
    assert raised.value.param == "chat_template_kwargs"


def test_the_least_effort_is_the_least_that_the_api_has() -> None:
    one = job("j").model_copy(update={"template_kwargs": {"reasoning_effort": "minimal"}})
    assert request_body(one, "claude", 10, {})["output_config"] == {"effort": "low"}


def test_a_schema_is_the_output_format() -> None:
    guide = Guide(kind="json_schema", value='{"type": "object"}')
    body = request_body(job("j").model_copy(update={"sampling": Sampling(guide=guide)}), "claude", 10, {})
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": {"type": "object"}}}


def failed(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}}


@pytest.mark.parametrize(
    ("status", "kind", "code", "retried"),
    [
        (400, "invalid_request_error", None, False),
        (401, "authentication_error", "upstream_refused", False),
        (404, "not_found_error", "upstream_refused", False),
        (429, "rate_limit_error", UPSTREAM_BUSY, True),
        (500, "api_error", "upstream_error", True),
        (529, "overloaded_error", UPSTREAM_BUSY, True),
    ],
)
def test_errors_mean_what_they_say(status: int, kind: str, code: str | None, retried: bool) -> None:
    with forwarding(Reply(failed(kind, "why"), status, {"retry-after": "3"})) as (driver, _):
        error = error_of(driver.run(job("j"))[0])
    assert (error.code, isinstance(error, RetryableError)) == (code, retried)
    if status == 400:
        assert (error.status, error.message) == (400, "why")


def test_an_error_within_a_stream_means_the_same() -> None:
    events = [START, *text(0, "Hi")[:2], event("error", error={"type": "overloaded_error", "message": "Overloaded"})]
    with forwarding(Reply(events=events)) as (driver, _):
        assert error_of(driver.run(job("j"))[0]).code == UPSTREAM_BUSY


def test_an_answer_without_its_end_is_tried_again() -> None:
    with forwarding(Reply(events=[START, *text(0, "Hi")])) as (driver, _):
        assert isinstance(error_of(driver.run(job("j"))[0]), RetryableError)


def test_temperature_is_sent_under_the_version_that_has_it() -> None:
    with forwarding(Reply(events=[START, *text(0, "Hi"), *end("end_turn")])) as (driver, server):
        driver.run(job("j", temperature=0.5))
    assert (server.bodies[0]["temperature"], server.asked[-1].headers["anthropic-version"]) == (0.5, "2023-06-01")


def test_an_older_model_goes_on_with_what_was_sent() -> None:
    with forwarding(Reply(events=[START, *text(0, " world"), *end("end_turn")])) as (driver, server):
        got = resumed(driver, job("j", temperature=1.0), Piece(text="Hello", units=1))
    assert (got.text, got.usage) == (" world", Usage(14, 8))
    assert server.bodies[0]["messages"][-1] == {"role": "assistant", "content": "Hello"}


def test_a_newer_model_makes_a_greedy_answer_again_and_cannot_resume_another_one() -> None:
    refused = Reply(failed("invalid_request_error", "This model does not support assistant message prefill."), 400)
    whole = Reply(events=[START, *text(0, "Hello world"), *end("end_turn")])

    def script(asked: Asked) -> Reply:
        if asked.method == "GET":
            return Reply(MODEL)
        return refused if asked.body["messages"][-1]["role"] == "assistant" else whole

    with scripted(script) as server:
        driver = Driver(connect("c", 4, Upstream("claude", server.base, KEY)))
        assert resumed(driver, job("j", temperature=0), Piece(text="Hello", units=1)).text == " world"
        got = resumed(driver, job("k", temperature=1.0), Piece(text="Hello", units=1))
        driver.engine.stop()
    assert error_of(got).code == "cannot_resume"
    assert len(server.bodies) == 3


def test_a_cancelled_request_hangs_up_at_once() -> None:
    with forwarding(Reply(events=[START, *text(0, "Hi")], hold=True)) as (driver, server):
        driver.submit(job("j"))
        driver.wait_text("j", "Hi")
        driver.engine.cancel("j")
        assert server.hung_up.wait(5)


def test_a_missing_or_refused_key_is_told_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match="ANTHROPIC_API_KEY"):
        connect("c", 1, Upstream("claude", None, None))

    def refusing(_: Asked) -> Reply:
        return Reply(failed("authentication_error", "invalid x-api-key"), 401)

    with scripted(refusing) as server, pytest.raises(ConfigurationError, match="refuses the key"):
        connect("c", 1, Upstream("claude", server.base, KEY))
