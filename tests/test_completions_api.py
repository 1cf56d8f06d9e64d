"""Completions and tokens through the whole path: official client, real API process, real Redis, real workers."""

import json
from collections.abc import Iterable
from typing import Any

import openai
import pytest
from fastchat_q.api import answers
from fastchat_q.api.completions import MAX_LOGPROBS
from fastchat_q.api.counts import told
from fastchat_q.api.endpoints import ENDPOINTS
from fastchat_q.api.render import View
from fastchat_q.api.text_completion import Places, logprobs
from fastchat_q.api.tokenize import DetokenizeRequest, asked_count
from openai.types import Completion

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import Alternative, Delta, End, Piece, TokenLogprob, token_bytes
from fastchat_q.jobs import MAX_CHOICES, Job, Message
from fastchat_q.settings import Settings

from .http_client import Connection, get, post
from .stack import API_KEY, Stack, make_key, wait_until
from .streams import WORDS, echo_worker, events_until, resume, second_api

PATH = "/v1/completions"
TEXT = "the quick  brown 🦊 jumps\nüber"
PROMPT = "The capital of France is"


def ask(stack: Stack, model: str = "echo", **fields: Any) -> Any:
    return post(stack.port, {"model": model, "prompt": TEXT, **fields}, path=PATH)


def open_stream(port: int, body: dict[str, Any], **headers: str) -> tuple[Connection, str]:
    connection = Connection(port)
    named: dict[str, str | None] = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.send({**body, "stream": True}, path=PATH, headers=named)
    status, head = connection.head()
    assert status == 200, head
    return connection, head["x-job-id"]


def chunks_of(blocks: Iterable[str]) -> list[dict[str, Any]]:
    return [json.loads(block.removeprefix("data: ")) for block in blocks if block.startswith("data: {")]


def texts_of(chunks: Iterable[dict[str, Any]], count: int = 1) -> list[str]:
    texts = [""] * count
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


def test_a_completion_has_openais_shape_to_the_field(echo_stack: Stack) -> None:
    reply = ask(echo_stack)
    assert reply.status == 200
    body = reply.json()
    Completion.model_validate(body, strict=True)
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "echo",
        "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12},
        "system_fingerprint": None,
    }
    assert reply.headers["x-job-id"].startswith("echo.")


def test_a_stream_has_openais_shape_and_an_id_for_each_event(echo_stack: Stack) -> None:
    body = {"model": "echo", "prompt": TEXT, "stream_options": {"include_usage": True}}
    connection, _ = open_stream(echo_stack.port, body)
    blocks = [block for block in connection.events() if not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    assert len(blocks) == len(connection.ids) == len(set(connection.ids))
    assert connection.ids[-3:] == [7, 8, 9], "finish reason, usage, [DONE]"
    chunks = chunks_of(blocks)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert texts_of(chunks) == [TEXT]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_a_request_are_one_job_with_a_choice_each(echo_stack: Stack, stream: bool) -> None:
    prompts = ["one", "two words", "and three more"]
    with echo_stack.client() as client:
        before = len(echo_stack.records("echo"))
        asked: Any = {"model": "echo", "prompt": prompts, "max_tokens": 2, "echo": True}
        if stream:
            chunks = [chunk.model_dump() for chunk in client.completions.create(**asked, stream=True)]
            texts = texts_of(chunks, 3)
            finishes = {
                one["index"]: one["finish_reason"] for c in chunks for one in c["choices"] if one["finish_reason"]
            }
        else:
            answer = client.completions.create(**asked)
            texts = [choice.text for choice in answer.choices]
            finishes = {choice.index: choice.finish_reason for choice in answer.choices}
            assert answer.usage is not None
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 5)
        assert len(echo_stack.records("echo")) == before + 1
    assert texts == ["oneone", "two wordstwo words", "and three moreand three"]
    assert finishes == {0: "stop", 1: "stop", 2: "length"}


def test_sixteen_tokens_are_the_default(echo_stack: Stack) -> None:
    choice = ask(echo_stack, prompt=" ".join(WORDS)).json()["choices"][0]
    assert (len(choice["text"].split()), choice["finish_reason"]) == (16, "length")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"suffix": "the end"}, "suffix", "unsupported_parameter"),
    ({"max_tokens": 0}, "max_tokens", ""),
    ({"logprobs": MAX_LOGPROBS + 1}, "logprobs", ""),
    ({"logprobs": True}, "logprobs", ""),
    ({"best_of": 2, "n": 3}, "best_of", ""),
    ({"best_of": 2, "stream": True}, "best_of", ""),
    ({"prompt": []}, "prompt", ""),
    ({"prompt": ["a", [1]]}, "prompt", ""),
    ({"prompt": [[]]}, "prompt", ""),
    ({"prompt": None}, "prompt", ""),
    ({"prompt": ["a"] * (MAX_CHOICES + 1)}, "prompt", "too_many_inputs"),
    ({"stream_options": {"include_usage": True}}, "stream_options", ""),
    ({"messages": []}, "messages", "unknown_parameter"),
    ({"n": 2}, "n", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"logprobs": 1, "echo": True}, "logprobs", "unsupported_parameter"),
    ({"prompt": [1, 2, 3]}, "prompt", ""),
]


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED)
def test_what_cannot_be_had_is_refused_by_name(
    echo_stack: Stack, fields: dict[str, Any], param: str, code: str
) -> None:
    reply = ask(echo_stack, **fields)
    assert reply.status == 400
    assert reply.error()["param"] == param
    assert not code or reply.error()["code"] == code


def test_what_asks_for_nothing_is_taken(echo_stack: Stack) -> None:
    nothing = {"suffix": None, "best_of": 1, "n": 1, "echo": False, "logprobs": None, "stream": False, "user": "u"}
    assert ask(echo_stack, **nothing, seed=1, temperature=0, service_tier="flex").status == 200


def test_a_null_is_an_absent_parameter(echo_stack: Stack) -> None:
    nulls = {"add_special_tokens": None, "ignore_eos": None, "on_disconnect": None}
    assert ask(echo_stack, **nulls).status == 200
    chat = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "ignore_eos": None, "on_disconnect": None}
    assert post(echo_stack.port, chat).status == 200
    streamed = {**chat, "stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}}
    assert post(echo_stack.port, streamed).status == 200


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        (PATH, {"prompt": "a", "stop": ["a"] * 5}, "at most 4 items"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": []}]}, "at least 1 item"),
        ("/v1/responses", {"input": []}, "at least 1 item"),
    ],
)
def test_a_list_of_the_wrong_length_is_told_its_limit(
    echo_stack: Stack, path: str, fields: dict[str, Any], said: str
) -> None:
    assert said in post(echo_stack.port, {"model": "echo", **fields}, path=path).error()["message"]


def test_a_model_that_sees_nothing_wants_the_messages_without_their_images(echo_stack: Stack) -> None:
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixel}"}}
    error = post(echo_stack.port, {"model": "echo", "messages": [{"role": "user", "content": [image]}]}).error()
    assert "Leave the images out" in error["message"]


def test_a_model_for_something_else_completes_nothing(scripted_stack: Stack) -> None:
    for path, body in ((PATH, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        error = post(scripted_stack.port, {"model": "embedder", **body}, path=path).error()
        assert error["code"] == "model_kind"
        assert "POST /v1/embeddings" in error["message"]


# ---- with a model


def tokenize(stack: Stack, model: str = "tiny", **body: Any) -> Any:
    reply = post(stack.port, {"model": model, **body}, path="/tokenize")
    assert reply.status == 200, reply.body
    return reply.json()


def detokenize(stack: Stack, tokens: list[int], model: str = "tiny") -> Any:
    return post(stack.port, {"model": model, "tokens": tokens}, path="/detokenize").json()


def raw(stack: Stack, **fields: Any) -> Any:
    """The answer; of a stream, the list of its chunks."""
    with stack.client() as client:
        answer = client.completions.create(**{"model": "tiny", "prompt": PROMPT, "temperature": 0, **fields})
        return list(answer) if fields.get("stream") else answer


def test_text_and_tokens_of_a_prompt_are_completed_alike(tiny_stack: Stack) -> None:
    tokens = tokenize(tiny_stack, prompt=PROMPT)["tokens"]
    of_text, of_ids = raw(tiny_stack, max_tokens=12), raw(tiny_stack, prompt=tokens, max_tokens=12)
    both = raw(tiny_stack, prompt=[tokens, tokens[:3]], max_tokens=12)
    assert of_text.choices[0].text == of_ids.choices[0].text == both.choices[0].text != ""
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.prompt_tokens == len(tokens) + 3


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_log_likelihoods_come_as_evaluation_harnesses_ask_for_them(tiny_stack: Stack, max_tokens: int) -> None:
    """The request of lm-evaluation-harness's ``local-completions``, and what it reads of the answer."""
    context, continuation = "The capital of France is", " Paris."
    tokens = tokenize(tiny_stack, prompt=context + continuation)["tokens"]
    before = tokenize(tiny_stack, prompt=context)["count"]
    body = {"model": "tiny", "prompt": [tokens, tokens[:-1]], "temperature": 0, "max_tokens": max_tokens}
    answer = post(tiny_stack.port, {**body, "logprobs": 1, "seed": 1234, "echo": True}, path=PATH).json()
    for choice, asked in zip(answer["choices"], [tokens, tokens[:-1]], strict=True):
        found = choice["logprobs"]
        sizes = {len(found[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        assert sizes == {len(asked) + max_tokens}
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        values = found["token_logprobs"][before : len(asked)]
        assert all(value <= 0 for value in values)
        likeliest = [max(top.values()) for top in found["top_logprobs"][before : len(asked)]]
        assert all(value <= best for value, best in zip(values, likeliest, strict=True))
        assert choice["text"].startswith((context + continuation)[: len(choice["text"])])
    # what came before does not hang on what comes behind: the shorter one has the same numbers
    longer, shorter = (choice["logprobs"]["token_logprobs"] for choice in answer["choices"])
    assert longer[1 : len(tokens) - 1] == pytest.approx(shorter[1 : len(tokens) - 1], abs=1e-4)
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_stand_at_the_places_of_their_tokens(tiny_stack: Stack, stream: bool) -> None:
    asked = {"logprobs": 2, "max_tokens": 8, "echo": True, "n": 2, "seed": 1, "temperature": 0.8}
    whole = raw(tiny_stack, **asked)
    if stream:
        chunks = [chunk.model_dump() for chunk in raw(tiny_stack, **asked, stream=True)]
        for index in (0, 1):
            parts = [
                one["logprobs"] for c in chunks for one in c["choices"] if one["index"] == index and one["logprobs"]
            ]
            joined = {name: [value for part in parts for value in part[name]] for name in parts[0]}
            assert joined == whole.choices[index].logprobs.model_dump()
        assert texts_of(chunks, 2) == [choice.text for choice in whole.choices]
    for choice in whole.choices:
        found = choice.logprobs
        assert "".join(found.tokens).startswith(PROMPT)
        for token, place, top in zip(found.tokens, found.text_offset, found.top_logprobs, strict=True):
            assert choice.text[place : place + len(token)] == (token if place < len(choice.text) else ""), (
                "but of the end"
            )
            assert top is None or 2 <= len(top) <= 3


@pytest.mark.parametrize("stream", [False, True])
def test_parts_of_a_character_stand_where_it_begins(tiny_stack: Stack, stream: bool) -> None:
    text, asked = "a😀b €c", {"prompt": "a😀b €c", "echo": True, "logprobs": 5, "max_tokens": 1}
    if stream:
        parts = [c.choices[0].logprobs for c in raw(tiny_stack, **asked, stream=True) if c.choices[0].logprobs]
        tokens = [token for part in parts for token in part.tokens]
        places = [place for part in parts for place in part.text_offset]
    else:
        found = raw(tiny_stack, **asked).choices[0].logprobs
        tokens, places = found.tokens, found.text_offset
    assert len(tokens) > len(text) + 1, "characters of several tokens"
    before = b""
    for token, place in zip(tokens[:-1], places, strict=False):
        assert place == len(before.decode(errors="ignore"))
        before += token_bytes(token) or b"?"
    assert before.decode() == text
    assert places[-1] == len(text)


def test_alternatives_that_look_alike_are_told_apart() -> None:
    top = (
        Alternative(1, "a", -0.5),
        Alternative(2, "\ufffd", -1.0),
        Alternative(3, "\ufffd", -2.0),
        Alternative(4, "a", -3.0),
    )
    found = logprobs([Piece((1,), "a", logprobs=(TokenLogprob(1, "a", -0.5, top),))], Places())
    assert found is not None
    assert found["top_logprobs"] == [{"a": -0.5, "\ufffd": -1.0, "token_id:3": -2.0, "token_id:4": -3.0}]


def test_a_character_that_stays_incomplete_has_a_place_of_its_own() -> None:
    places = Places()
    tokens = ["bytes:\\xf0\\x9f", "x", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "y"]
    assert [places.next(token) for token in tokens] == [0, 1, 2, 2, 2, 3]


def test_the_best_of_several_is_the_one_that_the_model_finds_likeliest(tiny_stack: Stack) -> None:
    asked: dict[str, Any] = {"seed": 3, "temperature": 1.0, "max_tokens": 6, "prompt": [PROMPT, "One and two are"]}
    all_of_them = raw(tiny_stack, **asked, n=6, logprobs=0)
    best = raw(tiny_stack, **asked, n=2, best_of=6)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    expected = []
    for group in (all_of_them.choices[:6], all_of_them.choices[6:]):
        expected += [choice.text for choice in sorted(group, key=mean, reverse=True)[:2]]
    assert [choice.text for choice in best.choices] == expected
    assert [(choice.index, choice.logprobs) for choice in best.choices] == [(index, None) for index in range(4)]
    assert best.usage.completion_tokens == all_of_them.usage.completion_tokens


def test_an_answer_follows_a_guide_here_too(tiny_stack: Stack) -> None:
    answer = raw(tiny_stack, extra_body={"structured_outputs": {"choice": ["Rome", "Oslo"]}})
    assert answer.choices[0].text in ("Rome", "Oslo")


# ---- cut off


LONG: dict[str, Any] = {"model": "echo", "prompt": [" ".join(WORDS[:60]), " ".join(WORDS[100:150])], "max_tokens": 80}


def test_a_stream_goes_on_behind_any_event_on_another_server_to_the_byte(stack: Stack) -> None:
    echo_worker(stack, delay_ms=2)
    port = second_api(stack)
    connection, job_id = open_stream(stack.port, {**LONG, "echo": True})
    whole = [block for block in connection.events() if not block.startswith(":")]
    assert texts_of(chunks_of(whole), 2) == [text + text for text in LONG["prompt"]]
    for after in (connection.ids[0], connection.ids[3], connection.ids[len(whole) // 2], connection.ids[-2]):
        tail = resume(port, job_id, after)
        assert tail.head()[0] == 200
        blocks = [block for block in tail.events() if not block.startswith(":")]
        rest = whole[connection.ids.index(after) + 1 :]
        assert texts_of(chunks_of(blocks), 2) == texts_of(chunks_of(rest), 2)
        assert (tail.ids[-1], blocks[-1]) == (connection.ids[-1], "data: [DONE]")


def test_log_probabilities_of_a_resumed_stream_stand_where_they_stood(tiny_stack: Stack) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "logprobs": 1, "echo": True, "max_tokens": 20, "ignore_eos": True}
    connection, job_id = open_stream(tiny_stack.port, body)
    whole = [block for block in connection.events() if not block.startswith(":")]
    after = connection.ids[1]
    tail = resume(tiny_stack.port, job_id, after)
    assert tail.head()[0] == 200
    rest = [block for block in tail.events() if not block.startswith(":")]
    first, second = (
        [
            place
            for chunk in chunks_of(blocks)
            if chunk["choices"][0]["logprobs"]
            for place in chunk["choices"][0]["logprobs"]["text_offset"]
        ]
        for blocks in (whole[2:], rest)
    )
    assert first == second != []


@pytest.mark.parametrize("echo", [False, True])
def test_a_killed_worker_costs_no_word_of_any_prompt(stack: Stack, echo: bool) -> None:
    first = echo_worker(stack, delay_ms=10)
    connection, _ = open_stream(stack.port, {**LONG, "echo": echo})
    blocks = []
    for block in connection.events():
        blocks.append(block)
        if first.alive and connection.ids and connection.ids[-1] >= 20:
            first.kill()
            echo_worker(stack, delay_ms=1)
    texts = texts_of(chunks_of(blocks), 2)
    assert texts == [text * (1 + echo) for text in LONG["prompt"]]


def test_a_killed_worker_goes_on_with_the_tokens_that_it_would_have_drawn(stack: Stack) -> None:
    flags = ("--model", "tiny", "--threads", "1")
    first = stack.start_worker(*flags)
    body: dict[str, Any] = {"model": "tiny", "prompt": [PROMPT, "Once upon a time"], "max_tokens": 200, "seed": 7}
    body |= {"ignore_eos": True, "n": 2, "echo": True, "logprobs": 1}
    with stack.client() as client:
        whole = client.completions.create(
            **{name: value for name, value in body.items() if name != "ignore_eos"}, extra_body={"ignore_eos": True}
        )
    connection, _ = open_stream(stack.port, body)
    blocks = []
    for block in connection.events():
        blocks.append(block)
        if first.alive and connection.ids and connection.ids[-1] >= 60:
            first.kill()
            stack.start_worker(*flags)
    for got, choice in zip(texts_of(chunks_of(blocks), 4), whole.choices, strict=True):
        pairs = enumerate(zip(got, choice.text, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), len(got))
        assert got == choice.text, f"from {same} of {len(choice.text)}: {got[same : same + 40]!r}"


def test_a_request_that_is_sent_again_with_its_key_is_one_job(stack: Stack) -> None:
    echo_worker(stack, delay_ms=1)
    body = {"model": "echo", "prompt": ["a b", "c"], "echo": True}
    replies = [post(stack.port, body, path=PATH, headers={"idempotency-key": "k"}) for _ in range(2)]
    assert replies[0].body == replies[1].body
    assert len(stack.records("echo")) == 1
    connection, _ = open_stream(stack.port, body, idempotency_key="another")
    text = texts_of(chunks_of(connection.events()), 2)
    again, _ = open_stream(stack.port, body, idempotency_key="another")
    assert texts_of(chunks_of(again.events()), 2) == text == ["a ba b", "cc"]
    other = post(stack.port, {**body, "echo": False}, path=PATH, headers={"idempotency-key": "k"})
    assert other.status in (400, 409, 422)


def test_a_client_that_leaves_ends_the_job(stack: Stack) -> None:
    echo_worker(stack)
    connection, _ = open_stream(stack.port, {**LONG, "ignore_eos": True, "max_tokens": 100_000})
    events_until(connection, 10)
    assert stack.running("echo") == 1
    connection.hang_up()
    wait_until(lambda: stack.live("echo") == 0, "it is cancelled")


# ---- forwarded to another stack of ours


@pytest.fixture
def far(stack: Stack, tiny_stack: Stack) -> Stack:
    """A stack whose model ``far`` is the other one's ``tiny``."""
    flags = ("--engine", "openai", "--base-url", f"{tiny_stack.base}/v1", "--api-key-env", "UPSTREAM_KEY")
    stack.start_worker("--model", "tiny", "--name", "far", *flags, UPSTREAM_KEY=API_KEY)
    return stack


def test_a_forwarded_completion_is_the_upstreams(far: Stack, tiny_stack: Stack) -> None:
    asked: dict[str, Any] = {"prompt": [PROMPT, "Once upon"], "n": 2, "seed": 5, "temperature": 0.9, "max_tokens": 9}
    for more in ({}, {"logprobs": 2}, {"logprobs": 1, "echo": True}, {"echo": True, "max_tokens": 0, "logprobs": 1}):
        direct = raw(tiny_stack, **{**asked, **more})
        whole = raw(far, **{**asked, **more, "model": "far"})
        assert [choice.model_dump() for choice in whole.choices] == [choice.model_dump() for choice in direct.choices]
        assert whole.usage == direct.usage
        chunks = [chunk.model_dump() for chunk in raw(far, **{**asked, **more, "model": "far"}, stream=True)]
        assert texts_of(chunks, 4) == [choice.text for choice in direct.choices]
    ids = tokenize(tiny_stack, prompt=PROMPT)["tokens"]
    of_ids = raw(far, model="far", prompt=ids, max_tokens=9)
    assert of_ids.choices[0].text == raw(tiny_stack, max_tokens=9).choices[0].text


def test_forwarded_tokens_are_the_upstreams(far: Stack, tiny_stack: Stack) -> None:
    chat = {"messages": [{"role": "user", "content": "Who are you?"}]}
    for body in ({"prompt": PROMPT, "return_token_strs": True}, chat, {**chat, "add_generation_prompt": False}):
        direct = tokenize(tiny_stack, **body)
        assert tokenize(far, "far", **body) == direct
    assert detokenize(far, direct["tokens"], "far") == detokenize(tiny_stack, direct["tokens"])


# ---- tokens


def test_tokens_there_and_back(tiny_stack: Stack) -> None:
    body = tokenize(tiny_stack, prompt=TEXT, return_token_strs=True)
    assert set(body) == {"count", "max_model_len", "tokens", "token_strs"}
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    with tiny_stack.client() as client:
        assert body["max_model_len"] == client.models.retrieve("tiny").model_extra["max_model_len"]  # type: ignore[index]
    bare = tokenize(tiny_stack, prompt=TEXT, add_special_tokens=False)
    assert bare["token_strs"] is None
    back = post(tiny_stack.port, {"model": "tiny", "tokens": bare["tokens"]}, path="/detokenize")
    assert back.json() == {"prompt": TEXT}


def test_a_chats_tokens_are_those_that_its_usage_counts(tiny_stack: Stack) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    chat: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Who are you?"}], "tools": [tool]}
    counted = post(tiny_stack.port, chat, path="/tokenize").json()
    with tiny_stack.client() as client:
        answer = client.chat.completions.create(**chat, max_tokens=1)
    assert answer.usage is not None
    assert counted["count"] == answer.usage.prompt_tokens
    raw_text = post(tiny_stack.port, {"model": "tiny", "tokens": counted["tokens"]}, path="/detokenize").json()[
        "prompt"
    ]
    assert "Who are you?" in raw_text
    assert "look" in raw_text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"prompt": "a", "add_generation_prompt": False}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "continue_final_message": True}, "add_generation_prompt"),
        ({"prompt": "a", "chat_template": "x"}, "chat_template"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_name(tiny_stack: Stack, body: dict[str, Any], param: str) -> None:
    reply = post(tiny_stack.port, {"model": "tiny", **body}, path="/tokenize")
    assert (reply.status, reply.error()["param"]) == (400, param)


def test_tokens_need_a_key_and_count_as_requests_only(tiny_stack: Stack) -> None:
    anonymous: dict[str, str | None] = {"authorization": None}
    body = {"model": "tiny", "prompt": "some words"}
    for path in ("/tokenize", "/detokenize"):
        assert post(tiny_stack.port, body, path=path, headers=anonymous).status == 401
    key = make_key(tiny_stack.server.url, tiny_stack.folder, "--rpm", "2", "--tpm", "50")
    headers: dict[str, str | None] = {"authorization": f"Bearer {key}"}
    long = {"model": "tiny", "prompt": TEXT * 100}
    first, second, third = (post(tiny_stack.port, long, path="/tokenize", headers=headers) for _ in range(3))
    assert (first.status, second.status, third.status) == (200, 200, 429)
    assert first.json()["count"] > 50


def test_a_model_is_found_by_a_name_with_slashes(stack: Stack) -> None:
    stack.start_worker("--model", "echo", "--engine", "echo", "--name", "acme/large/echo")
    with stack.client() as client:
        assert client.models.retrieve("acme/large/echo").id == "acme/large/echo"
        assert "acme/large/echo" in [model.id for model in client.models.list()]
        answer = client.completions.create(model="acme/large/echo", prompt="hi")
        assert answer.choices[0].text == "hi"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("acme/none")
    assert get(stack.port, "/v1/models/acme/large/echo", authorization=None).status == 401


# ---- as requests that come otherwise than by HTTP


def test_a_batch_parses_a_completion_as_http_does() -> None:
    endpoint = ENDPOINTS[PATH]
    asked = endpoint.parse({"model": "m", "prompt": ["a", "b"], "n": 2, "best_of": 3}, Settings(), 10)
    assert (asked.job.kind, asked.job.inputs, asked.job.sampling.n) == ("completion", ("a", "b"), 3)
    assert Job.from_spec(asked.job.to_spec()) == asked.job
    assert View.from_json(asked.view.to_json().encode()) == asked.view
    assert asked.job.cost == 1 + 2 * 3 * 16
    with pytest.raises(InvalidRequestError) as refused:
        endpoint.parse({"model": "m", "prompt": "a", "suffix": "b"}, Settings(), 10)
    assert refused.value.param == "suffix"


def test_what_only_counts_tokens_tells_no_tokens() -> None:
    body = DetokenizeRequest(model="m", tokens=[1])
    asked = asked_count(body, "m", [Message(role="user", content="hi")], template_kwargs={"enable_thinking": False})
    assert (asked.job.kind, asked.job.tells, asked.job.cost) == ("tokenize", "count", 1)
    assert asked.job.template_kwargs == {"enable_thinking": False}
    said = [Delta(1, 1, (Piece(text='{"count": 7, "max_model_len": null}', units=1),))]
    assert told(said)[1]["count"] == 7
    assert answers.whole(asked.view, said, End(1, "succeeded", "stop", None))["count"] == 7
