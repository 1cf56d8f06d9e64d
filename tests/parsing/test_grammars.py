"""Calls that must come: whatever a grammar lets a model write, its own parser reads as calls that fit the schemas."""

import json
import random
import tomllib
from importlib.resources import files
from typing import Any

import jsonschema
import numpy as np
import pytest
from fastchat_q.workers.engines.tiny import __path__ as tiny
from fastchat_q.workers.parsing import format_of
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import AutoTokenizer

from .examples import FUNCTIONS, TOOLS, said, values

ROWS = tomllib.loads(files("fastchat_q.workers.parsing").joinpath("formats.toml").read_text(encoding="utf-8"))
REASONING = {"deepseek_r1": True, "qwen3": None, "openai_gptoss": None, "granite": None, None: None}
LONGEST = 4000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(f"{next(iter(tiny))}/model")


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Any) -> LLTokenizer:
    return from_tokenizer(tokenizer)


def written_at_random(grammar: str, marks: tuple[str, ...], tokenizer: Any, vocabulary: LLTokenizer, seed: int) -> str:
    """What a model without any sense writes within a grammar; it likes marks, so that it comes to an end."""
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    rng, ids = random.Random(seed), []
    ends = [i for i in range(len(tokenizer)) if set(tokenizer.decode([i])) & set('"}])')]
    while not matcher.is_stopped() and len(ids) < LONGEST:
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0]
        assert not matcher.is_error(), matcher.get_error()
        if tokenizer.eos_token_id in allowed:
            break
        if rng.random() < 0.3:
            mark = tokenizer(rng.choice(["", "\n"]) + rng.choice(marks or (")",)), add_special_tokens=False)[
                "input_ids"
            ]
            ids += mark[: matcher.try_consume_tokens(mark)]
            continue
        likely = np.intersect1d(allowed, ends)
        token = int(rng.choice(likely if len(likely) and rng.random() < 0.7 else allowed))
        assert matcher.consume_token(token)
        ids.append(token)
    assert len(ids) < LONGEST
    return str(tokenizer.decode(ids))


def tokens(tokenizer: Any) -> dict[str, int]:
    return {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("name", list(ROWS["tools"]))
def test_what_a_grammar_allows_is_read_as_valid_calls(
    name: str, many: bool, tokenizer: Any, vocabulary: LLTokenizer
) -> None:
    written = format_of(name, "openai_gptoss" if name == "openai" else None)
    grammar = LLMatcher.grammar_from_lark(written.grammar(FUNCTIONS, many, None, tokens(tokenizer)))
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
    for seed in range(4):
        raw = written_at_random(grammar, written.marks, tokenizer, vocabulary, seed)
        found = said(written, [raw])
        assert found.calls, raw
        assert not found.text, raw
        assert many or len(found.calls) == 1
        for call in values(found):
            jsonschema.validate(call.arguments, schemas[call.name])


@pytest.mark.parametrize("name", REASONING)
def test_the_reasoning_comes_before_a_call_that_must_come(
    name: str | None, tokenizer: Any, vocabulary: LLTokenizer
) -> None:
    written = format_of("openai" if name == "openai_gptoss" else "hermes", name)
    grammar = LLMatcher.grammar_from_lark(written.grammar(FUNCTIONS, False, REASONING[name], tokens(tokenizer)))
    for seed in range(4):
        raw = written_at_random(grammar, written.marks, tokenizer, vocabulary, seed)
        found = said(written, [raw], REASONING[name])
        assert len(found.calls) == 1, raw
        assert not found.text


@pytest.mark.parametrize("name", ["deepseek_r1", "qwen3", "openai_gptoss"])
def test_the_reasoning_comes_before_a_constrained_answer(name: str, tokenizer: Any, vocabulary: LLTokenizer) -> None:
    written = format_of(None, name)
    before = written.before(REASONING[name], tokens(tokenizer))
    answer = {
        "name": "answer",
        "json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    }
    grammar = json.dumps({"grammars": [{"lark_grammar": before}, answer]})
    for seed in range(4):
        raw = written_at_random(grammar, written.marks, tokenizer, vocabulary, seed)
        assert isinstance(json.loads(said(written, [raw], REASONING[name]).text)["a"], int), raw


def test_reasoning_that_the_prompt_has_ended_is_not_asked_for() -> None:
    assert format_of(None, "qwen3").before(False, {}) == ""
