"""Chat completions through the whole path: official client, real API process, real Redis, real echo worker."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fastchat_q import keys

from .http_client import CHAT, Connection, get, post
from .servers import wait_until
from .stack import Stack

HELLO = [{"role": "user", "content": "the quick  brown 🦊 jumps\nüber"}]
TEXT = HELLO[0]["content"]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": HELLO, **fields}


@pytest.fixture
def client(echo_stack: Stack) -> Iterator[openai.OpenAI]:
    with echo_stack.client() as client:
        yield client


def test_a_completion_has_openais_shape_to_the_field(echo_stack: Stack) -> None:
    reply = post(echo_stack.port, chat())
    assert reply.status == 200
    body = reply.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12},
        "service_tier": "default",
        "system_fingerprint": None,
    }
    ChatCompletion.model_validate(reply.json(), strict=True)
    assert reply.headers["x-job-id"].startswith("echo.")
    assert reply.headers["x-request-id"]


def test_a_stream_has_openais_shape_to_the_field(echo_stack: Stack) -> None:
    connection = Connection(echo_stack.port)
    connection.send(chat(stream=True, stream_options={"include_usage": True}))
    status, headers = connection.head()
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    blocks = list(connection.events())
    connection.close()
    assert blocks[-1] == "data: [DONE]"
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-1] if not block.startswith(":")]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == TEXT


def test_without_include_usage_no_chunk_speaks_of_usage(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="echo", messages=HELLO, stream=True))  # type: ignore[call-overload]
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_cuts_and_says_length(client: openai.OpenAI, stream: bool) -> None:
    text, reason = complete(client, stream, max_tokens=2)
    assert (text, reason) == ("the quick", "length")
    assert complete(client, stream, max_completion_tokens=1) == ("the", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_is_held_back_and_never_shown(client: openai.OpenAI, stream: bool) -> None:
    assert complete(client, stream, stop=["quick  bro", "zzz"]) == ("the ", "stop")
    assert complete(client, stream, stop="quick  bro!") == (TEXT, "stop")


def test_text_parts_are_joined_and_developers_are_heard(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "a b"}, {"type": "text", "text": " c"}]
    messages: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="echo", messages=messages)
    assert answer.choices[0].message.content == "a b c"


@pytest.mark.parametrize("dumped", [False, True])
def test_an_answer_can_be_sent_back_in_the_next_turn(client: openai.OpenAI, dumped: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "one"}]
    answer = client.chat.completions.create(model="echo", messages=messages).choices[0].message
    messages += [answer.model_dump() if dumped else answer, {"role": "user", "content": "two"}]
    again = client.chat.completions.create(model="echo", messages=messages)
    assert again.choices[0].message.content == "two"


def test_parameters_that_ask_for_nothing_are_accepted(echo_stack: Stack) -> None:
    nothing = {
        "n": 1,
        "logprobs": False,
        "tools": None,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "store": False,
        "metadata": {"a": "b"},
        "user": "u",
        "top_p": 1,
        "service_tier": "auto",
        "seed": None,
        "stop": None,
        "max_tokens": None,
        "temperature": None,
    }
    assert post(echo_stack.port, chat(**nothing)).status == 200


def test_flex_requests_wait_in_the_batch_lane(echo_stack: Stack) -> None:
    reply = post(echo_stack.port, chat(service_tier="flex"))
    assert (reply.status, reply.json()["service_tier"]) == (200, "flex")
    job_id = reply.headers["x-job-id"].removeprefix("echo.")
    assert echo_stack.redis.hget(keys.model_keys("echo").job(job_id), "lane") == "lo"


def test_the_model_list_and_a_model_have_openais_shape(echo_stack: Stack, client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("echo", "model", "fastchat-q")
    assert client.models.retrieve("echo") == model
    shown = get(echo_stack.port, "/v1/models/echo", authorization=f"Bearer {client.api_key}").json()
    assert set(shown) == {"id", "object", "created", "owned_by", "state", "max_model_len", "kind", "features"}
    assert (shown["max_model_len"], shown["kind"]) == (None, "chat")
    assert shown["features"] == ["completions", "tokenize"]


def test_probes_need_no_key(echo_stack: Stack) -> None:
    assert get(echo_stack.port, "/healthz", authorization=None).json() == {"status": "ok"}
    assert get(echo_stack.port, "/readyz", authorization=None).json() == {"status": "ready", "models": ["echo"]}


def test_openapi_describes_the_routes(echo_stack: Stack) -> None:
    document = get(echo_stack.port, "/openapi.json", authorization=None).json()
    assert {CHAT, "/v1/models", "/v1/models/{model}", "/healthz", "/readyz"} <= set(document["paths"])
    assert "ChatRequest" in document["components"]["schemas"]


def test_64_streams_at_once_all_complete(echo_stack: Stack) -> None:
    connections = [Connection(echo_stack.port) for _ in range(64)]
    for number, connection in enumerate(connections):
        connection.send(chat(stream=True, messages=[{"role": "user", "content": f"stream {number} " + "w " * 30}]))
    for number, connection in enumerate(connections):
        connection.head()
        blocks = list(connection.events())
        assert blocks[-1] == "data: [DONE]"
        assert f" {number}" in "".join(blocks)
        connection.close()
    wait_until(lambda: echo_stack.live("echo") == 0, "no job is left")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_a_running_job_cancels_it(echo_stack: Stack, stream: bool) -> None:
    connection = Connection(echo_stack.port)
    connection.send(chat(stream=stream, max_tokens=100_000, ignore_eos=True))
    wait_until(lambda: echo_stack.running("echo") == 1, "the job runs")
    if stream:
        connection.head()
        next(connection.events())
    connection.close()
    wait_until(lambda: echo_stack.running("echo") == 0, "the slot is free")
    assert echo_stack.live("echo") == 0


def complete(client: openai.OpenAI, stream: bool, **fields: Any) -> tuple[str, str]:
    """(text, finish reason) of a chat, streamed or not."""
    if not stream:
        choice = client.chat.completions.create(model="echo", messages=HELLO, **fields).choices[0]  # type: ignore[call-overload]
        return choice.message.content, choice.finish_reason
    chunks = list(client.chat.completions.create(model="echo", messages=HELLO, stream=True, **fields))  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return text, chunks[-1].choices[0].finish_reason
