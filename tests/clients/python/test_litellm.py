"""LiteLLM with the provider ``openai`` on our address."""

import json
from typing import Any

import litellm
import pytest
from bias import END, TERSE
from conftest import API_KEY, BASE_URL

HELLO = [{"role": "user", "content": "Hello!"}]
GREETING = "Hello! How can I help you?"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NUMBERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
    for name, description, parameters in (
        ("get_weather", "Get the weather of a city", CITY),
        ("add", "Add two numbers", NUMBERS),
        ("get_time", "Get the time in a city", CITY),
    )
]
"""Those that `tiny` has learnt to call of itself."""


def options(**more: Any) -> dict[str, Any]:
    return {"model": "openai/tiny", "api_base": BASE_URL, "api_key": API_KEY, "temperature": 0, **more}


def test_a_completion() -> None:
    answer = litellm.completion(messages=HELLO, **options())
    assert answer.choices[0].message.content == GREETING
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 9


def test_a_stream_with_usage() -> None:
    chunks = list(litellm.completion(messages=HELLO, stream=True, stream_options={"include_usage": True}, **options()))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == GREETING
    whole = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert (whole.choices[0].message.content, whole.usage.completion_tokens) == (GREETING, 9)


async def test_an_asynchronous_completion_and_stream() -> None:
    answer = await litellm.acompletion(messages=HELLO, **options())
    assert answer.choices[0].message.content == GREETING
    text = ""
    async for chunk in await litellm.acompletion(messages=HELLO, stream=True, **options()):
        text += chunk.choices[0].delta.content or ""
    assert text == GREETING


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_answered(stream: bool) -> None:
    asked = [{"role": "user", "content": "What is the weather in Rome?"}]
    answer = litellm.completion(messages=asked, tools=TOOLS, stream=stream, **options())
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=asked)
    said = answer.choices[0].message
    [call] = said.tool_calls
    assert (call.function.name, answer.choices[0].finish_reason) == ("get_weather", "tool_calls")
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "sunny, 20 degrees"}
    told = litellm.completion(messages=[*asked, said, result], tools=TOOLS, **options())
    assert told.choices[0].message.content == "The weather in Rome is sunny, 20 degrees."


def test_a_response_format_of_a_model_class() -> None:
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    answer = litellm.completion(messages=HELLO, response_format=Person, logit_bias=TERSE, **options())
    assert Person.model_validate_json(answer.choices[0].message.content).age == 3


def test_what_openai_does_not_have_is_dropped_or_goes_through() -> None:
    answer = litellm.completion(messages=HELLO, drop_params=True, top_k=1, **options())
    assert answer.choices[0].message.content == GREETING
    answer = litellm.completion(messages=HELLO, extra_body={"top_k": 1, "min_p": 0.5}, **options())
    assert answer.choices[0].message.content == GREETING


def test_a_completion_of_a_text() -> None:
    where = {"api_base": BASE_URL, "api_key": API_KEY}
    answer = litellm.text_completion(
        model="text-completion-openai/tiny", prompt="Hello", max_tokens=3, temperature=0, **where
    )
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response(stream: bool) -> None:
    answer = litellm.responses(input="Hello!", stream=stream, **options())
    if stream:
        answer = [event for event in answer if event.type == "response.completed"][-1].response
    assert answer.output[0].content[0].text == GREETING


def test_embeddings() -> None:
    two = litellm.embedding(model="openai/embedder", input=["w1 w2", "w3"], api_base=BASE_URL, api_key=API_KEY)
    assert [one["index"] for one in two.data] == [0, 1]
    assert len(two.data[0]["embedding"]) == 32


def test_errors_have_litellms_classes() -> None:
    for error, changes in (
        (litellm.NotFoundError, {"model": "openai/tini"}),
        (litellm.AuthenticationError, {"api_key": "sk-wrong"}),
        (litellm.ContextWindowExceededError, {"max_tokens": 5000}),
        (litellm.BadRequestError, {"extra_body": {"nonsense": 1}}),
    ):
        with pytest.raises(error):
            litellm.completion(messages=HELLO, **options(**changes))


def test_an_answer_that_ends_early_says_so() -> None:
    answer = litellm.completion(messages=HELLO, max_tokens=2, logit_bias={END: -100}, **options())
    assert answer.choices[0].finish_reason == "length"
