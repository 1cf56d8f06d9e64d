"""Each parameter does what it says, with the built-in model behind the whole path and the official client before it."""

import json
import re
from typing import Any

import jsonschema
import pytest

from fastchat_q import keys
from fastchat_q.tokens import entry_to_delta

from .stack import Stack

QUESTION = "Tell me a story about Mia."
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ask(stack: Stack, question: str = QUESTION, **fields: Any) -> Any:
    """An answer and the token ids of its first choice; greedy and of 24 tokens at the most, unless told otherwise."""
    asked = {"temperature": 0, "max_tokens": 24, **fields}
    with stack.client() as client:
        messages: Any = [{"role": "user", "content": question}]
        raw = client.chat.completions.with_raw_response.create(model="tiny", messages=messages, **asked)
    answer = raw.parse()
    log = keys.model_keys("tiny").log(raw.headers["x-job-id"].removeprefix("tiny."))
    entries = stack.redis.xrange(log)
    raws = [(entry.encode(), {k.encode(): v.encode() for k, v in fields.items()}) for entry, fields in entries]
    pieces = [piece for entry, values in raws for piece in entry_to_delta(entry, values).pieces]
    return answer, [i for piece in pieces if piece.choice == 0 for i in piece.ids]


def text(stack: Stack, **fields: Any) -> str:
    return str(ask(stack, **fields)[0].choices[0].message.content)


def test_choices_are_as_many_as_asked_for_and_those_of_a_seed_differ_among_themselves_only(tiny_stack: Stack) -> None:
    answers = [ask(tiny_stack, question="zebra 7 quantum", n=4, temperature=2, seed=3)[0] for _ in range(2)]
    first, second = ([choice.message.content for choice in answer.choices] for answer in answers)
    assert first == second
    assert len(set(first)) > 1
    assert [choice.index for choice in answers[0].choices] == [0, 1, 2, 3]
    greedy = ask(tiny_stack, n=2)[0]
    assert greedy.choices[0].message.content == greedy.choices[1].message.content == text(tiny_stack)
    assert greedy.usage.completion_tokens == 2 * ask(tiny_stack)[0].usage.completion_tokens


def test_log_probabilities_are_those_of_the_answer_in_streams_too(tiny_stack: Stack) -> None:
    choice = ask(tiny_stack, question="Hello!", logprobs=True, top_logprobs=3)[0].choices[0]
    found = choice.logprobs.content
    assert "".join(one.token for one in found).removesuffix("<|im_end|>") == choice.message.content
    for one in found:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob <= 0, "greedy: the likeliest"
        assert bytes(one.bytes).decode() == one.token
    with tiny_stack.client() as client:
        messages: Any = [{"role": "user", "content": "Hello!"}]
        asked: Any = {"model": "tiny", "messages": messages, "temperature": 0, "logprobs": True}
        with client.chat.completions.stream(**asked, top_logprobs=3) as events:
            streamed = events.get_final_completion().choices[0]
    assert streamed.message.content == choice.message.content
    assert [one.token for one in streamed.logprobs.content or ()] == [one.token for one in found]


def test_a_bias_forbids_and_forces_tokens(tiny_stack: Stack) -> None:
    first = ask(tiny_stack)[1][0]
    assert ask(tiny_stack, logit_bias={str(first): -100})[1][0] != first
    assert ask(tiny_stack, logit_bias={str(first): 100}, max_tokens=5)[1] == [first] * 5


def test_penalties_end_repetition(tiny_stack: Stack) -> None:
    favoured = {"logit_bias": {str(ask(tiny_stack)[1][0]): 20}, "max_tokens": 12}
    assert len(set(ask(tiny_stack, **favoured)[1])) < 3
    for penalty in ({"extra_body": {"repetition_penalty": 10.0}}, {"frequency_penalty": 2.0, "presence_penalty": 2.0}):
        assert ask(tiny_stack, **favoured, **penalty)[1] != ask(tiny_stack, **favoured)[1]


def test_top_k_of_one_and_min_p_of_one_are_greedy_at_any_temperature(tiny_stack: Stack) -> None:
    for fields in ({"top_k": 1}, {"min_p": 1.0}):
        assert text(tiny_stack, temperature=2, seed=1, extra_body=fields) == text(tiny_stack)


def test_stop_tokens_end_an_answer_and_min_tokens_holds_its_end_back(tiny_stack: Stack) -> None:
    ids = ask(tiny_stack, max_tokens=10)[1]
    stopped, found = ask(tiny_stack, max_tokens=10, extra_body={"stop_token_ids": [ids[4]]})
    assert (found, stopped.choices[0].finish_reason) == (ids[: ids.index(ids[4]) + 1], "stop")
    short, whole = ask(tiny_stack, question="Hello!")
    assert short.choices[0].finish_reason == "stop"
    longer = ask(tiny_stack, question="Hello!", extra_body={"min_tokens": len(whole) + 3})[0]
    assert longer.usage.completion_tokens >= len(whole) + 3


def test_answers_follow_a_schema_that_the_model_knows_nothing_of(tiny_stack: Stack) -> None:
    strict = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        said = text(tiny_stack, response_format=strict, temperature=1, seed=seed, max_tokens=200)
        jsonschema.validate(json.loads(said), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"regex": r"[a-c]{3}-\d\d"}, r"[a-c]{3}-\d\d"),
        ({"choice": ["moon", "sun"]}, "moon|sun"),
        ({"grammar": 'start: "x" /[0-9]/ "y"'}, "x[0-9]y"),
        ({"json": json.dumps({"enum": [17, 18]})}, "17|18"),
    ],
)
def test_structured_outputs_bind_the_answer(tiny_stack: Stack, fields: dict[str, Any], shape: str) -> None:
    assert re.fullmatch(shape, text(tiny_stack, extra_body={"structured_outputs": fields}))
