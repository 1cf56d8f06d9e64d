"""Whatever is sent, the answer is a clear OpenAI error, the server stays healthy, and nothing is left in Redis."""

from typing import Any

import openai
import pytest

from .http_client import CHAT, get, post
from .stack import API_KEY, Stack

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def image(url: str, **fields: Any) -> dict[str, Any]:
    """A message with an image."""
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": url, **fields}}]
    return {"role": "user", "content": parts}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def schema(found: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": found}}


def nested(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"items": found}
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind(echo_stack: Stack) -> Any:
    before = set(echo_stack.job_keys("echo"))
    yield
    assert get(echo_stack.port, "/readyz", authorization=None).status == 200
    assert set(echo_stack.job_keys("echo")) == before


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"{not json", "invalid_json", "JSON"),
        (b"", "missing_body", "body"),
        (b"\xff\xfe", None, "body"),
        (b"[" * 100_000, None, "body"),
        (b"null", "invalid_body", "null"),
        (b"[]", "invalid_body", "array"),
        (b'"text"', "invalid_body", "string"),
        (b"{}", "missing_required_parameter", "model"),
    ],
)
def test_a_body_that_is_no_request(echo_stack: Stack, body: bytes, code: str | None, says: str) -> None:
    reply = post(echo_stack.port, body)
    assert reply.status == 400
    error = reply.error()
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    if code is not None:
        assert error["code"] == code


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "c"}]}, "messages[0].content"),
        ({"messages": [{"role": "function", "content": "hi", "name": "f"}]}, "messages[0].role"),
        ({"messages": [{**USER, "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{**USER, "reasoning_content": "hm"}]}, "messages[0].reasoning_content"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": []}]}, "messages[1].content"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [image("https://example.org/cat.png")]}, "messages[0].content[1].image_url.url"),
        ({"messages": [image("file:///etc/passwd")]}, "messages[0].content[1].image_url.url"),
        ({"messages": [image("data:image/png;base64,!!!")]}, "messages[0].content[1].image_url.url"),
        ({"messages": [image("data:image/png;base64,")]}, "messages[0].content[1].image_url.url"),
        ({"messages": [image("data:text/html;base64,AAAA")]}, "messages[0].content[1].image_url.url"),
        ({"messages": [image("data:image/png,AAAA")]}, "messages[0].content[1].image_url.url"),
        ({"messages": [image(PIXEL, detail="low")]}, "messages[0].content[1].image_url.detail"),
        ({"messages": [image(PIXEL)] * 17}, "messages[16].content[1].image_url.url"),
        ({"messages": [{**image(PIXEL), "role": "system"}]}, "messages[0].content[1].type"),
        ({"messages": [{"role": "user", "content": "hi", "extra": 1}]}, "messages[0].extra"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stream": "maybe"}, "stream"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": "0.5"}, "temperature"),
        ({"seed": "1"}, "seed"),
        ({"stream": 1}, "stream"),
        ({"messages": [{"role": "user", "content": "\ud800 hi"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [1]}]}, "messages[1].tool_calls[0]"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "id": 1}]}]},
            "messages[1].tool_calls[0].id",
        ),
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type"),
        ({"tools": [tool("no spaces")]}, "tools[0].function.name"),
        ({"tools": [tool("f" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool("f", parameters="{}")]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", parameters={"default": float("nan")})]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", parameters={"\ud800": 1})]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", parameters=nested(100))]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", parameters={"maximum": 2**70})]}, "tools[0].function.parameters"),
        ({"tools": [tool("f")] * 129}, "tools"),
        ({"tools": [tool("f")], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "s", "schema": {}}}},
            "response_format.json_schema",
        ),
        ({"response_format": schema({"a": "\ud800"})}, "response_format.json_schema.schema"),
        ({"response_format": schema([])}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice[1]"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"lark": "a"}}, "structured_outputs.lark"),
        ({"guided_json": {}}, "guided_json"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": "1"}, "stop_token_ids"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"best_of": 2}, "best_of"),
        ({"Temperature": 1}, "Temperature"),
        ({"str": 1}, "str"),
        ({"temprature": 0.5}, "temprature"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None),
    ],
)
def test_a_parameter_out_of_order_is_named(echo_stack: Stack, fields: dict[str, Any], param: str | None) -> None:
    reply = post(echo_stack.port, {"model": "echo", "messages": [USER], **fields})
    assert reply.status == 400, reply.body
    error = reply.error()
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert param in error["message"]


def test_an_unknown_model_is_404_with_near_matches(echo_stack: Stack) -> None:
    reply = post(echo_stack.port, {"model": "ecko", "messages": [USER]})
    assert reply.status == 404
    assert reply.error()["code"] == "model_not_found"
    assert "'echo'" in reply.error()["message"]
    assert get(echo_stack.port, "/v1/models/ecko").status == 404


@pytest.mark.parametrize(
    ("authorization", "code"),
    [(None, "invalid_api_key"), ("Bearer wrong", "invalid_api_key"), ("Bearer ", "invalid_api_key"), (API_KEY, None),
     ("Bearer clé", "invalid_api_key")],
)  # fmt: skip
def test_without_the_key_it_is_401(echo_stack: Stack, authorization: str | None, code: str | None) -> None:
    for reply in (
        post(echo_stack.port, {"model": "echo", "messages": [USER]}, headers={"authorization": authorization}),
        post(echo_stack.port, b"{not json", headers={"authorization": authorization}),
        get(echo_stack.port, "/v1/models", authorization=authorization),
    ):
        assert reply.status == 401
        assert reply.error()["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert API_KEY not in reply.body.decode()


def test_the_official_client_raises_its_own_exceptions(echo_stack: Stack) -> None:
    with echo_stack.client() as client:
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nope", messages=[USER])  # type: ignore[list-item]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="echo", messages=[])
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_another_content_type_is_415(echo_stack: Stack) -> None:
    reply = post(echo_stack.port, b"model=echo", headers={"content-type": "application/x-www-form-urlencoded"})
    assert reply.status == 415
    assert "application/json" in reply.error()["message"]


def test_unknown_paths_and_methods_are_openai_errors_too(echo_stack: Stack) -> None:
    assert get(echo_stack.port, "/v1/nothing").status == 404
    assert get(echo_stack.port, "/v1/nothing").error()["code"] == "not_found"
    reply = get(echo_stack.port, CHAT)
    assert (reply.status, reply.error()["code"]) == (405, "method_not_allowed")


def test_a_failure_in_the_worker_before_the_first_token_has_its_own_status(echo_stack: Stack) -> None:
    for stream in (False, True):
        reply = post(
            echo_stack.port, {"model": "echo", "stream": stream, "messages": [{"role": "user", "content": ""}]}
        )
        assert reply.status == 400
        assert reply.error()["param"] == "messages"
        for name in echo_stack.job_keys("echo"):  # this one was a job: it is kept, as failed, for its TTL
            echo_stack.redis.delete(name)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"user": "\udc00"}, "user"),
        ({"metadata": {"a": "\udc00"}}, "metadata.a"),
        ({"prompt_cache_key": "\udc00"}, "prompt_cache_key"),
    ],
)
def test_a_field_that_changes_nothing_is_refused_all_the_same_if_it_is_no_text(
    echo_stack: Stack, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "echo", "messages": [USER], **fields}
    reply = post(echo_stack.port, body, headers={"idempotency-key": "surrogate"})
    assert (reply.status, reply.error()["param"]) == (400, param)
