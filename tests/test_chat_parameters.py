"""Parameters of a chat: each that a job has reaches the worker as it was asked for, with the official client."""

import base64
import json
import threading
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from fastchat_q.events import Piece

from .http_client import post
from .scripted_worker import script
from .servers import wait_until
from .stack import Stack
from .test_chat_api import chat

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "null"}}}
SCHEMA_TEXT = json.dumps(SCHEMA, separators=(",", ":"))
IMAGE = {
    "type": "image_url",
    "image_url": {
        "url": "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\nnot decoded by the API").decode()
    },
}


def guided(kind: str, value: str) -> dict[str, Any]:
    return {"guide": {"kind": kind, "value": value}}


def structured(**fields: Any) -> dict[str, Any]:
    return {"extra_body": {"structured_outputs": fields}}


def asked(stack: Stack, messages: list[Any] | None = None, **fields: Any) -> dict[str, Any]:
    """The job that a request becomes, as its worker reads it."""
    with stack.client() as client:
        turns: Any = [*(messages or []), {"role": "user", "content": "job"}]
        answer = client.chat.completions.create(model="script", messages=turns, **fields)
    job: dict[str, Any] = json.loads(answer.choices[0].message.content or "")
    return job


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6, "extra_body": {"min_tokens": 6}}, {"max_tokens": 6, "min_tokens": 6}),
        ({"temperature": 0.5, "top_p": 0.25}, {"temperature": 0.5, "top_p": 0.25}),
        ({"n": 3}, {"n": 3}),
        ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
        ({"logit_bias": {"50256": -100, "7": 5}}, {"logit_bias": {"50256": -100.0, "7": 5.0}}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
        ({"extra_body": {"top_k": 40}}, {"top_k": 40}),
        ({"extra_body": {"top_k": -1}}, {}),
        ({"extra_body": {"min_p": 0.1, "repetition_penalty": 1.1}}, {"min_p": 0.1, "repetition_penalty": 1.1}),
        ({"extra_body": {"stop_token_ids": [1, 2]}}, {"stop_token_ids": [1, 2]}),
        ({"extra_body": {"ignore_eos": True}}, {"ignore_eos": True}),
        ({"response_format": {"type": "json_object"}}, {"guide": {"kind": "json_object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
            guided("json_schema", SCHEMA_TEXT),
        ),
        (structured(json=SCHEMA), guided("json_schema", SCHEMA_TEXT)),
        (structured(json='{"a": 1}'), guided("json_schema", '{"a": 1}')),
        (structured(regex="a+"), guided("regex", "a+")),
        (structured(choice=["a", "é"]), guided("choice", '["a","é"]')),
        (structured(grammar='start: "a"'), guided("grammar", 'start: "a"')),
        (structured(json_object=True), {"guide": {"kind": "json_object"}}),
    ],
)  # fmt: skip
def test_sampling_parameters_reach_the_worker(
    scripted_stack: Stack, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert asked(scripted_stack, seed=5, **fields)["sampling"] == {"seed": 5, "seeded": True, **expected}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("auto", None),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "weather"}}, "function:weather"),
    ],
)
def test_tools_and_the_choice_of_one_reach_the_worker(scripted_stack: Stack, choice: Any, expected: str | None) -> None:
    job = asked(
        scripted_stack, tools=[WEATHER], parallel_tool_calls=False, **({"tool_choice": choice} if choice else {})
    )
    assert job["tools"] == [WEATHER]
    assert (job.get("tool_choice"), job["parallel_tool_calls"]) == (expected, False)


def test_template_arguments_and_reasoning_effort_reach_the_worker(scripted_stack: Stack) -> None:
    kwargs = {"enable_thinking": False, "nested": {"a": [1, None]}}
    assert asked(scripted_stack, extra_body={"chat_template_kwargs": kwargs})["template_kwargs"] == kwargs
    job = asked(scripted_stack, reasoning_effort="low")
    assert job["template_kwargs"] == {"reasoning_effort": "low"}


def test_a_conversation_with_tools_and_thoughts_reaches_the_worker(scripted_stack: Stack) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    job = asked(
        scripted_stack,
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "And in Rome?", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Look it up."},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
            {"role": "assistant", "content": "Sunny.", "reasoning": "It said so.", "refusal": None},
        ],
    )
    assert job["messages"][:-1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "And in Rome?", "name": "ann"},
        {"role": "assistant", "reasoning_content": "Look it up.", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "Sunny.", "reasoning_content": "It said so."},
    ]


def test_images_reach_the_worker_by_their_digest_and_in_their_place(scripted_stack: Stack) -> None:
    parts = [{"type": "text", "text": "What is"}, IMAGE]
    job = asked(scripted_stack, [{"role": "user", "content": [*parts, {"type": "text", "text": "this?"}]}])
    [text, image, rest] = job["messages"][0]["content"]
    assert (text, rest) == ({"type": "text", "text": "What is"}, {"type": "text", "text": "this?"})
    assert image["type"] == "image"
    assert len(image["blob"]) == 64


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client's, on its own field
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_with_everything_can_be_sent_back_in_the_next_turn(scripted_stack: Stack, stream: bool) -> None:
    """As the client keeps it, its own extra fields included."""

    class Answer(BaseModel):
        a: int

    said = script(Piece((1, 2), '{"a": 1}', reasoning="hm"))
    with scripted_stack.client() as client:
        messages: list[Any] = [{"role": "user", "content": said}]
        if stream:
            with client.chat.completions.stream(model="script", messages=messages, response_format=Answer) as events:
                message = events.get_final_completion().choices[0].message
        else:
            answer = client.chat.completions.parse(model="script", messages=messages, response_format=Answer)
            message = answer.choices[0].message
        assert message.parsed == Answer(a=1)
        messages += [message, {"role": "user", "content": "job"}]
        job = json.loads(
            client.chat.completions.create(model="script", messages=messages).choices[0].message.content or ""
        )
    assert job["messages"][1] == {"role": "assistant", "content": '{"a": 1}', "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("n", {"n": 2}),
        ("logprobs", {"logprobs": True}),
        ("presence_penalty", {"presence_penalty": 0.5}),
        ("frequency_penalty", {"frequency_penalty": 0.5}),
        ("logit_bias", {"logit_bias": {"5": 1}}),
        ("top_k", {"top_k": 5}),
        ("min_p", {"min_p": 0.5}),
        ("repetition_penalty", {"repetition_penalty": 1.5}),
        ("min_tokens", {"min_tokens": 1}),
        ("stop_token_ids", {"stop_token_ids": [1]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("structured_outputs", {"structured_outputs": {"regex": "a"}}),
        ("structured_outputs", {"structured_outputs": {"json": {}}}),
        ("tools", {"tools": [WEATHER]}),
        ("reasoning_effort", {"reasoning_effort": "low"}),
        ("messages", {"messages": [{"role": "user", "content": [IMAGE]}]}),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_refused_by_name_and_nothing_is_queued(
    echo_stack: Stack, param: str, fields: dict[str, Any]
) -> None:
    before = set(echo_stack.job_keys("echo"))
    reply = post(echo_stack.port, chat(**fields))
    assert (reply.status, reply.error()["type"], reply.error()["code"]) == (
        400, "invalid_request_error", "unsupported_parameter",
    )  # fmt: skip
    assert reply.error()["param"] == param
    assert param in reply.error()["message"]
    assert "'echo'" in reply.error()["message"]
    assert set(echo_stack.job_keys("echo")) == before


def test_tools_that_may_not_be_called_and_no_effort_ask_for_nothing(echo_stack: Stack) -> None:
    assert post(echo_stack.port, chat(tools=[WEATHER], tool_choice="none", reasoning_effort="none")).status == 200


def test_a_batch_job_that_was_taken_in_without_a_worker_is_refused_by_the_worker(stack: Stack) -> None:
    worker = stack.start_worker("--model", "echo", "--engine", "echo")
    worker.stop()
    with stack.client() as client:
        client.models.list()  # from now on the API server knows that it is gone
        pending = client.with_options(timeout=30)
        create: Any = pending.chat.completions.create
        failure: list[openai.BadRequestError] = []

        def ask() -> None:
            with pytest.raises(openai.BadRequestError) as refused:
                create(model="echo", messages=[{"role": "user", "content": "x"}], n=2, service_tier="flex")
            failure.append(refused.value)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: stack.live("echo") == 1, "it waits")
        stack.start_worker("--model", "echo", "--engine", "echo")
        asking.join(30)
    [error] = failure
    assert (error.param, error.code) == ("n", "unsupported_parameter")
