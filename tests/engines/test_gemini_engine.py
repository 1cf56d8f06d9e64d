"""The forwarder to Gemini's API: the real client against a server that speaks the wire format of the public docs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("google.genai")

from fastchat_q.workers.engines.base import UPSTREAM_BUSY
from fastchat_q.workers.engines.forwarding.gemini import FEATURES, config, connect, contents
from fastchat_q.workers.engines.forwarding.remote import Upstream

from fastchat_q.errors import ConfigurationError, InvalidRequestError, RetryableError
from fastchat_q.events import Piece, ToolCallDelta, Usage
from fastchat_q.jobs import Guide, Job, Message, Part, Sampling

from .driving import Driver, job
from .scripted import Reply, Scripted, scripted
from .test_openai_engine import CALL, KEY, PNG, TOOL, error_of, resumed

MODEL = {"name": "models/gemini", "inputTokenLimit": 1_000_000, "outputTokenLimit": 65_536}
COUNTS = {"promptTokenCount": 4, "candidatesTokenCount": 3, "thoughtsTokenCount": 2, "totalTokenCount": 9}


def chunk(*parts: dict[str, Any], reason: str | None = None, index: int = 0, **fields: Any) -> str:
    candidate: dict[str, Any] = {"index": index, "content": {"role": "model", "parts": list(parts)}}
    if reason:
        candidate["finishReason"] = reason
    return f"data: {json.dumps({'candidates': [candidate], 'usageMetadata': COUNTS, **fields})}\r\n\r\n"


@contextmanager
def forwarding(reply: Reply) -> Iterator[tuple[Driver, Scripted]]:
    with scripted(lambda asked: Reply(MODEL) if asked.method == "GET" else reply) as server:
        engine = connect("g", 4, Upstream("gemini", server.base, KEY))
        driver = Driver(engine)
        try:
            yield driver, server
        finally:
            engine.stop()


def test_thoughts_text_and_calls_arrive_as_pieces() -> None:
    events = [
        chunk({"text": "Hm.", "thought": True}),
        chunk({"text": "Let me look."}),
        chunk({"functionCall": {"name": "weather", "args": {"city": "Oslo"}}}, reason="STOP"),
    ]
    with forwarding(Reply(events=events)) as (driver, server):
        (got,) = driver.run(job("j"))
    assert got.pieces == [
        Piece(reasoning="Hm.", units=1),
        Piece(text="Let me look.", units=1),
        Piece(tool_calls=(ToolCallDelta(0, '{"city":"Oslo"}', "call_0_0", "weather"),), units=1),
    ]
    assert (got.finish_reason, got.usage) == ("tool_calls", Usage(4, 5))
    assert server.asked[-1].headers["x-goog-api-key"] == KEY
    assert "gemini:streamGenerateContent" in server.asked[-1].path


@pytest.mark.parametrize(("reason", "ours"), [("STOP", "stop"), ("MAX_TOKENS", "length"), ("SAFETY", "content_filter")])
def test_reasons_to_stop_have_openais_names(reason: str, ours: str) -> None:
    with forwarding(Reply(events=[chunk({"text": "Hi"}, reason=reason)])) as (driver, _):
        assert driver.run(job("j"))[0].finish_reason == ours


def test_several_answers_keep_apart() -> None:
    events = [chunk({"text": "a"}, reason="STOP"), chunk({"text": "b"}, index=1, reason="STOP")]
    with forwarding(Reply(events=events)) as (driver, server):
        (got,) = driver.run(job("j").model_copy(update={"sampling": Sampling(n=2)}))
    assert [(piece.choice, piece.text, piece.finish) for piece in got.pieces] == [(0, "a", "stop"), (1, "b", "stop")]
    assert server.bodies[0]["generationConfig"]["candidateCount"] == 2


def test_a_job_is_sent_as_the_api_wants_it() -> None:
    one = Job(
        id="j",
        model="g",
        messages=(
            Message(role="system", content="Be brief."),
            Message(role="user", content=(Part(type="text", text="Where?"), Part(type="image", blob="abc"))),
            Message(role="assistant", tool_calls=(CALL,)),
            Message(role="tool", content="rain", tool_call_id="c1"),
        ),
        sampling=Sampling(
            max_tokens=50, temperature=0.5, top_k=3, stop=("END",), seed=5, presence_penalty=0.5, logprobs=2,
            guide=Guide(kind="json_schema", value='{"type": "object"}'),
        ),
        tools=(TOOL,),
        tool_choice="function:weather",
        template_kwargs={"reasoning_effort": "low"},
    )  # fmt: skip
    sent = config(one).model_dump(exclude_none=True)
    assert sent["system_instruction"] == "Be brief."
    assert (sent["max_output_tokens"], sent["temperature"], sent["top_k"], sent["seed"]) == (50, 0.5, 3, 5)
    assert (sent["stop_sequences"], sent["presence_penalty"], sent["logprobs"]) == (["END"], 0.5, 2)
    assert (sent["response_mime_type"], sent["response_json_schema"]) == ("application/json", {"type": "object"})
    calling = sent["tool_config"]["function_calling_config"]
    assert (calling["mode"], calling["allowed_function_names"]) == ("ANY", ["weather"])
    assert sent["tools"][0]["function_declarations"][0]["name"] == "weather"
    assert sent["thinking_config"] == {"include_thoughts": True, "thinking_budget": 1024}
    user, model, result = contents(one.messages, {"abc": PNG})
    assert user.parts is not None
    assert user.parts[1].inline_data is not None
    assert (user.parts[1].inline_data.mime_type, user.parts[1].inline_data.data) == ("image/png", PNG)
    assert model.role == "model"
    assert result.parts is not None
    response = result.parts[0].function_response
    assert response is not None
    assert (response.name, response.response) == ("weather", {"result": "rain"})


@pytest.mark.parametrize(
    ("sampling", "param"),
    [(Sampling(min_p=0.1), "min_p"), (Sampling(logit_bias={1: 2.0}), "logit_bias"),
     (Sampling(guide=Guide(kind="grammar", value="a")), "response_format")],
)  # fmt: skip
def test_what_the_api_does_not_have_is_refused_by_name(sampling: Sampling, param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        config(job("j").model_copy(update={"sampling": sampling}))
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": (TOOL,), "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"template_kwargs": {"reasoning_effort": "xhigh"}}, "reasoning_effort"),
        ({"template_kwargs": {"reasoning_effort": "max"}}, "reasoning_effort"),
        ({"template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs"),
    ],
)
def test_so_are_calls_one_at_a_time_and_thinking_that_it_does_not_know(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        config(job("j").model_copy(update=fields))
    assert raised.value.param == param


def failed(status: int, name: str, message: str) -> Reply:
    body = {"error": {"code": status, "message": message, "status": name}}
    return Reply(body, status, {"retry-after": "3"})


@pytest.mark.parametrize(
    ("reply", "code", "retried"),
    [
        (failed(400, "INVALID_ARGUMENT", "why"), "INVALID_ARGUMENT", False),
        (failed(400, "INVALID_ARGUMENT", "API key not valid."), "upstream_refused", False),
        (failed(403, "PERMISSION_DENIED", "no"), "upstream_refused", False),
        (failed(429, "RESOURCE_EXHAUSTED", "later"), UPSTREAM_BUSY, True),
        (failed(503, "UNAVAILABLE", "overloaded"), UPSTREAM_BUSY, True),
        (failed(500, "INTERNAL", "oops"), "upstream_error", True),
    ],
)
def test_errors_mean_what_they_say(reply: Reply, code: str, retried: bool) -> None:
    with forwarding(reply) as (driver, _):
        error = error_of(driver.run(job("j"))[0])
    assert (error.code, isinstance(error, RetryableError)) == (code, retried)


def test_a_blocked_prompt_is_the_clients_to_change() -> None:
    blocked = f"data: {json.dumps({'promptFeedback': {'blockReason': 'SAFETY'}, 'usageMetadata': COUNTS})}\r\n\r\n"
    with forwarding(Reply(events=[blocked])) as (driver, _):
        error = error_of(driver.run(job("j"))[0])
    assert (error.status, error.code) == (400, "content_filter")


def test_an_answer_without_its_end_is_tried_again() -> None:
    with forwarding(Reply(events=[chunk({"text": "Hi"})], cut=True)) as (driver, _):
        assert isinstance(error_of(driver.run(job("j"))[0]), RetryableError)


def test_an_answer_is_made_again_and_what_was_sent_is_skipped() -> None:
    with forwarding(Reply(events=[chunk({"text": "Hello world"}, reason="STOP")])) as (driver, _):
        assert resumed(driver, job("j"), Piece(text="Hello", units=1)).text == " world"
        assert error_of(resumed(driver, job("k"), Piece(text="Bye", units=1))).code == "cannot_resume"


def test_a_cancelled_request_hangs_up_at_once() -> None:
    with forwarding(Reply(events=[chunk({"text": "Hi"})], hold=True)) as (driver, server):
        driver.submit(job("j"))
        driver.wait_text("j", "Hi")
        driver.engine.cancel("j")
        assert server.hung_up.wait(5)


def test_the_card_tells_the_context_and_the_key_is_checked_at_the_start() -> None:
    with forwarding(Reply()) as (driver, _):
        card = driver.engine.card
        assert (card.engine, card.context_length, card.features) == ("gemini", 1_000_000, FEATURES)
    with pytest.raises(ConfigurationError, match="GEMINI_API_KEY"):
        connect("g", 1, Upstream("gemini", None, None))
    with (
        scripted(lambda _: failed(400, "INVALID_ARGUMENT", "API key not valid.")) as server,
        pytest.raises(ConfigurationError, match="refuses the key"),
    ):
        connect("g", 1, Upstream("gemini", server.base, KEY))
