"""The forwarder to OpenAI-compatible servers at its own edges: what is sent, what is read, what an error means.

Against a real stack: ``tests/test_forwarding.py``.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastchat_q.workers.engines.base import UPSTREAM_BUSY, Request
from fastchat_q.workers.engines.forwarding.dialects import DIALECTS, PLAIN
from fastchat_q.workers.engines.forwarding.openai import connect
from fastchat_q.workers.engines.forwarding.openai_request import request_body
from fastchat_q.workers.engines.forwarding.remote import Trouble, Upstream, job_error, retry_after_s

from fastchat_q.errors import ConfigurationError, InvalidRequestError, RetryableError
from fastchat_q.events import Piece, ToolCallDelta, Usage
from fastchat_q.jobs import Guide, Job, Message, Part, Sampling
from tests.servers import free_port, wait_until

from .driving import Answer, Driver, job
from .scripted import Asked, Reply, Scripted, scripted

KEY = "sk-very-secret"
PNG = b"\x89PNG\r\n\x1a\n rest"
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def models(*entries: dict[str, Any], owner: str = "someone") -> Reply:
    listed = entries or ({"id": "m"},)
    return Reply(
        {"object": "list", "data": [{"object": "model", "created": 1, "owned_by": owner, **one} for one in listed]}
    )


def chunk(choice: dict[str, Any] | None = None, **fields: Any) -> str:
    choices = [] if choice is None else [{"index": 0, "finish_reason": None, "delta": {}, **choice}]
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **fields}
    return f"data: {json.dumps(body)}\n\n"


def says(text: str, **choice: Any) -> str:
    return chunk({"delta": {"content": text}, **choice})


def stops(reason: str = "stop", **choice: Any) -> str:
    return chunk({"finish_reason": reason, **choice})


USAGE = chunk(usage={"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8})
DONE = "data: [DONE]\n\n"


def answer(*events: str) -> Reply:
    return Reply(events=[*events, USAGE, DONE])


@contextmanager
def forwarding(*replies: Reply, owner: str = "someone") -> Iterator[tuple[Driver, Scripted]]:
    """An engine before a server that gives these replies, one a request, the last one over and over."""
    left = list(replies)

    def script(asked: Asked) -> Reply:
        if asked.method == "GET":
            return models(owner=owner)
        return left.pop(0) if len(left) > 1 else left[0]

    with scripted(script) as server:
        engine = connect("m", 4, Upstream("m", f"{server.base}/v1", KEY))
        driver = Driver(engine)
        try:
            yield driver, server
        finally:
            engine.stop()


def with_sampling(**fields: Any) -> Job:
    return job("j").model_copy(update={"sampling": Sampling(**fields)})


def resumed(driver: Driver, one: Job, *prior: Piece) -> Answer:
    driver.take(Request(one, one.id, prior))
    return driver.wait(one.id)[0]


def error_of(answered: Answer) -> Any:
    assert answered.ended is not None
    return answered.ended.error


FULL = Job(
    id="j",
    model="m",
    messages=(
        Message(role="system", content="Be brief."),
        Message(role="user", content=(Part(type="text", text="What is this?"), Part(type="image", blob="abc"))),
        Message(role="assistant", tool_calls=(CALL,)),
        Message(role="tool", content="rain", tool_call_id="c1"),
    ),
    sampling=Sampling(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=0.5,
        frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias={7: -100.0}, seed=3, stop=("END",),
        stop_token_ids=(2,), ignore_eos=True, n=2, logprobs=4,
        guide=Guide(kind="json_schema", value='{"type": "object"}'),
    ),
    tools=(TOOL,),
    tool_choice="function:weather",
    parallel_tool_calls=False,
    template_kwargs={"enable_thinking": False, "reasoning_effort": "low"},
)  # fmt: skip


def test_all_that_a_job_says_is_sent() -> None:
    assert request_body(FULL, "theirs", DIALECTS["fastchat-q"], {"abc": PNG}) == {
        "model": "theirs",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgogcmVzdA=="}},
                ],
            },
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"7": -100.0},
        "seed": 3,
        "stop": ["END"],
        "stop_token_ids": [2],
        "ignore_eos": True,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 4,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
        },
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
    }


def test_what_a_job_does_not_set_is_not_sent() -> None:
    body = request_body(job("j"), "m", PLAIN, {})
    assert set(body) == {"model", "messages", "stream", "stream_options", "temperature", "top_p", "seed"}


@pytest.mark.parametrize(
    ("dialect", "guide", "field"),
    [
        ("vllm", Guide(kind="json_object"), {"response_format": {"type": "json_object"}}),
        ("vllm", Guide(kind="regex", value="a+"), {"structured_outputs": {"regex": "a+"}}),
        ("vllm", Guide(kind="choice", value='["a", "b"]'), {"structured_outputs": {"choice": ["a", "b"]}}),
        ("vllm", Guide(kind="grammar", value="start: 'a'"), {"structured_outputs": {"grammar": "start: 'a'"}}),
        ("sglang", Guide(kind="regex", value="a+"), {"regex": "a+"}),
        ("sglang", Guide(kind="choice", value='["a.", "b"]'), {"regex": r"(a\.|b)"}),
        ("llamacpp", Guide(kind="json_object"), {"response_format": {"type": "json_object"}}),
    ],
)
def test_guides_that_openai_cannot_say_are_said_as_the_server_does(
    dialect: str, guide: Guide, field: dict[str, Any]
) -> None:
    body = request_body(with_sampling(guide=guide), "m", DIALECTS[dialect], {})
    assert field.items() <= body.items()


@pytest.mark.parametrize(
    ("dialect", "fields", "param"),
    [
        ("llamacpp", {"guide": Guide(kind="regex", value="a")}, "structured_outputs"),
        ("llamacpp", {"min_tokens": 2}, "min_tokens"),
        ("llamacpp", {"stop_token_ids": (2,)}, "stop_token_ids"),
        ("sglang", {"guide": Guide(kind="grammar", value="a")}, "structured_outputs"),
        ("ollama", {"top_k": 5}, "top_k"),
        ("ollama", {"logit_bias": {1: 1.0}}, "logit_bias"),
        ("ollama", {"n": 2}, "n"),
        ("ollama", {"repetition_penalty": 1.1}, "repetition_penalty"),
        ("openai", {"top_k": 5}, "top_k"),
        ("openai", {"ignore_eos": True}, "ignore_eos"),
        ("plain", {"min_p": 0.5}, "min_p"),
        ("plain", {"guide": Guide(kind="choice", value='["a"]')}, "structured_outputs"),
    ],
)
def test_what_a_kind_of_server_would_ignore_is_refused_by_name(
    dialect: str, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        request_body(with_sampling(**fields), "m", DIALECTS.get(dialect, PLAIN), {})
    assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("dialect", "fields", "param"),
    [
        ("ollama", {"tools": (TOOL,), "tool_choice": "required"}, "tool_choice"),
        ("ollama", {"tools": (TOOL,), "parallel_tool_calls": False}, "parallel_tool_calls"),
        ("openai", {"template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ("plain", {"template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ],
)
def test_so_are_tools_and_template_arguments(dialect: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        request_body(job("j").model_copy(update=fields), "m", DIALECTS.get(dialect, PLAIN), {})
    assert refused.value.param == param


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp", "openai"])
def test_an_assistants_last_message_is_gone_on_with_where_the_server_does(dialect: Any) -> None:
    turns = (Message(role="user", content="Hi"), Message(role="assistant", content="Well"))
    one = Job(id="j", model="m", messages=turns, template_kwargs={"continue_final_message": True})
    known = DIALECTS[dialect]
    if known.go_on is None:
        with pytest.raises(InvalidRequestError, match="does not go on"):
            request_body(one, "m", known, {})
        return
    body = request_body(one, "m", known, {})
    assert known.go_on.items() <= body.items()
    assert "chat_template_kwargs" not in body


@pytest.mark.parametrize(
    ("choice", "stop"), [({"stop_reason": "END"}, "END"), ({"stop_reason": 7}, None), ({"matched_stop": "END"}, "END")]
)
def test_the_stop_string_that_ended_an_answer_is_told(choice: dict[str, Any], stop: str | None) -> None:
    with forwarding(answer(says("Hi"), stops(**choice))) as (driver, _):
        (got,) = driver.run(job("j"))
    assert got.ended is not None
    assert got.ended.stop == stop


@pytest.mark.parametrize(
    ("owner", "has", "lacks"),
    [
        ("vllm", {"sampling", "n", "structured_outputs", "vision"}, set()),
        ("llamacpp", {"sampling", "structured_outputs", "tools"}, set()),
        ("library", {"structured_outputs", "tools", "penalties"}, {"sampling", "n", "logprobs"}),
        ("system", {"n", "logprobs", "tools", "reasoning", "penalties"}, {"sampling"}),
        ("someone", {"n", "logprobs", "tools", "reasoning", "penalties"}, {"sampling"}),
        ("fastchat-q", {"sampling", "n"}, set()),
    ],
)
def test_a_card_claims_what_its_kind_of_server_honours(owner: str, has: set[str], lacks: set[str]) -> None:
    with forwarding(answer(), owner=owner) as (driver, _):
        features = set(driver.engine.card.features)
    assert features >= has
    assert not features & lacks


def test_what_would_be_ignored_never_reaches_the_server() -> None:
    with forwarding(answer(says("unconstrained"), stops()), owner="llamacpp") as (driver, server):
        (got,) = driver.run(with_sampling(guide=Guide(kind="regex", value="[0-9]+")))
        assert (error_of(got).status, error_of(got).param) == (400, "structured_outputs")
        assert "llama.cpp" in error_of(got).message
    assert not server.bodies


def test_a_server_that_is_told_by_its_operator_is_of_that_kind() -> None:
    with scripted(lambda _: models(owner="a-proxy")) as server:
        engine = connect("m", 1, Upstream("m", f"{server.base}/v1", KEY, "vllm"))
    assert "sampling" in engine.card.features
    assert engine.dialect == DIALECTS["vllm"]


def test_a_function_by_name_is_the_only_one_for_a_server_that_knows_no_names() -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
    one = job("j").model_copy(update={"tools": (TOOL, other), "tool_choice": "function:weather"})
    body = request_body(one, "m", DIALECTS["llamacpp"], {})
    assert (body["tools"], body["tool_choice"]) == ([TOOL], "required")


def test_effort_goes_where_a_server_takes_it_and_nothing_beside_it() -> None:
    one = job("j").model_copy(update={"template_kwargs": {"reasoning_effort": "low"}})
    for dialect in (DIALECTS["openai"], DIALECTS["vllm"], DIALECTS["ollama"], PLAIN):
        body = request_body(one, "m", dialect, {})
        assert body["reasoning_effort"] == "low"
        assert "chat_template_kwargs" not in body
    body = request_body(one, "m", DIALECTS["llamacpp"], {})
    assert "reasoning_effort" not in body
    assert body["chat_template_kwargs"] == {"reasoning_effort": "low", "enable_thinking": True}


def test_defaults_of_the_reference_are_said_to_servers_that_have_their_own() -> None:
    ours = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    for dialect in ("vllm", "sglang"):
        assert ours.items() <= request_body(with_sampling(), "m", DIALECTS[dialect], {}).items()
        assert request_body(with_sampling(top_k=7), "m", DIALECTS[dialect], {})["top_k"] == 7
    llama = request_body(with_sampling(), "m", DIALECTS["llamacpp"], {})
    assert (llama["top_k"], llama["min_p"], llama["repeat_penalty"]) == (0, 0.0, 1.0)


def test_a_least_length_that_is_reached_is_not_asked_for_again() -> None:
    one = with_sampling(min_tokens=5, max_tokens=9)
    assert request_body(one, "m", DIALECTS["vllm"], {}, "abc", 3)["min_tokens"] == 2
    assert "min_tokens" not in request_body(one, "m", DIALECTS["vllm"], {}, "abcdef", 6)


def test_servers_that_call_a_field_otherwise_get_their_own_name() -> None:
    one = job("j", max_tokens=4).model_copy(
        update={"sampling": Sampling(max_tokens=4, repetition_penalty=1.2, seed=-1)}
    )
    llama = request_body(one, "m", DIALECTS["llamacpp"], {})
    assert (llama["repeat_penalty"], llama["top_k"], llama["min_p"], llama["seed"]) == (1.2, 0, 0.0, 2**31 - 1)
    assert request_body(with_sampling(max_tokens=4), "m", DIALECTS["openai"], {})["max_completion_tokens"] == 4


def test_text_reasoning_and_calls_arrive_as_pieces() -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": ""}}
    events = [
        chunk({"delta": {"role": "assistant", "content": ""}}),
        chunk({"delta": {"reasoning_content": "Hm"}}),
        chunk({"delta": {"reasoning": "."}}),
        says("Hi"),
        chunk({"delta": {"tool_calls": [call]}}),
        chunk({"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}}),
        stops("tool_calls"),
    ]
    with forwarding(answer(*events)) as (driver, server):
        (got,) = driver.run(job("j"))
    assert got.pieces == [
        Piece(reasoning="Hm", units=1),
        Piece(reasoning=".", units=1),
        Piece(text="Hi", units=1),
        Piece(tool_calls=(ToolCallDelta(0, "", "c1", "weather"),), units=1),
        Piece(tool_calls=(ToolCallDelta(0, "{}"),), units=1),
    ]
    assert (got.finish_reason, got.usage) == ("tool_calls", Usage(5, 3))
    assert server.asked[-1].headers["authorization"] == f"Bearer {KEY}"


def test_several_answers_keep_apart_and_each_has_its_end() -> None:
    events = [says("a", index=0), says("b", index=1), stops(index=1), says("c", index=0), stops("length", index=0)]
    one = job("j").model_copy(update={"sampling": Sampling(n=2)})
    with forwarding(answer(*events)) as (driver, _):
        (got,) = driver.run(one)
    assert [(piece.choice, piece.text, piece.finish) for piece in got.pieces] == [
        (0, "a", None), (1, "b", None), (1, "", "stop"), (0, "c", None), (0, "", "length")
    ]  # fmt: skip


def test_log_probabilities_arrive() -> None:
    top = [{"token": "a", "logprob": -0.1, "bytes": [97]}, {"token": "b", "logprob": -2.0, "bytes": [98]}]
    with forwarding(answer(says("a", logprobs={"content": [{**top[0], "top_logprobs": top}]}), stops())) as (driver, _):
        (got,) = driver.run(job("j"))
    (one,) = got.pieces[0].logprobs
    assert (one.token, one.logprob, [other.token for other in one.top]) == ("a", -0.1, ["a", "b"])


def test_a_cancelled_request_hangs_up_at_once() -> None:
    with forwarding(Reply(events=[says("Hi")], hold=True)) as (driver, server):
        driver.submit(job("j"))
        driver.wait_text("j", "Hi")
        driver.engine.cancel("j")
        assert server.hung_up.wait(5)


def test_a_stopped_engine_hangs_up() -> None:
    with forwarding(Reply(events=[says("Hi")], hold=True)) as (driver, server):
        driver.submit(job("j"))
        driver.wait_text("j", "Hi")
        driver.engine.stop()
        assert server.hung_up.wait(5)


@pytest.mark.parametrize("how", [{"cut": True}, {}])
def test_an_answer_without_its_end_is_tried_again(how: dict[str, bool]) -> None:
    with forwarding(Reply(events=[says("Hi")], **how)) as (driver, _):
        (got,) = driver.run(job("j"))
    assert isinstance(error_of(got), RetryableError)


def counted(text: str, tokens: int) -> str:
    """A chunk that says how many tokens there are by now, as vLLM's do."""
    return chunk({"delta": {"content": text}}, usage={"prompt_tokens": 8, "completion_tokens": tokens})


def test_a_server_that_goes_on_with_a_text_is_asked_to_and_all_tokens_are_counted() -> None:
    events = [counted(" wor", 2), counted("ld", 3), stops(), DONE]
    with forwarding(Reply(events=events), owner="vllm") as (driver, server):
        got = resumed(driver, job("j", max_tokens=9), Piece(text="Hello", units=3))
    body = server.bodies[0]
    assert body["messages"][-1] == {"role": "assistant", "content": "Hello"}
    assert (body["continue_final_message"], body["add_generation_prompt"], body["max_tokens"]) == (True, False, 6)
    assert got.pieces == [Piece(text=" wor", units=2), Piece(text="ld", units=1)]
    assert got.usage == Usage(5, 6)


def test_a_space_at_the_end_of_what_was_sent_has_to_come_again() -> None:
    events = [counted(" wor", 2), counted("ld", 3), stops(), DONE]
    without = Reply(events=[counted("ld", 1), stops(), DONE])
    with forwarding(Reply(events=events), without, owner="vllm") as (driver, server):
        got = resumed(driver, job("j"), Piece(text="Hello ", units=3))
        assert (got.text, server.bodies[0]["messages"][-1]["content"]) == ("world", "Hello")
        got = resumed(driver, job("k"), Piece(text="Hello ", units=3))
        assert error_of(got).code == "cannot_resume"


def test_other_servers_are_asked_anew_and_what_was_sent_is_skipped() -> None:
    with forwarding(answer(says("Hello"), says(" world"), stops())) as (driver, server):
        got = resumed(driver, job("j"), Piece(text="Hello wo", units=2))
    assert (got.text, got.usage) == ("rld", Usage(5, 3))
    assert len(server.bodies[0]["messages"]) == 1


@pytest.mark.parametrize("sampling", [Sampling(n=2), Sampling(logprobs=1), Sampling(guide=Guide(kind="json_object"))])
def test_what_a_text_alone_does_not_say_is_not_gone_on_with(sampling: Sampling) -> None:
    events = [says("ab"), stops(), says("c", index=1), stops(index=1)]
    with forwarding(answer(*events), owner="vllm") as (driver, server):
        resumed(driver, job("j").model_copy(update={"sampling": sampling}), Piece(text="a", units=1))
    assert "continue_final_message" not in server.bodies[0]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(status: int) -> None:
    busy = Reply({"error": {"message": "later"}}, status, {"retry-after": "7"})
    with forwarding(busy) as (driver, _):
        (got,) = driver.run(job("j"))
        error = error_of(got)
        assert "a pause of 7 s" in driver.engine.trouble
    assert (error.code, error.counts) == (UPSTREAM_BUSY, False)
    assert 7 <= error.retry_after_s <= 9


def test_a_server_that_is_away_is_looked_for_until_it_is_back() -> None:
    port = free_port()
    engine = connect("m", 1, Upstream("m", f"http://127.0.0.1:{port}/v1", None))
    driver = Driver(engine)
    (got,) = driver.run(job("j"))
    assert (error_of(got).code, error_of(got).counts) == ("upstream_away", False)
    assert "cannot be reached" in engine.trouble
    with scripted(lambda asked: models() if asked.method == "GET" else answer(says("Hi"), stops()), port):
        wait_until(lambda: not engine.trouble, "it is found again")
        assert driver.run(job("k"))[0].text == "Hi"
        engine.stop()


def test_a_server_that_was_away_at_the_start_tells_its_kind_before_it_gets_a_job() -> None:
    port = free_port()
    engine = connect("m", 1, Upstream("m", f"http://127.0.0.1:{port}/v1", None))
    driver = Driver(engine)
    wait_until(lambda: "cannot be reached" in engine.trouble, "it takes no jobs")
    assert "sampling" in engine.card.features, "nobody knows yet: the worker refuses"
    script = lambda asked: models(owner="vllm") if asked.method == "GET" else answer(says("Hi"), stops())  # noqa: E731
    with scripted(script, port):
        wait_until(lambda: not engine.trouble, "it is found")
        assert engine.dialect == DIALECTS["vllm"]
        assert driver.run(with_sampling(min_tokens=1))[0].text == "Hi"
        engine.stop()


def test_a_request_that_upstream_refuses_is_refused_in_its_words() -> None:
    body = {"error": {"message": "top_k is too large", "type": "invalid_request_error", "param": "top_k", "code": None}}
    with forwarding(Reply(body, 400)) as (driver, _):
        (got,) = driver.run(job("j"))
    error = error_of(got)
    assert isinstance(error, InvalidRequestError)
    assert (error.status, error.message, error.param) == (400, "top_k is too large", "top_k")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_operator_got_wrong_is_no_fault_of_the_client_and_tells_no_secret(status: int) -> None:
    body = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}
    with forwarding(Reply(body, status)) as (driver, _):
        (got,) = driver.run(job("j"))
    error = error_of(got)
    assert (error.status, error.code, KEY in error.message) == (502, "upstream_refused", False)
    assert not isinstance(error, RetryableError)


@pytest.mark.parametrize(
    ("event", "code", "retried"),
    [
        ({"message": "no", "type": "BadRequestError", "code": 400}, None, False),
        ({"message": "slow down", "type": "rate_limit_error", "code": None}, UPSTREAM_BUSY, True),
        ({"message": "it broke", "type": "server_error", "code": "engine_error"}, "upstream_error", True),
    ],
)
def test_an_error_within_a_stream_means_what_it_says(event: dict[str, Any], code: str | None, retried: bool) -> None:
    with forwarding(Reply(events=[says("Hi"), f"data: {json.dumps({'error': event})}\n\n"])) as (driver, _):
        (got,) = driver.run(job("j"))
    assert (error_of(got).code, isinstance(error_of(got), RetryableError)) == (code, retried)


def test_a_quota_that_is_used_up_is_no_reason_to_wait() -> None:
    error = job_error(Trouble(429, "You exceeded your current quota", code="insufficient_quota"))
    assert (error.status, isinstance(error, RetryableError)) == (502, False)


def test_a_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_s({"retry-after": "3"}) == 3
    assert retry_after_s({}) is None
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after_s({"retry-after": "soon"}) is None


def test_a_card_tells_the_context_that_upstream_tells() -> None:
    with scripted(lambda _: models({"id": "m", "max_model_len": 4096})) as server:
        assert connect("mine", 1, Upstream("m", f"{server.base}/v1", None)).card.context_length == 4096


def test_a_key_that_is_refused_is_told_at_the_start() -> None:
    with (
        scripted(lambda _: Reply({"error": {"message": f"bad {KEY}"}}, 401)) as server,
        pytest.raises(ConfigurationError, match="refuses the key") as raised,
    ):
        connect("mine", 1, Upstream("m", f"{server.base}/v1", KEY))
    assert KEY not in str(raised.value)


# ---- completions and tokens


def prompts(*given: str | tuple[int, ...], **fields: Any) -> Job:
    how = Sampling(temperature=0, max_tokens=4, logprobs=fields.pop("logprobs", None))
    return Job(id="j", model="m", kind="completion", inputs=given, sampling=how, **fields)


def text_chunk(index: int, text: str, finish: str | None = None, logprobs: Any = None) -> str:
    choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
    body = {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n"


def test_a_completion_goes_to_the_endpoint_of_old_with_all_its_prompts() -> None:
    reply = answer(text_chunk(0, "one"), text_chunk(1, "two", "length"), text_chunk(0, " more", "stop"))
    with forwarding(reply, owner="vllm") as (driver, server):
        [got] = driver.run(prompts("a", "b", special_tokens=False))
        asked = server.asked[-1]
    assert asked.path.endswith("/v1/completions")
    assert (asked.body["prompt"], asked.body["add_special_tokens"]) == (["a", "b"], False)
    assert "messages" not in asked.body
    texts = ["".join(piece.text for piece in got.pieces if piece.choice == index) for index in (0, 1)]
    assert texts == ["one more", "two"]
    assert [(piece.choice, piece.finish) for piece in got.pieces if piece.finish] == [(1, "length"), (0, "stop")]
    assert got.usage == Usage(5, 3)


def test_a_prompt_that_is_told_back_is_known_as_such() -> None:
    found = {"tokens": ["a", "b"], "token_logprobs": [None, -1.5], "top_logprobs": [None, {"b": -1.5, "c": -0.5}]}
    with forwarding(answer(text_chunk(0, "ab", None, found), text_chunk(0, "c", "stop")), owner="vllm") as (driver, _):
        [got] = driver.run(prompts((1, 2), echo=True, logprobs=1))
    assert [(piece.text, piece.echo) for piece in got.pieces] == [("ab", True), ("c", False)]
    assert [(one.token, one.logprob) for one in got.pieces[0].logprobs] == [("a", 0.0), ("b", -1.5)]
    assert {other.token: other.logprob for other in got.pieces[0].logprobs[1].top} == {"b": -1.5, "c": -0.5}


def test_a_completion_that_was_cut_off_is_asked_for_again_and_no_word_comes_twice() -> None:
    reply = answer(text_chunk(0, "one two"), text_chunk(0, " three", "stop"))
    with forwarding(reply, owner="vllm") as (driver, _):
        got = resumed(driver, prompts("a"), Piece(text="one t", units=1))
    assert got.text == "wo three"


@pytest.mark.parametrize("owner", ["openai", "library", "llamacpp", "someone"])
def test_servers_that_would_not_tell_a_prompt_back_are_not_asked_to(owner: str) -> None:
    with forwarding(answer(text_chunk(0, "x", "stop")), owner=owner) as (driver, _):
        assert "completions" in driver.engine.card.features
        assert not {"prompt_logprobs", "tokenize"} & set(driver.engine.card.features)
        [refused] = driver.run(prompts("a", echo=True))
    assert refused.ended is not None
    assert isinstance(refused.ended.error, InvalidRequestError)
    assert refused.ended.error.param == "echo"


def test_tokens_are_looked_for_beside_the_base_url() -> None:
    reply = Reply({"count": 2, "max_model_len": 9, "tokens": [4, 5], "token_strs": None})
    with forwarding(reply, owner="vllm") as (driver, server):
        [got] = driver.run(Job(id="j", model="m", kind="tokenize", inputs=("hi",)))
        assert server.asked[-1].path == "/tokenize"
        assert server.asked[-1].body == {"model": "m", "prompt": "hi"}
    assert got.ids == (4, 5)
    assert json.loads(got.text) == {"count": 2, "max_model_len": 9}
