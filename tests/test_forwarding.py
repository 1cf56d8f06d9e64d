"""A worker that forwards, against a real upstream: another stack of ours, with processes of its own."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from .http_client import post
from .stack import API_KEY, Process, Stack, running_stack, wait_until
from .streams import ENDLESS, LONG, WORDS, echo_worker, open_stream, read_words, start_stream, stream_text, text_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a given city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}


@pytest.fixture
def upstream(folder: Path) -> Iterator[Stack]:
    """The other side: a stack with no worker yet."""
    (folder / "up").mkdir()
    with running_stack(folder / "up") as running:
        yield running


def forward(stack: Stack, upstream: Stack, model: str = "echo", *arguments: str, **environment: str) -> Process:
    """A worker of ``stack`` that forwards to ``upstream``'s API server."""
    flags = ("--engine", "openai", "--base-url", f"{upstream.base}/v1", "--api-key-env", "UPSTREAM_KEY")
    return stack.start_worker("--model", model, *flags, *arguments, **{"UPSTREAM_KEY": API_KEY, **environment})


def test_an_answer_is_the_upstreams_to_the_letter_streamed_and_whole(stack: Stack, upstream: Stack) -> None:
    upstream.start_worker("--model", "tiny", "--threads", "1")
    forward(stack, upstream, "tiny", "--name", "far")
    direct = upstream.client().chat.completions.create(model="tiny", **ASK)
    whole = stack.client().chat.completions.create(model="far", **ASK)
    assert whole.choices[0].message.content == direct.choices[0].message.content
    assert (whole.usage, whole.choices[0].finish_reason) == (direct.usage, direct.choices[0].finish_reason)
    chunks = list(
        stack.client().chat.completions.create(model="far", **ASK, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == direct.choices[0].message.content
    assert chunks[-1].usage == direct.usage
    assert len(chunks) > 5, "in pieces"


def test_our_own_messages_api_and_the_forwarder_to_such_an_api_are_two_halves(stack: Stack, upstream: Stack) -> None:
    """A chat here becomes a message there: by the queue of this side, Anthropic's client, and the queue of that."""
    upstream.start_worker("--model", "tiny", "--threads", "1")
    arguments = ("--engine", "anthropic", "--base-url", upstream.base, "--api-key-env", "UPSTREAM_KEY")
    stack.start_worker("--model", "tiny", *arguments, "--name", "far", UPSTREAM_KEY=API_KEY)
    near, far = upstream.client(), stack.client()
    cards = [client.models.retrieve(name).model_extra or {} for client, name in ((near, "tiny"), (far, "far"))]
    assert cards[0]["max_model_len"] == cards[1]["max_model_len"]
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "tools": [WEATHER]}
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
    direct = near.chat.completions.create(model="tiny", messages=messages, **settings)
    called = far.chat.completions.create(model="far", messages=messages, **settings)
    for answer in (direct, called):
        [call] = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Rome"})
    assert (called.usage, called.choices[0].finish_reason) == (direct.usage, "tool_calls")
    messages += [called.choices[0].message]
    messages += [
        {"role": "tool", "tool_call_id": called.choices[0].message.tool_calls[0].id, "content": "sunny, 20 degrees"}
    ]
    chunks = list(far.chat.completions.create(model="far", messages=messages, stream=True, **settings))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "The weather in Rome is sunny, 20 degrees."
    assert len(chunks) > 5, "in pieces"
    stopped = far.chat.completions.create(model="far", **ASK, stop=["I "])
    assert (stopped.choices[0].finish_reason, stopped.choices[0].message.content) == ("stop", "")
    with pytest.raises(openai.BadRequestError, match="prompt is too long"):
        far.chat.completions.create(model="far", messages=[{"role": "user", "content": "word " * 20000}])


def test_limits_and_stops_are_the_upstreams(stack: Stack, upstream: Stack) -> None:
    echo_worker(upstream, delay_ms=0)
    forward(stack, upstream)
    client = stack.client()
    cut = client.chat.completions.create(**LONG, max_tokens=7)
    assert (cut.choices[0].finish_reason, cut.usage and cut.usage.completion_tokens) == ("length", 7)
    stopped = client.chat.completions.create(**LONG, stop=["w5"])
    assert (stopped.choices[0].finish_reason, stopped.choices[0].message.content) == ("stop", "w0 w1 w2 w3 w4 ")


def test_a_client_that_leaves_ends_the_work_upstream(stack: Stack, upstream: Stack) -> None:
    echo_worker(upstream)
    forward(stack, upstream)
    connection, _ = open_stream(stack.port, ENDLESS)
    read_words(stream_text(connection), 20)
    assert upstream.running("echo") == 1
    connection.hang_up()
    wait_until(lambda: stack.live("echo") == 0, "it is cancelled here")
    wait_until(lambda: upstream.live("echo") == 0, "and there, within the grace for a client that comes back", 5)


def test_a_full_upstream_makes_jobs_wait_and_none_fail(stack: Stack, upstream: Stack) -> None:
    upstream.api.stop()
    upstream.start_api(upstream.port, FASTCHAT_Q_MAX_WAITING="1")
    echo_worker(upstream, "--slots", "1", delay_ms=1)
    worker = forward(stack, upstream, "echo", "--slots", "8")
    streams = [start_stream(stack.port, {**LONG, "max_tokens": 200}) for _ in range(8)]
    assert [connection.head()[0] for connection in streams] == [200] * 8
    texts = [text_of(connection.events()) for connection in streams]
    assert [len(text.split()) for text in texts] == [200] * 8
    said = worker.output()
    assert "upstream_busy" in said, "it was told to wait"
    assert "fewer jobs at a time" in said


def test_an_upstream_that_is_away_makes_jobs_wait_and_the_registry_says_so(stack: Stack, upstream: Stack) -> None:
    echo_worker(upstream, delay_ms=1)
    worker = forward(stack, upstream)
    upstream.api.kill()
    connection, job_id = open_stream(stack.port, {**LONG, "max_tokens": 20})
    wait_until(lambda: "cannot be reached" in (stack.registration(worker.pid) or {})["reason"], "the registry says so")
    more = [open_stream(stack.port, {**LONG, "max_tokens": 20}) for _ in range(3)]
    upstream.start_api(upstream.port)
    for stream, _ in [(connection, job_id), *more]:
        assert text_of(list(stream.events())).split() == WORDS[:20]
    wait_until(lambda: not (stack.registration(worker.pid) or {})["reason"], "all is well again")


@pytest.mark.parametrize("model", ["echo", "tiny"])
def test_an_upstream_that_dies_in_an_answer_is_asked_again_and_no_word_comes_twice(
    stack: Stack, upstream: Stack, model: str
) -> None:
    if model == "echo":
        echo_worker(upstream, delay_ms=5)
        body = {**LONG, "max_tokens": 300}
    else:
        upstream.start_worker("--model", "tiny", "--threads", "1")
        content = "Tell me a story."
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "seed": 7, "ignore_eos": True}
        body["max_tokens"] = 400
    expected = upstream.client().chat.completions.create(
        **{k: v for k, v in body.items() if k != "ignore_eos"}, extra_body={"ignore_eos": body.get("ignore_eos", False)}
    )
    worker = forward(stack, upstream, model)
    connection, _ = open_stream(stack.port, body)
    text = stream_text(connection)
    begun = read_words(text, 20)
    upstream.api.kill()
    upstream.start_api(upstream.port)
    assert begun + "".join(text) == expected.choices[0].message.content
    assert "upstream" in worker.output()


def test_a_worker_that_dies_in_an_answer_is_replaced_and_no_word_comes_twice(stack: Stack, upstream: Stack) -> None:
    echo_worker(upstream, delay_ms=5)
    first = forward(stack, upstream)
    connection, _ = open_stream(stack.port, {**LONG, "max_tokens": 300})
    text = stream_text(connection)
    begun = read_words(text, 20)
    forward(stack, upstream)
    first.kill()
    assert (begun + "".join(text)).split() == WORDS[:300]


def test_an_answer_that_comes_out_differently_the_second_time_is_an_honest_error(stack: Stack, upstream: Stack) -> None:
    echo = echo_worker(upstream, delay_ms=20)
    worker = forward(stack, upstream)
    messages = [{"role": "user", "content": "one two three"}]
    connection, _ = open_stream(stack.port, {**ENDLESS, "messages": messages, "max_tokens": 900})
    events = connection.events()
    for _ in range(30):
        next(events)
    worker.kill()
    echo.stop()
    upstream.start_worker("--model", "tiny", "--name", "echo", "--threads", "1")
    forward(stack, upstream)
    error = json.loads(list(events)[-1].removeprefix("data: "))["error"]
    assert error["code"] == "cannot_resume"
    assert "came out differently" in error["message"]


def test_a_wrong_key_stops_the_worker_at_its_start(stack: Stack, upstream: Stack) -> None:
    flags = ("--engine", "openai", "--base-url", f"{upstream.base}/v1", "--api-key-env", "UPSTREAM_KEY")
    worker = stack.start("wrong", "worker", "--model", "echo", *flags, UPSTREAM_KEY="sk-wrong-secret")
    assert worker.wait() == 2
    assert "refuses the key (HTTP 401)" in worker.output()
    assert "sk-wrong-secret" not in worker.output()


def test_a_key_that_is_refused_later_is_the_operators_fault_and_stays_secret(stack: Stack, upstream: Stack) -> None:
    echo_worker(upstream, delay_ms=0)
    worker = forward(stack, upstream)
    upstream.api.stop()
    upstream.start_api(upstream.port, FASTCHAT_Q_API_KEY="sk-fcq-another")
    with pytest.raises(openai.APIStatusError) as raised:
        stack.client().chat.completions.create(**LONG)
    assert (raised.value.status_code, raised.value.code) == (502, "upstream_refused")
    assert API_KEY not in str(raised.value)
    assert API_KEY not in worker.output()


def test_a_model_that_upstream_does_not_have_is_the_operators_fault(stack: Stack, upstream: Stack) -> None:
    worker = forward(stack, upstream, "nobody")
    with pytest.raises(openai.APIStatusError) as raised:
        stack.client().chat.completions.create(model="nobody", messages=LONG["messages"])
    assert (raised.value.status_code, raised.value.code) == (502, "upstream_refused")
    assert "upstream does not list the model" in worker.output()


def test_what_upstream_refuses_comes_back_as_it_said_it(stack: Stack, upstream: Stack) -> None:
    upstream.start_worker("--model", "tiny", "--threads", "1")
    forward(stack, upstream, "tiny")
    long = "word " * 3000
    replies = [
        post(port, {"model": "tiny", "messages": [{"role": "user", "content": long}]})
        for port in (upstream.port, stack.port)
    ]
    assert [reply.status for reply in replies] == [400, 400]
    assert replies[0].error() == replies[1].error()


def test_a_stop_drains_what_is_under_way(stack: Stack, upstream: Stack) -> None:
    echo_worker(upstream, delay_ms=2)
    worker = forward(stack, upstream)
    connection, _ = open_stream(stack.port, {**LONG, "max_tokens": 200})
    text = stream_text(connection)
    begun = read_words(text, 5)
    worker.signal(signal.SIGTERM)
    assert (begun + "".join(text)).split() == WORDS[:200]
    assert worker.wait() == 0
