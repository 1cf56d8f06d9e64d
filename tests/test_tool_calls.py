"""Tools behind the whole path, with the built-in model and the official client."""

import json
from random import Random
from typing import Any

import jsonschema
import openai
import pytest
from fastchat_q.workers.engines.tiny.dialogues import TOOLS

from .stack import Stack

DEFINITIONS = [tool.definition(name) for name, tool in TOOLS.items()]
WEATHER = "What is the weather in Rome?"
LETTER = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "minLength": 900, "maxLength": 1000}},
            "required": ["text"],
        },
    },
}
Said = tuple[str, list[tuple[str, str]], str]


def ask(client: openai.OpenAI, messages: str | list[Any], *, stream: bool, **fields: Any) -> Said:
    """(content, names and arguments of calls, finish reason) of an answer."""
    create: Any = client.chat.completions.create
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    fields = {"model": "tiny", "tools": DEFINITIONS, "temperature": 0, **fields}
    if not stream:
        choice = create(messages=messages, **fields).choices[0]
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        return choice.message.content or "", calls, choice.finish_reason
    return collected(create(messages=messages, stream=True, **fields))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{"max_tokens": 2}, {"max_tokens": 10}, {"stop": ['"']}, {"stop": ["name"]}])
def test_a_call_that_is_cut_off_is_never_content(tiny_stack: Stack, stream: bool, fields: dict[str, Any]) -> None:
    with tiny_stack.client() as client:
        text, _, reason = ask(client, WEATHER, stream=stream, tool_choice="required", **fields)
    assert text == ""
    assert reason in ("length", "stop")


def collected(chunks: Any) -> Said:
    """The same of a stream."""
    text, calls, reason, ids = "", [], "", []
    for chunk in chunks:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or ():
            if delta.function.name:
                assert delta.index == len(calls)
                calls.append([delta.function.name, ""])
                ids.append(delta.id)
            calls[delta.index][1] += delta.function.arguments or ""
    assert len(set(ids)) == len(ids) == len(calls)
    assert all(ids)
    return text, [(name, arguments) for name, arguments in calls], reason


both = pytest.mark.parametrize("stream", [False, True])


@both
def test_the_model_calls_a_tool_of_itself(tiny_stack: Stack, stream: bool) -> None:
    with tiny_stack.client() as client:
        said = ask(client, WEATHER, stream=stream)
    assert said == ("", [("get_weather", '{"city": "Rome"}')], "tool_calls")


@both
def test_an_answer_without_a_call_is_content(tiny_stack: Stack, stream: bool) -> None:
    with tiny_stack.client() as client:
        said = ask(client, "Hello!", stream=stream)
    assert said == ("Hello! How can I help you?", [], "stop")


@both
def test_the_result_of_a_tool_is_put_into_words(tiny_stack: Stack, stream: bool) -> None:
    with tiny_stack.client() as client:
        asked: list[Any] = [{"role": "user", "content": WEATHER}]
        called = (
            client.chat.completions.create(
                model="tiny",
                messages=asked,
                tools=DEFINITIONS,
                temperature=0,  # type: ignore[arg-type]
            )
            .choices[0]
            .message
        )
        assert called.tool_calls is not None
        result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sunny, 20 degrees"}
        said = ask(client, [*asked, called, result], stream=stream)
    assert said == ("The weather in Rome is sunny, 20 degrees.", [], "stop")


@both
def test_a_named_function_is_called_whatever_is_asked(tiny_stack: Stack, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    with tiny_stack.client() as client:
        text, [(name, arguments)], reason = ask(client, "Hello!", stream=stream, tool_choice=choice, max_tokens=200)
    assert (text, name, reason) == ("", "add", "tool_calls")
    jsonschema.validate(json.loads(arguments), TOOLS["add"].definition("add")["function"]["parameters"])


@both
def test_with_tool_choice_none_a_call_is_not_looked_for(tiny_stack: Stack, stream: bool) -> None:
    with tiny_stack.client() as client:
        text, calls, reason = ask(client, "Hello!", stream=stream, tool_choice="none")
    assert (text, calls, reason) == ("Hello! How can I help you?", [], "stop")


def test_a_call_that_must_come_is_valid_in_50_of_50_runs(tiny_stack: Stack) -> None:
    """At a temperature of 1: the grammar makes it so, not the model. Every second may be several calls."""
    rng = Random(0)
    with tiny_stack.client() as client:
        for seed in range(50):
            name = rng.choice(list(TOOLS))
            prompt = TOOLS[name].generate(rng).prompt
            fields = {"temperature": 1, "seed": seed, "max_tokens": 600, "parallel_tool_calls": seed % 2 == 0}
            text, calls, reason = ask(client, prompt, stream=seed % 3 == 0, tool_choice="required", **fields)
            assert (text, reason) == ("", "tool_calls")
            assert len(calls) == 1 or (calls and seed % 2 == 0)
            for called, arguments in calls:
                schema = TOOLS[called].definition(called)["function"]["parameters"]
                jsonschema.validate(json.loads(arguments), schema)


@both
def test_a_function_is_called_with_no_argument_that_it_does_not_declare(tiny_stack: Stack, stream: bool) -> None:
    parameters = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": "now", "description": "The time", "parameters": parameters}}
    with tiny_stack.client() as client:
        for seed in range(5):
            fields = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
            _, calls, _ = ask(client, "What time is it in Rome?", stream=stream, temperature=1, **fields)
            assert [(name, json.loads(arguments)) for name, arguments in calls] == [("now", {})]


def test_a_strict_function_whose_schema_cannot_be_held_to_is_refused(tiny_stack: Stack) -> None:
    parameters = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    with tiny_stack.client() as client, pytest.raises(openai.BadRequestError) as caught:
        ask(client, "Hello!", stream=False, tools=[tool], tool_choice="required")
    assert caught.value.param == "tools"


def test_a_worker_that_dies_within_a_call_is_not_noticed(stack: Stack) -> None:
    arguments = ("--model", "tiny", "--slots", "2", "--threads", "1")
    first = stack.start_worker(*arguments)
    fields: dict[str, Any] = {
        "model": "tiny",
        "tools": [LETTER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 1,
        "seed": 7,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "stream": True,
    }
    with stack.client() as client:
        create: Any = client.chat.completions.create
        undisturbed = collected(create(**fields))
        assert undisturbed[2] == "tool_calls"

        def with_a_death() -> Any:
            fragments = 0
            for chunk in create(**fields):
                yield chunk
                fragments += bool(chunk.choices and chunk.choices[0].delta.tool_calls)
                if fragments == 5 and first.alive:
                    first.kill()
                    assert stack.running("tiny") == 1, "it died within the call"
                    stack.start_worker(*arguments)

        assert collected(with_a_death()) == undisturbed
    assert not first.alive


def test_what_a_model_can_do_depends_on_its_parser(stack: Stack) -> None:
    stack.start_worker("--model", "tiny", "--tool-call-parser", "none", "--reasoning-parser", "qwen3")
    with stack.client() as client:
        [model] = client.models.list().data
        features = getattr(model, "features")  # noqa: B009 (an extension that the client's type does not know)
        assert "tools" not in features
        assert "reasoning" in features
        with pytest.raises(openai.BadRequestError, match="'tools' asks for what the model 'tiny' cannot do"):
            ask(client, WEATHER, stream=False)
