"""Anthropic's Messages API over the whole path: its official client, real API processes, real Redis, real workers."""

import asyncio
import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from fastchat_q.events import Piece, ToolCallDelta

from .http_client import Connection, get, post
from .scripted_worker import script
from .servers import wait_until
from .stack import API_KEY, Stack
from .streams import echo_worker, resume, second_api

PATH = "/v1/messages"
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
USER = [{"role": "user", "content": "the quick  brown 🦊 jumps"}]
WEATHER = {
    "name": "get_weather",
    "description": "Current weather in a given city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ROME = ToolCallDelta(0, '{"city":', "call_1", "weather")
STEPS = [
    Piece((1,), reasoning="Let me "),
    Piece((2, 3), reasoning="see.", text="I "),
    Piece((4,), "look"),
    Piece((5,), ""),
    Piece((6, 7), "."),
    Piece((8, 9, 10), tool_calls=(ROME,)),
    Piece((11, 12), tool_calls=(ToolCallDelta(0, '"Rome"}'), ToolCallDelta(1, "", "call_2", "time"))),
    Piece((13,), tool_calls=(ToolCallDelta(1, "{}"),)),
]
CONTENT = [
    {"type": "thinking", "thinking": "Let me see."},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}},
    {"type": "tool_use", "id": "call_2", "name": "time", "input": {}},
]


def claude(stack: Stack, port: int | None = None, **options: Any) -> anthropic.Anthropic:
    """The official client, without its retries, which would hide failures."""
    settings: dict[str, Any] = {"api_key": API_KEY, "max_retries": 0, "timeout": 60, **options}
    return anthropic.Anthropic(base_url=f"http://127.0.0.1:{port or stack.port}", **settings)


def body(*steps: Any, finish: str = "stop", delay_ms: float = 0, **fields: Any) -> dict[str, Any]:
    """A request for a scripted answer."""
    content = script(*steps, finish=finish, delay_ms=delay_ms)
    return {"model": "script", "max_tokens": 100, "messages": [{"role": "user", "content": content}], **fields}


def echo(content: Any = USER[0]["content"], **fields: Any) -> dict[str, Any]:
    """A request that is answered with its own words."""
    return {"model": "echo", "max_tokens": 1000, "messages": [{"role": "user", "content": content}], **fields}


def whole(client: anthropic.Anthropic, request: dict[str, Any]) -> Message:
    """The answer as it is without a stream, valid to the letter."""
    found = client.messages.with_raw_response.create(**request)
    return Message.model_validate_json(found.text(), strict=True)


def streamed(client: anthropic.Anthropic, request: dict[str, Any]) -> Message:
    """The answer as the client's own accumulator makes it of a stream."""
    with client.messages.stream(**request) as events:
        return events.get_final_message()


def awaited(client: anthropic.Anthropic, request: dict[str, Any]) -> Message:
    """The same by the asynchronous client."""

    async def ask() -> Message:
        options: dict[str, Any] = {"api_key": API_KEY, "max_retries": 0, "timeout": 60}
        other = anthropic.AsyncAnthropic(base_url=str(client.base_url), **options)
        async with other, other.messages.stream(**request) as events:
            return await events.get_final_message()

    return asyncio.run(ask())


every_way = pytest.mark.parametrize("ask", [whole, streamed, awaited])
Ask = Callable[[anthropic.Anthropic, dict[str, Any]], Message]


def shown(message: Message) -> list[dict[str, Any]]:
    """The blocks without what is not part of the answer."""
    left_out = {"citations", "signature", "caller", "toolset_name"}
    return [block.model_dump(exclude=left_out, exclude_unset=True) for block in message.content]


@pytest.fixture
def client(echo_stack: Stack) -> Iterator[anthropic.Anthropic]:
    with claude(echo_stack) as client:
        yield client


@pytest.fixture
def scripted(scripted_stack: Stack) -> Iterator[anthropic.Anthropic]:
    with claude(scripted_stack) as client:
        yield client


def job_of(client: anthropic.Anthropic, **request: Any) -> dict[str, Any]:
    """The job that reached the worker."""
    request = {"model": "script", "max_tokens": 100, **request}
    answer = client.messages.create(**request)
    return json.loads(answer.content[0].text)


def asking_for_the_job(*before: dict[str, Any]) -> list[Any]:
    return [*before, {"role": "user", "content": "job"}]


# answers


@every_way
def test_a_message_has_anthropics_shape(client: anthropic.Anthropic, ask: Ask) -> None:
    answer = ask(client, echo())
    assert answer.id.startswith("msg_")
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "echo")
    assert shown(answer) == [{"type": "text", "text": USER[0]["content"]}]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 5)
    assert (answer.usage.cache_creation_input_tokens, answer.usage.cache_read_input_tokens) == (0, 0)


@every_way
def test_thoughts_text_and_calls_are_blocks(scripted: anthropic.Anthropic, ask: Ask) -> None:
    answer = ask(scripted, body(*STEPS, finish="tool_calls"))
    assert shown(answer) == CONTENT
    assert answer.content[0].signature, "clients want one"
    assert answer.stop_reason == "tool_use"


@every_way
@pytest.mark.parametrize(
    ("finish", "reason"), [("stop", "end_turn"), ("length", "max_tokens"), ("content_filter", "refusal")]
)
def test_reasons_to_stop_have_anthropics_names(
    scripted: anthropic.Anthropic, ask: Ask, finish: str, reason: str
) -> None:
    answer = ask(scripted, body(Piece((1, 2), "Hi"), finish=finish, max_tokens=2))
    assert answer.stop_reason == reason


@every_way
def test_a_stop_sequence_is_named(client: anthropic.Anthropic, ask: Ask) -> None:
    answer = ask(client, echo(stop_sequences=["zzz", "brown"]))
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "brown")
    assert shown(answer) == [{"type": "text", "text": "the quick  "}]
    cut = ask(client, echo(stop_sequences=["zzz"], max_tokens=2))
    assert (cut.stop_reason, cut.stop_sequence) == ("max_tokens", None)


@every_way
def test_an_answer_that_fills_the_context_says_so(scripted: anthropic.Anthropic, ask: Ask) -> None:
    answer = ask(scripted, body(Piece((1,), "Hi"), finish="length", max_tokens=50))
    assert answer.stop_reason == "model_context_window_exceeded"


def test_a_call_that_is_cut_off_has_as_much_input_as_there_is(scripted: anthropic.Anthropic) -> None:
    call = ToolCallDelta(0, '{"city":"Rome","days":[1,2', "call_1", "weather")
    for ask in (whole, streamed):
        answer = ask(scripted, body(Piece((1,), tool_calls=(call,)), finish="length", max_tokens=1))
        assert answer.content[0].input == {"city": "Rome", "days": [1, 2]}
        assert answer.stop_reason == "max_tokens"


@every_way
def test_thoughts_may_be_left_out_but_for_their_signature(scripted: anthropic.Anthropic, ask: Ask) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    answer = ask(scripted, body(*STEPS, finish="tool_calls", thinking=thinking, max_tokens=2000))
    assert shown(answer) == [{"type": "thinking", "thinking": ""}, *CONTENT[1:]]
    assert answer.content[0].signature


def test_a_stream_has_anthropics_events_in_their_order(scripted_stack: Stack) -> None:
    connection = Connection(scripted_stack.port)
    connection.send(body(*STEPS, finish="tool_calls", delay_ms=20, stream=True), path=PATH)
    status, headers = connection.head()
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    events = events_of(connection.events())
    for name, said in events:
        assert said["type"] == name
        EVENT.validate_python(said, strict=True)
    names = [name.removeprefix("content_block_") for name, _ in events]
    assert [name for name, _ in itertools.groupby(names)] == [  # what came together goes out together
        "message_start",
        *("start", "delta", "stop") * 4,
        *("message_delta", "message_stop"),
    ]
    assert events[0][1]["message"]["usage"]["input_tokens"] == 0, "the prompt is counted by the worker"
    assert events[-2][1]["usage"]["input_tokens"] == 7


def events_of(blocks: Any) -> list[tuple[str, dict[str, Any]]]:
    """(name, data) of each event of a stream, without its comments and pings."""
    found = []
    for block in blocks:
        if not block or block.startswith(":"):
            continue
        name, _, data = block.removeprefix("event: ").partition("\ndata: ")
        if name != "ping":
            found.append((name, json.loads(data)))
    return found


# what becomes a job


def test_a_conversation_becomes_the_turns_of_a_chat(scripted: anthropic.Anthropic) -> None:
    cache = {"type": "ephemeral"}
    call = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rom"}}
    failed = {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "no"}], "is_error": True}
    job = job_of(
        scripted,
        system=[{"type": "text", "text": "Be brief.", "cache_control": cache}, {"type": "text", "text": "Be kind."}],
        tools=[{**WEATHER, "type": "custom", "cache_control": cache, "strict": True}],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
        messages=asking_for_the_job(
            {"role": "user", "content": "Hi"},
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}, {"type": "text", "text": "Rome."}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "thinking", "thinking": "Hm.", "signature": None},
                    {"type": "text", "text": "I ", "citations": None},
                    {"type": "text", "text": "look."},
                    call,
                    {**call, "id": "t2"},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Here."},
                    {"type": "tool_result", "tool_use_id": "t1", "content": "sunny", "is_error": None},
                    {**failed, "cache_control": cache},
                ],
            },
            {"role": "assistant", "content": "Fine."},
        ),
    )
    function = {"name": "get_weather", "arguments": '{"city":"Rom"}'}
    assert job["messages"] == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Hi\n\nWeather?\n\nRome."},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": name, "type": "function", "function": function} for name in ("t1", "t2")],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "t1"},
        {"role": "tool", "content": "Error: no", "tool_call_id": "t2"},
        {"role": "user", "content": "Here."},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": "job"},
    ]
    parameters = {"description": WEATHER["description"], "parameters": WEATHER["input_schema"], "strict": True}
    assert job["tools"] == [{"type": "function", "function": {"name": "get_weather", **parameters}}]
    assert job["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("choice", "ours"),
    [
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "get_weather"}, "function:get_weather"),
    ],
)
def test_a_tool_choice_has_openais_name(scripted: anthropic.Anthropic, choice: Any, ours: str) -> None:
    job = job_of(scripted, messages=asking_for_the_job(), tools=[WEATHER], tool_choice=choice)
    assert job["tool_choice"] == ours


def test_sampling_is_what_the_request_says(scripted: anthropic.Anthropic) -> None:
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7}
    job = job_of(scripted, messages=asking_for_the_job(), stop_sequences=["a", "b"], extra_body=asked)
    sampling = job["sampling"]
    assert {name: sampling[name] for name in asked} == asked
    assert (sampling["max_tokens"], sampling["stop"], sampling["clip"]) == (100, ["a", "b"], True)
    assert sampling["seed"], "drawn once, so that a resumed job draws the same"


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 8000}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 31999}}, "high"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "max"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "high"}}, "high"),
    ],
)
def test_thinking_becomes_an_effort(scripted: anthropic.Anthropic, fields: Any, effort: str | None) -> None:
    job = job_of(scripted, messages=asking_for_the_job(), **{**fields, "max_tokens": 32000})
    assert job.get("template_kwargs", {}).get("reasoning_effort") == effort


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_a_schema_becomes_the_guide(scripted: anthropic.Anthropic, name: str) -> None:
    output = {"type": "json_schema", "schema": WEATHER["input_schema"]}
    extra = {name: {"format": output} if name == "output_config" else output}
    job = job_of(scripted, messages=asking_for_the_job(), extra_body=extra)
    assert job["sampling"]["guide"]["kind"] == "json_schema"
    assert json.loads(job["sampling"]["guide"]["value"]) == WEATHER["input_schema"]


def test_what_agents_send_is_accepted(scripted: anthropic.Anthropic) -> None:
    """As Claude Code asks: by the beta client, whose requests say ?beta=true."""
    tools = [{**WEATHER, "name": f"mcp__server__tool_{number}" + "x" * 60} for number in range(90)]
    text = {"type": "text", "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"}}
    request: dict[str, Any] = {
        "model": "script",
        "max_tokens": 32000,
        "system": [{**text, "text": "x-anthropic-billing-header: v"}, {**text, "text": "You are an agent."}],
        "tools": [{**tool, "eager_input_streaming": True} for tool in tools],
        "metadata": {"user_id": json.dumps({"device_id": "d", "session_id": "s"})},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "betas": ["claude-code-20250219", "interleaved-thinking-2025-05-14", "fine-grained-tool-streaming-2025-05-14"],
        "service_tier": "auto",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>Be careful.</system-reminder>"},
                    {**text, "text": "Look."},
                ],
            },
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "Read", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "ok"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Done."}]},
            {"role": "user", "content": [{**text, "text": script(*STEPS, finish="tool_calls")}]},
        ],
    }
    with scripted.beta.messages.stream(**request) as events:
        answer = events.get_final_message()
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]


PNG = b"\x89PNG\r\n\x1a\n"


def image(content: bytes = PNG + b"rest") -> dict[str, Any]:
    """An image block."""
    data = base64.b64encode(content).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def test_images_lie_beside_the_job_and_those_of_results_are_shown_by_the_user(scripted: anthropic.Anthropic) -> None:
    first, second = PNG + b"first", PNG + b"second"
    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "Seen."}, image(second)]}
    text = {"type": "text", "text": "What is it?"}
    job = job_of(
        scripted,
        messages=asking_for_the_job(
            {"role": "user", "content": [image(first), text, text]},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result, text]},
            {"role": "assistant", "content": "A cat."},
        ),
    )
    shown_first, shown_second = (
        {"type": "image", "blob": hashlib.sha256(content).hexdigest()} for content in (first, second)
    )
    assert job["messages"][0]["content"] == [shown_first, {"type": "text", "text": "What is it?\n\nWhat is it?"}]
    assert job["messages"][2] == {"role": "tool", "content": "Seen.", "tool_call_id": "t1"}
    assert job["messages"][3]["content"] == [shown_second, {"type": "text", "text": "What is it?"}]


def test_only_images_may_make_a_body_large(scripted_stack: Stack) -> None:
    def size_status(block: Any) -> int:
        return post(
            scripted_stack.port, {**echo([block, {"type": "text", "text": "x"}]), "model": "embedder"}, path=PATH
        ).status

    large = "A" * (2 * 1024 * 1024)
    assert size_status(image(PNG + bytes(2 * 1024 * 1024))) == 400, "it is taken in; that model is none for chats"
    assert size_status({"type": "text", "text": large}) == 413
    assert size_status({"type": "tool_result", "tool_use_id": "t", "content": json.dumps({"data": large})}) == 413
    hidden = {"type": "tool_use", "id": "t", "name": "f", "input": {"data": large}}
    turns = [{"role": "assistant", "content": [hidden]}, {"role": "user", "content": "x"}]
    assert post(scripted_stack.port, {**echo(), "messages": turns}, path=PATH).status == 413, (
        "no image, whatever its name"
    )


@every_way
def test_a_real_model_names_the_stop_sequence_that_came(tiny_stack: Stack, ask: Ask) -> None:
    with claude(tiny_stack) as client:
        hello = [{"role": "user", "content": "Hello!"}]
        request = {"model": "tiny", "max_tokens": 50, "messages": hello, "extra_body": {"temperature": 0}}
        answer = ask(client, {**request, "stop_sequences": ["nothing", "help"]})
        assert shown(answer) == [{"type": "text", "text": "Hello! How can I "}]
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "help")


def test_a_tools_round_trip_with_a_real_model(tiny_stack: Stack) -> None:
    with claude(tiny_stack) as client:
        asked: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
        settings: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "tools": [WEATHER]}
        greedy = {"temperature": 0}
        called = client.messages.create(messages=asked, extra_body=greedy, **settings)
        with client.messages.stream(messages=asked, extra_body=greedy, **settings) as events:
            again = events.get_final_message()
        [call] = called.content
        assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Rome"})
        assert (called.stop_reason, shown(again)[0]["input"]) == ("tool_use", call.input)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny, 20 degrees"}
        turns = [*asked, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
        answer = client.messages.create(messages=turns, extra_body=greedy, **settings)
        assert shown(answer) == [{"type": "text", "text": "The weather in Rome is sunny, 20 degrees."}]
        assert answer.stop_reason == "end_turn"
        forced = client.messages.create(messages=asked, tool_choice={"type": "tool", "name": "get_weather"}, **settings)
        assert [block.type for block in forced.content] == ["tool_use"]


def test_an_assistants_last_words_are_continued(tiny_stack: Stack) -> None:
    with claude(tiny_stack) as client:
        turns: list[Any] = [{"role": "user", "content": "Hello!"}]
        settings: dict[str, Any] = {"model": "tiny", "max_tokens": 50, "extra_body": {"temperature": 0}}
        answer = client.messages.create(messages=turns, **settings).content[0].text
        begun, rest = answer[:10], answer[10:]
        for last, expected in ((begun, rest), ("", answer)):
            turns[1:] = [{"role": "assistant", "content": last}]
            again = client.messages.create(messages=turns, **settings)
            assert again.content[0].text.strip() == expected.strip()


def test_more_tokens_than_the_context_holds_may_be_asked_for(tiny_stack: Stack) -> None:
    with claude(tiny_stack) as client:
        answer = client.messages.create(
            model="tiny", max_tokens=64000, messages=[{"role": "user", "content": "Hello!"}]
        )
        assert answer.stop_reason == "end_turn"
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long") as caught:
            client.messages.create(model="tiny", max_tokens=5, messages=[{"role": "user", "content": "word " * 20000}])
        assert caught.value.error_code == "context_length_exceeded"


# errors


def refused(stack: Stack, **fields: Any) -> str:
    """The message of the 400 that a request gets."""
    reply = post(stack.port, {**echo(), **fields}, path=PATH)
    assert reply.status == 400, reply.body
    return error_of(reply, "invalid_request_error")["message"]


def error_of(reply: Any, kind: str) -> dict[str, Any]:
    """The error object; fails if the body has any other shape."""
    found = reply.json()
    assert set(found) == {"type", "error", "request_id"}, found
    assert (found["type"], found["error"]["type"]) == ("error", kind)
    assert found["request_id"] == reply.headers["request-id"]
    return found["error"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "'max_tokens'"),
        ({"max_tokens": 0}, "'max_tokens'"),
        ({"temperature": 1.5}, "'temperature'"),
        ({"top_k": 5}, "'top_k' asks for what the model 'echo' cannot do"),
        ({"seed": 5}, "Unknown parameter: 'seed'"),
        ({"mcp_servers": [{"name": "x"}]}, "'mcp_servers' is not supported"),
        ({"container": "c"}, "'container' is not supported"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "'context_management' is not"),
        ({"speed": "fast"}, "'speed' is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"'tools\[0\].type'"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, r"'tools\[0\].defer_loading' is not supported"),
        ({"tools": [WEATHER, WEATHER]}, "'tools'"),
        ({"tools": [WEATHER]}, "'tools' asks for what the model 'echo' cannot do"),
        ({"tool_choice": {"type": "any"}}, "'tool_choice'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "'tool_choice.name'"),
        ({"thinking": {"type": "enabled"}}, "'thinking.budget_tokens'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "'thinking.budget_tokens'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000}, "'thinking' asks for what"),
        ({"output_config": {"effort": "high"}}, "'output_config.effort' asks for what"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "'output_config.format' asks for what"),
        ({"messages": []}, "'messages'"),
        ({"messages": [{"role": "user", "content": []}]}, r"'messages\[0\].content'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"'messages\[0\].role'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"'messages\[0\].content\[0\].text'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
            r"'messages\[0\].content\[0\].type'.*'document'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x", "signature": ""}]}]},
            r"'messages\[0\].content\[0\].type'.*'thinking'",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}],
                    }
                ]
            },
            r"'messages\[0\].content\[0\].source.url'.*fetches nothing",
        ),
        ({"service_tier": "flex"}, "'service_tier'"),
        ({"stop_sequences": [""]}, r"'stop_sequences\[0\]'"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(echo_stack: Stack, fields: dict[str, Any], named: str) -> None:
    message = refused(echo_stack, **fields)
    assert re.search(named, message), message


def test_errors_are_the_clients_exceptions(echo_stack: Stack, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        client.messages.create(**echo(extra_body={"nonsense": 1}))
    assert (bad.value.type, bad.value.error_code) == ("invalid_request_error", "unknown_parameter")
    assert bad.value.request_id
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**{**echo(), "model": "no-such"})
    assert (missing.value.type, missing.value.error_code) == ("not_found_error", "model_not_found")
    with claude(echo_stack, api_key="sk-wrong") as stranger, pytest.raises(anthropic.AuthenticationError) as who:
        stranger.messages.create(**echo())
    assert who.value.type == "authentication_error"
    with pytest.raises(anthropic.APIStatusError) as large:
        client.messages.create(**echo("x" * 1_100_000))
    assert (large.value.status_code, large.value.type) == (413, "request_too_large")


def test_what_is_raised_before_any_route_has_anthropics_shape_too(echo_stack: Stack) -> None:
    port = echo_stack.port
    error_of(post(port, b"{", path=PATH), "invalid_request_error")
    wrong_type = post(port, echo(), path=PATH, headers={"content-type": "text/plain"})
    assert (wrong_type.status, error_of(wrong_type, "invalid_request_error") != {}) == (415, True)
    error_of(post(port, echo(), path=PATH, headers={"authorization": None}), "authentication_error")
    method = get(port, PATH)
    assert (method.status, error_of(method, "invalid_request_error") != {}) == (405, True)
    unknown = post(port, echo(), path=PATH + "/nonsense")
    assert (unknown.status, error_of(unknown, "not_found_error") != {}) == (404, True)


def test_the_key_may_come_as_x_api_key(echo_stack: Stack) -> None:
    as_header: dict[str, str | None] = {"authorization": None, "x-api-key": API_KEY}
    assert post(echo_stack.port, echo(), path=PATH, headers=as_header).status == 200
    assert post(echo_stack.port, echo(), path=PATH, headers={**as_header, "x-api-key": "sk-no"}).status == 401


def test_a_full_queue_is_an_overload_which_the_client_waits_for(stack: Stack) -> None:
    port = second_api(stack, FASTCHAT_Q_MAX_WAITING="1")
    echo_worker(stack, "--slots", "1", delay_ms=1)
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    running, waiting = Connection(port), Connection(port)
    endless = {"model": "echo", "messages": USER, "stream": True, "ignore_eos": True, "max_tokens": 100_000}
    running.send(endless)
    wait_until(lambda: stack.running("echo") == 1, "the slot is taken")
    waiting.send(endless)
    wait_until(lambda: stack.live("echo") == 2, "one waits")
    with claude(stack, port) as client:
        with pytest.raises(anthropic.OverloadedError) as full:
            client.messages.create(**echo())
        assert (full.value.type, full.value.error_code) == ("overloaded_error", "queue_full")
        assert int(full.value.response.headers["retry-after"]) >= 1
    timer = threading.Timer(0.5, lambda: (running.hang_up(), waiting.hang_up()))
    timer.start()
    with claude(stack, port, max_retries=10) as client:
        assert client.messages.create(**echo()).stop_reason == "end_turn", "when there was room, with no word of ours"
    timer.join()


def test_a_keys_own_limit_and_a_model_without_a_worker_have_errors_of_their_own(stack: Stack) -> None:
    worker = echo_worker(stack, delay_ms=0)
    key = stack.make_key("--rpm", "1")
    with claude(stack, api_key=key) as limited:
        limited.messages.create(**echo())
        with pytest.raises(anthropic.RateLimitError) as much:
            limited.messages.create(**echo())
    assert (much.value.type, much.value.error_code) == ("rate_limit_error", "rate_limit_exceeded")
    assert int(much.value.response.headers["retry-after"]) >= 1
    worker.stop()
    wait_until(lambda: get(stack.port, "/readyz").status == 503, "the API knows")
    with claude(stack) as client, pytest.raises(anthropic.ServiceUnavailableError) as away:
        client.messages.create(**echo())
    assert (away.value.type, away.value.error_code) == ("overloaded_error", "no_worker")
    assert int(away.value.response.headers["retry-after"]) >= 1


def test_a_job_that_fails_in_its_stream_ends_it_with_an_error_that_the_client_raises(stack: Stack) -> None:
    echo_worker(stack, delay_ms=20)
    with claude(stack) as client, client.messages.stream(**echo("w " * 300)) as events:
        next(events.text_stream)
        public = events.response.headers["x-job-id"]
        assert post(stack.port, {}, path=f"/v1/jobs/{public}/cancel").status == 200
        with pytest.raises(anthropic.APIStatusError) as caught:
            events.get_final_message()
    assert (caught.value.type, caught.value.error_code) == ("invalid_request_error", "cancelled")
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["request_id"] == events.response.headers["request-id"]
    again = Connection(stack.port)
    again.send(b"", method="GET", path=f"/v1/jobs/{public}/events", headers={"x-request-id": "mine"})
    again.head()
    _, said = events_of(again.events())[-1]
    assert said["request_id"] == "mine"


# going on


def blocks_of(connection: Connection) -> list[tuple[Any, str]]:
    """(id, event) of a whole stream, without comments and pings."""
    silent = (":", "event: ping")
    return [(connection.ids[-1], block) for block in connection.events() if block and not block.startswith(silent)]


def merged(blocks: list[tuple[Any, str]]) -> list[Any]:
    """Events with texts in a row as one: how they are cut is chance."""
    found: list[Any] = []
    for _, said in events_with_ids(blocks):
        delta = said.get("delta", {})
        before = found[-1].get("delta", {}) if found else {}
        if delta.get("type") == "text_delta" == before.get("type"):
            before["text"] += delta["text"]
        else:
            found.append(said)
    return found


def events_with_ids(blocks: list[tuple[Any, str]]) -> list[tuple[Any, dict[str, Any]]]:
    return [(at, events_of([block])[0][1]) for at, block in blocks]


@pytest.mark.parametrize("delay_ms", [0, 20])
def test_a_stream_that_is_cut_at_any_event_goes_on_behind_it(scripted_stack: Stack, delay_ms: int) -> None:
    connection = Connection(scripted_stack.port)
    connection.send(body(*STEPS, finish="tool_calls", delay_ms=delay_ms, stream=True), path=PATH)
    _, head = connection.head()
    events = blocks_of(connection)
    ids = [at for at, _ in events]
    assert len(set(ids)) == len(ids)
    assert [tuple(map(int, at.split("."))) for at in ids] == sorted(tuple(map(int, at.split("."))) for at in ids)
    everything = merged(events)
    again = resume(scripted_stack.port, head["x-job-id"], None)
    again.head()
    assert merged(blocks_of(again)) == everything
    for cut in range(len(events)):
        rest = resume(scripted_stack.port, head["x-job-id"], ids[cut])
        assert rest.head()[0] == 200
        assert merged(events[: cut + 1] + blocks_of(rest)) == everything, f"cut behind {ids[cut]}"


def test_an_id_that_no_event_has_had_is_refused(scripted_stack: Stack) -> None:
    connection = Connection(scripted_stack.port)
    connection.send(body(*STEPS, finish="tool_calls", stream=True), path=PATH)
    _, head = connection.head()
    blocks_of(connection)
    job = head["x-job-id"]
    assert get(scripted_stack.port, f"/v1/jobs/{job}/events", last_event_id="3").error()["code"] == "invalid_event_id"
    assert get(scripted_stack.port, f"/v1/jobs/{job}/events", last_event_id="3.").error()["code"] == "invalid_event_id"
    for never in ("2.1", "3.9", "14.7", "99.1"):
        stranger = resume(scripted_stack.port, job, never)
        stranger.head()
        [(name, said)] = events_of(stranger.events())
        assert (name, said["error"]["details"]["error_code"]) == ("error", "invalid_event_id"), never


def test_a_chats_events_have_no_such_ids(echo_stack: Stack) -> None:
    connection = Connection(echo_stack.port)
    connection.send({"model": "echo", "messages": USER, "stream": True})
    _, head = connection.head()
    list(connection.events())
    reply = get(echo_stack.port, f"/v1/jobs/{head['x-job-id']}/events", last_event_id="2.1")
    assert (reply.status, reply.error()["code"]) == (400, "invalid_event_id")


def test_workers_and_servers_that_are_killed_in_the_middle_cost_no_token(stack: Stack) -> None:
    words = " ".join(f"w{number}" for number in range(200))
    worker = echo_worker(stack, delay_ms=10)
    other = second_api(stack)
    wait_until(lambda: get(other, "/readyz").status == 200, "ready")
    connection = Connection(other)
    connection.send(echo(words, stream=True), path=PATH)
    _, head = connection.head()
    seen: list[tuple[Any, str]] = []
    api = stack.processes[-1]
    with pytest.raises((ConnectionError, OSError)):  # noqa: PT012
        for block in connection.events():
            if block and not block.startswith(":"):
                seen.append((connection.ids[-1], block))
            if len(seen) == 20:
                worker.kill()
                echo_worker(stack, delay_ms=10)
            if len(seen) == 60:
                api.kill()
    assert len(seen) >= 60
    rest = resume(stack.port, head["x-job-id"], seen[-1][0])
    assert rest.head()[0] == 200
    events = merged(seen + blocks_of(rest))
    [text] = [said["delta"]["text"] for said in events if said.get("delta", {}).get("type") == "text_delta"]
    assert text == words
    assert [said["type"] for said in events][-2:] == ["message_delta", "message_stop"]


def test_an_idempotency_key_stands_for_one_endpoint(echo_stack: Stack) -> None:
    """A body that is right for chats and for messages alike."""
    asked = {"model": "echo", "max_tokens": 9, "messages": USER}
    header: dict[str, str | None] = {"idempotency-key": "both"}
    first = post(echo_stack.port, asked, path=PATH, headers=header)
    assert post(echo_stack.port, asked, path=PATH, headers=header).json() == first.json()
    other = post(echo_stack.port, asked, headers=header)
    assert (other.status, other.error()["code"]) == (422, "idempotency_key_reused")


def test_a_client_that_leaves_cancels_its_job(echo_stack: Stack) -> None:
    connection = Connection(echo_stack.port)
    connection.send(echo("w " * 20000, max_tokens=20000, stream=True), path=PATH)
    connection.head()
    next(connection.events())
    assert echo_stack.running("echo") == 1
    connection.close()
    wait_until(lambda: echo_stack.live("echo") == 0, "it is cancelled")


# models


def test_the_clients_list_of_models_is_anthropics(scripted_stack: Stack) -> None:
    with claude(scripted_stack) as client:
        found = client.models.list(limit=1)
        assert (len(found.data), found.has_more) == (1, True)
        assert {model.id for model in found} == {"embedder", "ranker", "script"}, "page by page"
        one = client.models.retrieve("script")
        assert (one.type, one.id, one.max_input_tokens, one.lifecycle) == ("model", "script", 4096, "active")
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("no-such")
    listed = get(scripted_stack.port, "/v1/models", anthropic_version="2023-06-01").json()
    assert set(listed) == {"data", "has_more", "first_id", "last_id"}


# counting


def test_the_count_of_a_prompt_is_that_of_the_message(tiny_stack: Stack) -> None:
    cut: Any = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How"}]
    asked: Any = [{"role": "user", "content": [{"type": "text", "text": "What is the weather in Rome?"}]}]
    with claude(tiny_stack) as client:
        for prompt in (
            {"messages": asked},
            {"messages": asked, "system": "Be brief."},
            {"messages": asked, "tools": [WEATHER], "tool_choice": {"type": "auto"}},
            {"messages": asked, "tools": [WEATHER], "tool_choice": {"type": "none"}},
            {"messages": cut},
        ):
            counted = client.messages.count_tokens(model="tiny", **prompt)
            answer = client.messages.create(model="tiny", max_tokens=1, **prompt)
            assert counted.input_tokens == answer.usage.input_tokens, prompt
        with pytest.raises(anthropic.NotFoundError):
            client.messages.count_tokens(model="no-such", messages=asked)
        own: Any = {"max_tokens": 5, "stream": True, "temperature": 0.5, "stop_sequences": ["x"], "metadata": None}
        whole = client.messages.count_tokens(model="tiny", messages=asked, extra_body=own)
        assert whole == client.messages.count_tokens(model="tiny", messages=asked)
        with pytest.raises(anthropic.BadRequestError, match="Unknown parameter: 'max_token'"):
            client.messages.count_tokens(model="tiny", messages=asked, extra_body={"max_token": 5})
        beta = client.beta.messages.count_tokens(model="tiny", messages=asked, betas=["token-counting-2024-11-01"])
        assert beta.input_tokens == client.messages.count_tokens(model="tiny", messages=asked).input_tokens


def test_every_engine_that_has_words_counts_them(client: anthropic.Anthropic) -> None:
    assert client.messages.count_tokens(model="echo", messages=USER).input_tokens == 5
