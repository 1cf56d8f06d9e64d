"""Every parser on what its models write: whole, by the character, in pieces; and on what no model should write."""

import json
import random
import time
import tomllib
from importlib.resources import files

import pytest
from fastchat_q.workers.families.row import families
from fastchat_q.workers.parsing import format_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_q.errors import ConfigurationError

from .examples import EXAMPLES, Example, format_for, said, values

ROWS = tomllib.loads(files("fastchat_q.workers.parsing").joinpath("formats.toml").read_text(encoding="utf-8"))
NAMES = sorted(
    {(tools, None) for tools in ROWS["tools"]} | {(None, reasoning) for reasoning in ROWS["reasoning"]}, key=str
)
each = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


def cut(text: str, at: list[int]) -> list[str]:
    """The text in pieces."""
    ends = sorted({min(place, len(text)) for place in at})
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@each
def test_an_answer_is_taken_apart(example: Example) -> None:
    found = said(format_for(example), [example.raw], example.is_open)
    assert (found.text, found.reasoning, values(found)) == (example.text, example.reasoning, example.calls)
    assert len(set(found.ids)) == len(found.ids)


@each
def test_it_does_not_matter_how_the_text_is_cut(example: Example) -> None:
    whole = said(format_for(example), [example.raw], example.is_open)
    assert said(format_for(example), list(example.raw), example.is_open) == whole
    rng = random.Random(example.raw)
    for _ in range(50):
        pieces = cut(example.raw, [rng.randint(0, len(example.raw)) for _ in range(rng.randint(1, 8))])
        assert said(format_for(example), pieces, example.is_open) == whole


@each
def test_what_is_streamed_is_the_beginning_of_the_whole(example: Example) -> None:
    whole = said(format_for(example), [example.raw], example.is_open)
    for end in range(len(example.raw)):
        part = said(format_for(example), [example.raw[:end]], example.is_open, flush=False)
        assert whole.text.startswith(part.text)
        assert whole.reasoning.startswith(part.reasoning)
        assert [name for name, _ in part.calls] == [name for name, _ in whole.calls[: len(part.calls)]]
        assert all(all_of.startswith(some) for (_, some), (_, all_of) in zip(part.calls, whole.calls, strict=False))


@each
def test_with_one_call_at_the_most_the_answer_is_over_when_it_is_whole(example: Example) -> None:
    found = said(format_for(example), list(example.raw), example.is_open, single=True)
    assert values(found) == example.calls[:1]
    assert found.over is bool(example.calls)


def test_arguments_are_streamed_while_they_are_written() -> None:
    raw = EXAMPLES["Qwen 2.5"].raw
    begun = raw[: raw.index("Rome") + 2]
    assert said(format_of("hermes", None), [begun], flush=False).calls == [("get_weather", '{"city": "Ro')]


@each
def test_a_call_that_is_cut_off_is_a_part_of_a_call_or_nothing_but_no_text(example: Example) -> None:
    written = format_for(example)
    if written.calls is None or example.text or not example.calls:
        return
    for end in range(len(example.raw)):
        part = said(written, [example.raw[:end]], example.is_open, forced=True)
        assert part.text == ""
        assert [name for name, _ in part.calls] == [call.name for call in example.calls[: len(part.calls)]]


@pytest.mark.parametrize(
    "end", range(len("<tool_call>"), len('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'))
)
def test_a_call_that_the_model_chose_to_begin_is_no_text_either(end: int) -> None:
    raw = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    part = said(format_of("hermes", None), list("So: " + raw[:end]))
    assert part.text == "So:"


def test_every_format_has_an_example() -> None:
    tried = {(example.calls_by, example.reasoning_by) for example in EXAMPLES.values()}
    calls, reasoning = {one for one, _ in tried}, {one for _, one in tried}
    alike = {"granite4", "apriel", "nemotron_nano_2", "step3p5"}  # the same fields as another row
    assert ROWS["tools"].keys() - calls == alike
    assert ROWS["reasoning"].keys() - reasoning == {"nemotron_v3", "step3p5", "apriel"}


def test_every_family_names_parsers_that_there_are() -> None:
    for family in families().values():
        format_of(family.tool_parser, family.reasoning_parser)


def test_a_parser_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigurationError, match=r"--tool-call-parser magic: there is no such parser.*hermes"):
        format_of("magic", None)
    with pytest.raises(ConfigurationError, match=r"--reasoning-parser magic.*deepseek_r1"):
        format_of(None, "magic")


def test_none_is_no_parser() -> None:
    assert format_of("none", "none") == format_of(None, None)


def test_broken_arguments_come_out_as_the_model_wrote_them() -> None:
    raw = '<tool_call>{"name": "f", "arguments": {"a": 1,, "b": 2}}</tool_call> and on'
    found = said(format_of("hermes", None), [raw])
    assert (found.calls, found.text) == ([("f", '{"a": 1,, "b": 2}}')], "and on")


def test_kimi_and_mistral_get_the_ids_that_their_templates_take() -> None:
    kimi = EXAMPLES["Kimi K2"]
    assert said(format_for(kimi), [kimi.raw]).ids == ["functions.get_weather:0", "functions.now:1"]
    small = EXAMPLES["Mistral Small 3.2"]
    assert said(format_for(small), [small.raw]).ids[0] == "abc123def"


def test_the_prompt_says_whether_the_reasoning_has_begun() -> None:
    qwen = format_of(None, "qwen3")
    assert qwen.is_open("<|im_start|>assistant\n<think>\n") is True
    assert qwen.is_open("<|im_start|>assistant\n<think>\n\n</think>\n\n") is False
    assert qwen.is_open("<|im_start|>assistant\n") is None


def snippets() -> st.SearchStrategy[str]:
    marks = sorted({mark for one in NAMES for mark in format_of(*one).marks if mark})
    words = '{"name": "f", "arguments": { "a": 1 } ] [ , " \\ f( a= ) : call:f{'.split(" ")  # noqa: SIM905
    pieces = st.sampled_from([*marks, *words, " ", "\n"]) | st.text(max_size=4)
    return st.lists(pieces, max_size=25).map("".join)


@settings(max_examples=400, deadline=None)
@given(names=st.sampled_from(NAMES), raw=snippets(), at=st.lists(st.integers(0, 80), max_size=5))
def test_no_text_is_too_strange(names: tuple[str | None, str | None], raw: str, at: list[int]) -> None:
    written = format_of(*names)
    whole = said(written, [raw])
    assert said(written, list(raw)) == whole
    assert said(written, cut(raw, at)) == whole


@settings(max_examples=200, deadline=None)
@given(names=st.sampled_from(NAMES), raw=st.text(alphabet="ab {}[]():,\"'\\\n<|_", max_size=60))
def test_text_without_a_call_comes_out_as_it_is(names: tuple[str | None, str | None], raw: str) -> None:
    written = format_of(*names)
    found = said(written, list(raw))
    if not found.calls:
        assert "".join((found.reasoning + found.text).split()) == "".join(raw.split())


def test_the_cost_is_linear() -> None:
    """Sixteen times the text may not cost much more than sixteen times the time."""

    def seconds(words: int) -> float:
        raw = '<tool_call>{"name": "f", "arguments": {"a": "' + "word " * words + '"}}</tool_call>'
        pieces = [raw[at : at + 4] for at in range(0, len(raw), 4)]
        begun = time.process_time()
        found = said(format_of("hermes", "qwen3"), pieces)
        took = time.process_time() - begun
        assert json.loads(found.calls[0][1])["a"].strip().endswith("word")
        return took

    small = min(seconds(500) for _ in range(3))
    assert min(seconds(8000) for _ in range(3)) < small * 64
