"""Every parameter for chats that OpenAI's client or vLLM's server knows: honoured, refused, or without an effect.

A new client that knows more fails here.
"""

import json
import typing
from typing import Any

import pytest
from fastchat_q.api.schemas import NOT_SUPPORTED, ChatRequest
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)

from .http_client import Connection, post
from .stack import Stack
from .test_chat_parameters import SCHEMA, SCHEMA_TEXT, WEATHER

JOB = [{"role": "user", "content": "job"}]

IN_THE_JOB: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frequency_penalty": ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
    "logit_bias": ({"logit_bias": {"7": 5}}, {"logit_bias": {"7": 5.0}}),
    "logprobs": ({"logprobs": True}, {"logprobs": 0}),
    "max_completion_tokens": ({"max_completion_tokens": 7}, {"max_tokens": 7}),
    "max_tokens": ({"max_tokens": 7}, {"max_tokens": 7}),
    "n": ({"n": 128}, {"n": 128}),
    "presence_penalty": ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
    "response_format": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
        {"guide": {"kind": "json_schema", "value": SCHEMA_TEXT}},
    ),
    "seed": ({"seed": -3}, {"seed": -3, "seeded": True}),
    "stop": ({"stop": ["a", "b", "c", "d"]}, {"stop": ["a", "b", "c", "d"]}),
    "temperature": ({"temperature": 0.5}, {"temperature": 0.5}),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
    "top_p": ({"top_p": 0.5}, {"top_p": 0.5}),
}
"""Of the sampling of a job: what is sent, and what the worker gets."""

BESIDE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({}, {"messages": JOB}),
    "model": ({}, {"model": "script"}),
    "parallel_tool_calls": ({"tools": [WEATHER], "parallel_tool_calls": False}, {"parallel_tool_calls": False}),
    "reasoning_effort": ({"reasoning_effort": "high"}, {"template_kwargs": {"reasoning_effort": "high"}}),
    "service_tier": ({"service_tier": "flex"}, {"lane": "lo"}),
    "tool_choice": ({"tools": [WEATHER], "tool_choice": "required"}, {"tool_choice": "required"}),
    "tools": ({"tools": [WEATHER]}, {"tools": [WEATHER]}),
}
"""Of the rest of a job."""

IN_THE_ANSWER = {"stream", "stream_options"}
"""What its own test below looks for."""

WITHOUT_EFFECT: dict[str, tuple[Any, Any]] = {
    "metadata": ({f"key{n}": "v" * 512 for n in range(16)}, {f"key{n}": "v" for n in range(17)}),
    "prompt_cache_key": ("session-1", 5),
    "prompt_cache_options": ({"mode": "auto"}, 5),
    "prompt_cache_retention": ("24h", 5),
    "safety_identifier": ("u-1", 5),
    "user": ("u-1", 5),
}
"""No answer depends on them at OpenAI's either: what is taken, and what is refused all the same."""

REFUSED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": {"name": "weather"},
    "functions": [{"name": "weather", "parameters": {}}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "prediction": {"type": "content", "content": "the same again"},
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}

OF_VLLM = {
    *("add_generation_prompt", "add_special_tokens", "allowed_token_ids", "bad_words", "best_of", "chat_template"),
    *("chat_template_kwargs", "continue_final_message", "documents", "echo", "guided_choice"),
    *("guided_decoding_backend", "guided_grammar", "guided_json", "guided_regex", "guided_whitespace_pattern"),
    *("ignore_eos", "include_reasoning", "include_stop_str_in_output", "length_penalty", "min_p", "min_tokens"),
    *("priority", "prompt_logprobs", "repetition_penalty", "return_token_ids", "return_tokens_as_token_ids"),
    *("skip_special_tokens", "spaces_between_special_tokens", "stop_token_ids", "structured_outputs", "top_k"),
    *("truncate_prompt_tokens", "use_beam_search"),
}
"""https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html"""
ASKING_SOMETHING: dict[str, Any] = {
    "add_generation_prompt": False, "add_special_tokens": True, "include_reasoning": False,
    "skip_special_tokens": False, "spaces_between_special_tokens": False, "length_penalty": 0.5, "best_of": 2,
    "priority": 5,
}  # fmt: skip


def of_the_client() -> set[str]:
    """Every parameter that the installed client's types have."""
    kinds = (CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming)
    return {name for kind in kinds for name in typing.get_type_hints(kind)}


def ask(stack: Stack, **fields: Any) -> Any:
    return post(stack.port, {"model": "script", "messages": JOB, **fields})


def test_every_parameter_of_the_official_client_has_its_place_here() -> None:
    places = (IN_THE_JOB, BESIDE, IN_THE_ANSWER, WITHOUT_EFFECT, REFUSED)
    found = [name for place in places for name in place]
    assert len(found) == len(set(found))
    assert set(found) == of_the_client()


@pytest.mark.parametrize("name", [*IN_THE_JOB, *BESIDE])
def test_what_is_honoured_reaches_the_worker(scripted_stack: Stack, name: str) -> None:
    sent, expected = (IN_THE_JOB | BESIDE)[name]
    reply = ask(scripted_stack, **sent)
    assert reply.status == 200, reply.body
    job = json.loads(reply.json()["choices"][0]["message"]["content"])
    of_it = job["sampling"] if name in IN_THE_JOB else job
    assert {field: of_it[field] for field in expected} == expected


def test_a_stream_has_its_usage_if_that_is_asked_for(scripted_stack: Stack) -> None:
    for options, usage in ((None, False), ({"include_usage": True}, True), ({"include_obfuscation": False}, False)):
        connection = Connection(scripted_stack.port)
        connection.send({"model": "script", "messages": JOB, "stream": True, "stream_options": options})
        assert connection.head()[0] == 200
        events = list(connection.events())
        assert events[-1] == "data: [DONE]"
        assert ('"total_tokens"' in events[-2]) == usage
    refused = ask(scripted_stack, stream=True, stream_options={"include_obfuscation": True})
    assert (refused.status, refused.error()["param"]) == (400, "stream_options.include_obfuscation")


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_no_answer_depends_on_is_taken_but_not_everything_for_it(scripted_stack: Stack, name: str) -> None:
    taken, refused = WITHOUT_EFFECT[name]
    assert ask(scripted_stack, **{name: taken}).status == 200
    reply = ask(scripted_stack, **{name: refused})
    assert (reply.status, reply.error()["param"]) == (400, name)


@pytest.mark.parametrize("metadata", [{"k" * 65: "v"}, {"k": "v" * 513}, {"k": 5}, {"k": None}])
def test_metadata_has_openais_limits(scripted_stack: Stack, metadata: dict[str, Any]) -> None:
    reply = ask(scripted_stack, metadata=metadata)
    assert reply.status == 400
    assert reply.error()["param"].startswith("metadata")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused_by_name(scripted_stack: Stack, name: str) -> None:
    reply = ask(scripted_stack, **{name: REFUSED[name]})
    error = reply.error()
    assert (reply.status, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert name in error["message"]
    assert ask(scripted_stack, **{name: None}).status == 200


@pytest.mark.parametrize("name", sorted(OF_VLLM))
def test_every_parameter_of_vllm_is_honoured_or_refused_by_name(scripted_stack: Stack, name: str) -> None:
    if name not in NOT_SUPPORTED:
        assert name in ChatRequest.model_fields
        return
    reply = ask(scripted_stack, **{name: ASKING_SOMETHING.get(name, True)})
    assert (reply.status, reply.error()["param"], reply.error()["code"]) == (400, name, "unsupported_parameter")
    if name.startswith("guided_") and name != "guided_whitespace_pattern":
        assert "'structured_outputs'" in reply.error()["message"]


@pytest.mark.parametrize(("tier", "used"), [("auto", "default"), ("priority", "default"), ("flex", "flex")])
def test_an_answer_names_the_tier_that_served_it(scripted_stack: Stack, tier: str, used: str) -> None:
    assert ask(scripted_stack, service_tier=tier).json()["service_tier"] == used
