"""What clients put into a request beside what they were asked for is taken as what it means, whatever its form."""

from typing import Any

import pytest

from ..http_client import post
from ..stack import Stack
from ..test_chat_parameters import WEATHER, asked

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}


def turn(stack: Stack, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Earlier messages as the worker gets them."""
    return asked(stack, list(messages))["messages"][: len(messages)]


def test_an_answer_that_litellm_sends_back_is_the_answer(scripted_stack: Stack) -> None:
    own = {"provider_specific_fields": {"refusal": None}}
    call = {**CALL, "index": 0, "provider_specific_fields": None, "function": {**CALL["function"], **own}}  # type: ignore[dict-item]
    nothing = {"audio": None, "function_call": None, "images": [], "thinking_blocks": None, "annotations": []}
    message = {"role": "assistant", "content": None, "tool_calls": [call], **nothing, **own}
    said, _ = turn(scripted_stack, message, RESULT)
    assert said["tool_calls"] == [CALL]


def test_a_refusal_that_is_sent_back_is_what_the_assistant_said(scripted_stack: Stack) -> None:
    whole = {"role": "assistant", "content": None, "refusal": "I cannot."}
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}
    assert [message["content"] for message in turn(scripted_stack, whole, part)] == ["I cannot."] * 2


def test_hints_for_anthropics_cache_change_nothing(scripted_stack: Stack) -> None:
    part = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    [message] = turn(scripted_stack, {"role": "system", "content": [part]})
    assert message["content"] == "Be brief."


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_content_may_be_a_list_in_every_role(scripted_stack: Stack, role: str) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    [message] = turn(scripted_stack, {"role": role, "content": parts, "name": "Bob"})
    assert (message["content"], message["name"]) == ("a b", "Bob")


@pytest.mark.parametrize("content", [None, "", [{"type": "text", "text": ""}]])
def test_a_call_without_content_is_taken_however_that_is_said(scripted_stack: Stack, content: Any) -> None:
    call, result = turn(
        scripted_stack,
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {**RESULT, "content": [{"type": "text", "text": "sunny"}]},
    )
    assert (call.get("content") or "", result["content"]) == ("", "sunny")


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_of_allowed_tools_the_model_is_told_and_of_no_others(scripted_stack: Stack, mode: str) -> None:
    names = [{"type": "function", "function": {"name": "time"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": names}}
    job = asked(scripted_stack, tools=[WEATHER, TIME], tool_choice=choice)
    assert ([tool["function"]["name"] for tool in job["tools"]], job.get("tool_choice", "auto")) == (["time"], mode)


def test_an_allowed_tool_that_is_not_there_is_refused(scripted_stack: Stack) -> None:
    names = [{"type": "function", "function": {"name": "date"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": names}}
    user = {"role": "user", "content": "job"}
    reply = post(scripted_stack.port, {"model": "script", "messages": [user], "tools": [TIME], "tool_choice": choice})
    assert (reply.status, reply.error()["param"]) == (400, "tool_choice")
    assert "date" in reply.error()["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "input_audio"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}, "file"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "custom"),
        ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]}, "refusal"),
        ({"audio": {"voice": "alloy", "format": "wav"}, "modalities": ["text", "audio"]}, "audio"),
    ],
)
def test_what_no_worker_can_do_is_refused_by_its_name(scripted_stack: Stack, changes: Any, param: str) -> None:
    body = {"model": "script", "messages": [{"role": "user", "content": "job"}], **changes}
    reply = post(scripted_stack.port, body)
    assert (reply.status, reply.error()["type"]) == (400, "invalid_request_error")
    assert param in reply.error()["message"]
    assert reply.error()["param"]
