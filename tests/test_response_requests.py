"""Every parameter of a response is honoured or refused by its name; its items become the turns of a conversation."""

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from fastchat_q.api.endpoints import ENDPOINTS
from fastchat_q.workers.engines.processing.rendering import token_limit

from fastchat_q.errors import ContextLengthError, InvalidRequestError
from fastchat_q.events import End, Piece, Result
from fastchat_q.settings import Settings

from .http_client import get, post
from .scripted_worker import script
from .stack import Stack

PATH = "/v1/responses"
PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
F = {"type": "function", "name": "f", "parameters": {"type": "object"}, "description": "F."}
G = {**F, "name": "g"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "x"}
USER = {"role": "user", "content": "job"}


def ask(stack: Stack, **fields: Any) -> Any:
    """The reply of a worker that can do everything."""
    return post(stack.port, {"model": "script", "input": "job", **fields}, path=PATH)


def job(stack: Stack, **fields: Any) -> dict[str, Any]:
    """The job as it reached the worker."""
    reply = ask(stack, **fields)
    assert reply.status == 200, reply.body
    found: dict[str, Any] = json.loads(reply.json()["output"][0]["content"][0]["text"])
    return found


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": [1]}, "input[0]"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]}, "input[0].content[0].type"),
        (
            {"input": [{"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": PIXEL}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x/y.png"}]}]},
            "input[0].content[0].image_url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]},
            "input[0].content[0].file_id",
        ),
        ({"input": [{**USER, "phase": "commentary"}]}, "input[0].phase"),
        ({"input": [RESULT]}, "input"),
        ({"input": [{**CALL, "namespace": "n"}]}, "input[0].namespace"),
        ({"input": [CALL, {**RESULT, "output": [{"type": "input_image"}]}]}, "input[1].output[0].type"),
        ({"model": ""}, "model"),
        ({"unknown": 1}, "unknown"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "text"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"include": ["web_search_call.results"]}, "include[0]"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "c"}]}, "tools[0].type"),
        ({"tools": [{"type": "mcp", "server_label": "s"}]}, "tools[0].type"),
        ({"tools": [{**F, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [F] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "function", "name": "h"}}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        (
            {"tools": [F], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{**F, "name": "h"}]}},
            "tool_choice.tools[0].description",
        ),
        ({"background": True, "store": False}, "background"),
        ({"stream_options": {"include_obfuscation": False}}, None),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"min_tokens": 6, "max_output_tokens": 5}, "min_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"stop": ["a"] * 5}, "stop"),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"x" * 65: ""}}, "metadata." + "x" * 65),
        ({"metadata": {"x": "x" * 513}}, "metadata.x"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"stream": "yes"}, "stream"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ],
)
def test_what_is_not_honoured_is_refused_by_its_name(scripted_stack: Stack, fields: dict[str, Any], param: Any) -> None:
    reply = ask(scripted_stack, **fields)
    assert (reply.status, reply.error()["param"]) == (400, param), reply.body


def test_what_asks_for_nothing_is_accepted(scripted_stack: Stack) -> None:
    nothing: dict[str, Any] = {
        "background": False,
        "context_management": None,
        "conversation": None,
        "include": [],
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": None,
        "moderation": None,
        "parallel_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {},
        "reasoning": {"context": "auto", "effort": None, "mode": "standard", "summary": "auto"},
        "service_tier": "auto",
        "store": None,
        "stream": False,
        "temperature": None,
        "text": {"verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": None,
        "truncation": "disabled",
    }
    given = job(scripted_stack, **nothing)
    assert given.keys() <= {"id", "model", "messages", "sampling"}
    assert given["sampling"].keys() <= {"seed"}


def test_each_parameter_reaches_the_worker(scripted_stack: Stack) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    given = job(
        scripted_stack,
        instructions="Be brief.",
        max_output_tokens=50,
        temperature=0.5,
        top_p=0.25,
        top_logprobs=3,
        seed=7,
        stop=["x"],
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.5,
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": -100},
        min_tokens=2,
        stop_token_ids=[9],
        tools=[F, G],
        tool_choice={"type": "function", "name": "g"},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        reasoning={"effort": "high"},
        chat_template_kwargs={"a": 1},
        service_tier="flex",
    )
    assert [(turn["role"], turn["content"]) for turn in given["messages"]] == [
        ("system", "Be brief."),
        ("user", "job"),
    ]
    sampling = given["sampling"]
    assert json.loads(sampling.pop("guide")["value"]) == schema
    assert sampling == {
        "max_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 7,
        "seeded": True,
        "stop": ["x"],
        "ignore_eos": True,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"7": -100},
        "min_tokens": 2,
        "stop_token_ids": [9],
        "logprobs": 3,
    }
    assert [tool["function"]["name"] for tool in given["tools"]] == ["f", "g"]
    assert given["tools"][0]["type"] == "function"
    assert (given["tool_choice"], given["parallel_tool_calls"], given["lane"]) == ("function:g", False, "lo")
    assert given["template_kwargs"] == {"a": 1, "reasoning_effort": "high"}


def test_tools_that_are_not_allowed_are_not_shown_to_the_model(scripted_stack: Stack) -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    given = job(scripted_stack, tools=[F, G], tool_choice=allowed)
    assert [tool["function"]["name"] for tool in given["tools"]] == ["g"]
    assert given["tool_choice"] == "required"
    shown = ask(scripted_stack, tools=[F, G], tool_choice=allowed).json()
    assert shown["tool_choice"] == allowed
    assert [tool["name"] for tool in shown["tools"]] == ["f", "g"]


def test_structured_outputs_of_other_kinds_than_json_reach_the_worker(scripted_stack: Stack) -> None:
    guide = job(scripted_stack, structured_outputs={"regex": "[ab]+"}, text={"format": {"type": "text"}})["sampling"][
        "guide"
    ]
    assert guide == {"kind": "regex", "value": "[ab]+"}


def test_an_error_of_a_worker_names_the_parameter_as_the_request_has_it(scripted_stack: Stack) -> None:
    reply = ask(scripted_stack, input="no script")
    assert (reply.status, reply.error()["param"]) == (400, "input")
    failed = ask(scripted_stack, input="no script", background=True).json()
    while failed["status"] in ("queued", "in_progress"):
        failed = get(scripted_stack.port, f"{PATH}/{failed['id']}").json()
    assert failed["error"]["param"] == "input"


@pytest.mark.parametrize(
    ("path", "fields", "param", "way_out"),
    [
        (PATH, {"input": "x"}, "input", "Shorten the input or lower max_output_tokens."),
        ("/v1/chat/completions", {"messages": [USER]}, "messages", "Shorten the messages or lower max_tokens."),
        (
            "/v1/chat/completions",
            {"messages": [USER], "max_completion_tokens": 9},
            "messages",
            "Shorten the messages or lower max_completion_tokens.",
        ),
    ],
)
def test_a_prompt_that_is_too_long_is_told_in_the_words_of_its_request(
    path: str, fields: dict[str, Any], param: str, way_out: str
) -> None:
    asked = ENDPOINTS[path].parse({"model": "m", **fields}, Settings(), 100)
    with pytest.raises(ContextLengthError) as raised:
        token_limit(10, 20, asked.job.sampling)
    end = End(0, "failed", "", Result.from_error(raised.value))
    error = replace(asked.view, spelt=asked.spelt).failure(end)
    assert error is not None
    assert (error.param, error.code) == (param, "context_length_exceeded")
    assert error.message.endswith(way_out)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (PATH, {"input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}}, "text.format"),
        (PATH, {"input": "x", "structured_outputs": {"json": {}}}, "structured_outputs"),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"json": {}}}, "structured_outputs"),
    ],
)
def test_a_schema_that_a_worker_refuses_is_named_as_the_request_has_it(
    path: str, fields: dict[str, Any], param: str
) -> None:
    asked = ENDPOINTS[path].parse({"model": "m", **fields}, Settings(), 100)
    refused = InvalidRequestError("The JSON schema cannot be used.", param="response_format", code="invalid_schema")
    error = replace(asked.view, spelt=asked.spelt).failure(End(0, "failed", "", Result.from_error(refused)))
    assert error is not None
    assert error.param == param


def test_include_alone_asks_for_log_probabilities(scripted_stack: Stack) -> None:
    assert job(scripted_stack, include=["message.output_text.logprobs"])["sampling"]["logprobs"] == 0


def test_items_become_turns_and_what_an_assistant_did_at_once_is_one(scripted_stack: Stack) -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        CALL,
        {**CALL, "call_id": "d", "name": "g"},
        RESULT,
        {
            **RESULT,
            "call_id": "d",
            "output": [{"type": "input_text", "text": "y"}, {"type": "input_text", "text": "z"}],
        },
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Sum."}]},
        {**CALL, "call_id": "e"},
        {**RESULT, "call_id": "e"},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        USER,
    ]
    turns = job(scripted_stack, input=items)["messages"]
    assert [turn["role"] for turn in turns] == [
        *("system", "user", "assistant", "tool", "tool"),
        *("assistant", "tool", "assistant", "assistant", "user"),
    ]
    first = turns[2]
    assert (first["reasoning_content"], first["content"]) == ("Hm.", "I look.")
    assert [call["id"] for call in first["tool_calls"]] == ["c", "d"]
    assert [(turn["content"], turn["tool_call_id"]) for turn in turns[3:5]] == [("x", "c"), ("yz", "d")]
    assert turns[5]["reasoning_content"] == "Sum."
    assert "content" not in turns[5]
    assert [turn["content"] for turn in turns[7:]] == ["Done.", "No.", "job"]


def test_images_are_kept_beside_the_job_and_go_with_the_conversation(scripted_stack: Stack) -> None:
    parts = [{"type": "input_text", "text": "job"}, {"type": "input_image", "image_url": PIXEL, "detail": "high"}]
    first = ask(scripted_stack, input=[{"role": "user", "content": parts}])
    assert first.status == 200, first.body
    given = json.loads(first.json()["output"][0]["content"][0]["text"])
    digest = given["messages"][0]["content"][1]["blob"]
    response_id = first.json()["id"]
    then = job(scripted_stack, previous_response_id=response_id)
    assert then["messages"][0]["content"][1] == {"type": "image", "blob": digest}
    ttl = scripted_stack.redis.ttl(f"fq:{{script}}:blob:{digest}")
    assert ttl > 86_000, "as long as the response"
    shown = get(scripted_stack.port, f"{PATH}/{response_id}/input_items").json()["data"][0]
    assert shown["content"][1] == {"type": "input_image", "detail": "high", "file_id": None, "image_url": None}
    with_urls = f"{PATH}/{response_id}/input_items?include[]=message.input_image.image_url"
    [item] = get(scripted_stack.port, with_urls).json()["data"]
    found = item["content"][1]["image_url"]
    assert base64.b64decode(found.partition(",")[2]) == base64.b64decode(PIXEL.partition(",")[2])
    scripted_stack.redis.delete(f"fq:{{script}}:blob:{digest}")
    refused = ask(scripted_stack, previous_response_id=response_id)
    assert (refused.status, refused.error()["code"]) == (400, "part_lost")


def test_a_query_that_is_not_honoured_is_refused(scripted_stack: Stack) -> None:
    said = ask(scripted_stack, input=script(Piece((1,), "x"))).json()
    path = f"{PATH}/{said['id']}"
    for query, param in (
        ("include=web_search_call.results", "include"),
        ("include[]=nothing", "include"),
        ("starting_after=1", "starting_after"),
        ("foo=1", "foo"),
        ("include_obfuscation=true", "include_obfuscation"),
        ("stream=true&starting_after=-1", "starting_after"),
    ):
        reply = get(scripted_stack.port, f"{path}?{query}")
        assert (reply.status, reply.error()["param"]) == (400, param), reply.body
    for query in ("limit=0", "limit=101", "order=up", "foo=1"):
        assert get(scripted_stack.port, f"{path}/input_items?{query}").status == 400
    assert (
        get(scripted_stack.port, f"{path}?include=message.output_text.logprobs&include_obfuscation=false").json()
        == said
    )


def test_a_line_of_a_batch_is_parsed_as_over_http_but_for_what_no_line_can_have() -> None:
    endpoint = ENDPOINTS[PATH]
    asked = endpoint.parse({"model": "m", "input": "Hi"}, Settings(), 30)
    assert (asked.view.form, asked.job.messages[0].content, asked.stream) == ("response", "Hi", False)
    for name, value in (("stream", True), ("background", True), ("previous_response_id", "resp_x")):
        with pytest.raises(InvalidRequestError) as refused:
            endpoint.parse({"model": "m", "input": "Hi", name: value}, Settings(), 30)
        assert refused.value.param == name
