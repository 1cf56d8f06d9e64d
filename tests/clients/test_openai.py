"""OpenAI's Python client, unmodified, on real workers: what its users do with it."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field

from ..http_client import get
from ..servers import wait_until
from ..stack import API_KEY, Stack
from .python.bias import TERSE

HELLO: Any = [{"role": "user", "content": "Hello!"}]
GREETING = "Hello! How can I help you?"
WEATHER: Any = [{"role": "user", "content": "What is the weather in Rome?"}]


class GetWeather(BaseModel):
    """Get the weather of a city"""

    city: str


class Add(BaseModel):
    """Add two numbers"""

    a: int
    b: int


class Address(BaseModel):
    street: str
    kind: Literal["home", "work"]


class Person(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)
    addresses: list[Address] = Field(max_length=2)


WEATHER_TOOL = openai.pydantic_function_tool(GetWeather, name="get_weather")
TOOLS = [WEATHER_TOOL, openai.pydantic_function_tool(Add, name="add")]


@pytest.fixture
def client(clients_stack: Stack) -> Iterator[openai.OpenAI]:
    with clients_stack.client() as client:
        yield client


@pytest.fixture
async def later(clients_stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    base = f"{clients_stack.base}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key=API_KEY, max_retries=0, timeout=60) as client:
        yield client


def test_the_address_and_the_key_may_come_from_the_environment(
    clients_stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{clients_stack.base}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    with openai.OpenAI() as client:
        answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
    assert answer.choices[0].message.content == GREETING


async def test_the_asynchronous_client_answers_and_streams(later: openai.AsyncOpenAI) -> None:
    answer = await later.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
    assert answer.choices[0].message.content == GREETING
    text = ""
    async for chunk in await later.chat.completions.create(model="tiny", messages=HELLO, temperature=0, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == GREETING


def test_the_streaming_helper_collects_the_answer(client: openai.OpenAI) -> None:
    options: Any = {"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2}
    with client.chat.completions.stream(model="tiny", messages=HELLO, temperature=0, **options) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_completion()
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (GREETING, "stop")
    assert answer.usage is not None
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert "".join(one.token for one in tokens).startswith(GREETING)
    assert all(len(one.top_logprobs) == 2 for one in tokens)
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= set(kinds)


async def test_the_asynchronous_streaming_helper_collects_it_too(later: openai.AsyncOpenAI) -> None:
    async with later.chat.completions.stream(model="tiny", messages=HELLO, temperature=0) as stream:
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.content == GREETING


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_class_comes_back_filled(client: openai.OpenAI, streamed: bool) -> None:
    """`tiny` knows no JSON: that it validates is the doing of constrained decoding."""
    fields: Any = {"model": "tiny", "messages": HELLO, "response_format": Person}
    if streamed:
        with client.chat.completions.stream(**fields) as stream:
            parsed = stream.get_final_completion().choices[0].message.parsed
    else:
        parsed = client.chat.completions.parse(**fields).choices[0].message.parsed
    assert isinstance(parsed, Person)


@pytest.mark.parametrize("seed", range(4))
def test_a_plain_json_schema_is_held_to(client: openai.OpenAI, seed: int) -> None:
    ok = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": ok, "strict": True}}
    create: Any = client.chat.completions.create
    answer = create(model="tiny", messages=HELLO, response_format=wanted, seed=seed)
    assert isinstance(json.loads(answer.choices[0].message.content)["ok"], bool)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_pydantic_tool_is_called_with_arguments_of_its_class(client: openai.OpenAI, streamed: bool) -> None:
    fields: Any = {
        "model": "tiny",
        "messages": WEATHER,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "logit_bias": TERSE,
        "temperature": 0,
    }
    if streamed:
        with client.chat.completions.stream(**fields) as stream:
            kinds = [event.type for event in stream]
            answer = stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds
        assert "tool_calls.function.arguments.done" in kinds
    else:
        answer = client.chat.completions.parse(**fields)
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Add)
    told: Any = [*WEATHER, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "6"}]
    assert client.chat.completions.create(model="tiny", messages=told, tools=TOOLS).choices[0].finish_reason


def test_allowed_tools_are_the_only_ones(client: openai.OpenAI) -> None:
    allowed: Any = {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]}
    answer = client.chat.completions.create(
        model="tiny",
        messages=WEATHER,
        tools=TOOLS,
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        logit_bias=TERSE,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls or []
    assert {call.function.name for call in calls if call.type == "function"} == {"add"}


@pytest.mark.parametrize("streamed", [False, True])
def test_several_choices_come_apart(client: openai.OpenAI, streamed: bool) -> None:
    fields: Any = {"model": "tiny", "messages": HELLO, "n": 3, "temperature": 0}
    if streamed:
        with client.chat.completions.stream(**fields) as stream:
            answer: ChatCompletion = stream.get_final_completion()
    else:
        answer = client.chat.completions.create(**fields)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(n, GREETING) for n in range(3)]


def test_raw_and_streaming_responses_show_the_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, temperature=0)
    assert raw.headers["x-request-id"] == raw.request_id
    assert raw.headers["x-job-id"].startswith("tiny.")
    assert raw.parse().choices[0].message.content == GREETING
    with client.chat.completions.with_streaming_response.create(
        model="tiny", messages=HELLO, temperature=0, stream=True
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_embeddings_are_the_same_in_both_formats(client: openai.OpenAI) -> None:
    encoded = client.embeddings.create(model="embedder", input=["w1 w2", "w3"])
    plain = client.embeddings.create(model="embedder", input=["w1 w2", "w3"], encoding_format="float")
    assert [one.index for one in encoded.data] == [0, 1]
    for one, other in zip(encoded.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
        assert sum(number**2 for number in one.embedding) == pytest.approx(1, abs=1e-5)
    assert encoded.usage.prompt_tokens == plain.usage.prompt_tokens > 0


async def test_models_are_listed_and_retrieved(client: openai.OpenAI, later: openai.AsyncOpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"tiny", "echo", "embedder"}
    assert [model.id async for model in later.models.list()] == [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").owned_by == "fastchat-q"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("tini")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("error", "code", "changes"),
    [
        (openai.BadRequestError, "invalid_value", {"temperature": 3}),
        (openai.BadRequestError, "unknown_parameter", {"extra_body": {"nonsense": 1}}),
        (openai.BadRequestError, "context_length_exceeded", {"max_tokens": 5000}),
        (openai.BadRequestError, "unsupported_parameter", {"model": "echo", "n": 2}),
        (openai.NotFoundError, "model_not_found", {"model": "tini"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_raises_the_clients_own_class(
    client: openai.OpenAI, error: type[openai.APIStatusError], code: str, changes: Any, stream: bool
) -> None:
    fields = {"model": "tiny", "messages": HELLO, "stream": stream, **changes}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**fields)
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_wrong_keys_and_missing_rights_raise_the_clients_own_classes(clients_stack: Stack) -> None:
    wrong = openai.OpenAI(base_url=f"{clients_stack.base}/v1", api_key="sk-wrong", max_retries=0)
    narrow = wrong.with_options(api_key=clients_stack.make_key("--model", "echo"))
    with wrong:
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.models.list()
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError):
            narrow.chat.completions.create(model="tiny", messages=HELLO)


def test_a_key_without_requests_left_is_told_when_to_come_back(clients_stack: Stack) -> None:
    key = clients_stack.make_key("--rpm", "1")
    base = f"{clients_stack.base}/v1"
    with openai.OpenAI(base_url=base, api_key=key, max_retries=0) as client:
        client.chat.completions.create(model="echo", messages=HELLO)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="echo", messages=HELLO)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_a_timeout_of_the_clients_own_is_raised_and_the_job_ends(clients_stack: Stack) -> None:
    with clients_stack.client() as client:
        began = time.monotonic()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(
                model="echo", messages=HELLO, max_tokens=5000, extra_body={"ignore_eos": True}
            )
    assert time.monotonic() - began < 5


def test_an_error_in_the_middle_of_a_stream_is_raised(clients_stack: Stack) -> None:
    with clients_stack.client() as client:
        fields: Any = {"max_tokens": 5000, "extra_body": {"ignore_eos": True}}
        raw = client.chat.completions.with_raw_response.create(model="echo", messages=HELLO, stream=True, **fields)
        stream = iter(raw.parse())
        next(stream)
        client.post(f"/jobs/{raw.headers['x-job-id']}/cancel", cast_to=object, body={})
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert not isinstance(caught.value, openai.APIConnectionError)
    assert "cancelled" in caught.value.message


def test_the_client_comes_back_when_the_server_said_that_there_is_a_worker_again(stack: Stack) -> None:
    """503 with Retry-After, which the client waits for by itself."""
    options = ("--model", "echo", "--engine", "echo")
    stack.start_worker(*options).stop()
    wait_until(lambda: get(stack.port, "/readyz").status == 503, "the API knows")
    with stack.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="echo", messages=HELLO)
        assert (caught.value.status_code, caught.value.code) == (503, "no_worker")
        assert int(caught.value.response.headers["retry-after"]) > 0
        late = stack.start("late", "worker", "--no-supervise", *options)
        patient = client.with_options(max_retries=8)
        assert patient.chat.completions.create(model="echo", messages=HELLO).choices[0].message.content == "Hello!"
    late.stop()


def test_an_unknown_path_is_an_error_of_the_same_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.post("/nothing", cast_to=object, body={})
    assert caught.value.body is not None
