"""Formats in the tokens of a tokenizer: special tokens, prompts that begin the reasoning, ids of calls."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fastchat_q.workers.engines.base import Request
from fastchat_q.workers.engines.batching.intake import Intake
from fastchat_q.workers.engines.loading.model import Loaded, load
from fastchat_q.workers.engines.processing.sequence import Picked
from fastchat_q.workers.engines.processing.speech import Speech, format_for
from fastchat_q.workers.engines.processing.structured import Guides
from fastchat_q.workers.engines.tiny.dialogues import TOOLS
from fastchat_q.workers.parsing import format_of
from transformers import AddedToken

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import ToolCallDelta
from fastchat_q.jobs import Guide, Job, Message, Sampling
from tests.servers import wait_until

DEFINITIONS = tuple(tool.definition(name) for name, tool in TOOLS.items())


@pytest.fixture
def loaded() -> Loaded:
    return load("tiny", "cpu")


def job(**fields: Any) -> Job:
    return Job(**{"id": "1", "model": "tiny", "messages": (Message(role="user", content="Hi"),), **fields})


def answer(loaded: Loaded, raw: str, asked: Job) -> list[Any]:
    """The outputs for a model that says this."""
    [choice] = Intake(loaded).answers(Request(asked, "t"))[0].choices
    ids = loaded.tokenizer(raw, add_special_tokens=False)["input_ids"]
    return [choice.accept(Picked(token)) for token in ids]  # type: ignore[union-attr, arg-type]


def test_marks_that_are_special_tokens_are_seen_and_others_are_not_shown(loaded: Loaded) -> None:
    special = [AddedToken(text, special=True) for text in ("[TOOL_CALLS]", "[ARGS]", "[OTHER]")]
    loaded.tokenizer.add_tokens(special)
    speech = Speech(loaded.tokenizer, format_of("mistral", None))
    ids: Any = loaded.tokenizer("a[OTHER]b[TOOL_CALLS]f[ARGS]{}<|im_end|>", add_special_tokens=False)["input_ids"]
    assert speech.sees_marks
    assert speech.decode(ids) == "ab[TOOL_CALLS]f[ARGS]{}"
    assert not Speech(loaded.tokenizer, format_of("hermes", None)).sees_marks


def test_a_call_behind_special_tokens_comes_out_as_one(loaded: Loaded) -> None:
    loaded.tokenizer.add_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    mistral = replace(loaded, format=format_of("mistral", None))
    outputs = answer(mistral, 'Ok.[TOOL_CALLS]add{"a": 1, "b": 2}', job(tools=DEFINITIONS))
    calls = [call for output in outputs for piece in output.pieces for call in piece.tool_calls]
    assert calls[0].name == "add"
    assert len(calls[0].id or "") == 9
    assert "".join(call.arguments for call in calls) == '{"a": 1, "b": 2}'
    assert "".join(piece.text for output in outputs for piece in output.pieces) == "Ok."


def test_a_plain_job_has_no_parser(loaded: Loaded) -> None:
    for asked in (job(), job(tools=DEFINITIONS, tool_choice="none")):
        [choice] = Intake(loaded).answers(Request(asked, "t"))[0].choices
        assert choice.sequence.parser is None
    [choice] = Intake(loaded).answers(Request(job(tools=DEFINITIONS), "t"))[0].choices
    assert choice.sequence.parser is not None


def test_without_parallel_calls_the_first_call_ends_the_answer(loaded: Loaded) -> None:
    raw = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><tool_call>{"name": "b", "arguments": {}}'
    outputs = answer(loaded, raw, job(tools=DEFINITIONS, parallel_tool_calls=False))
    ended = [number for number, output in enumerate(outputs) if output.ended is not None]
    assert outputs[ended[0]].ended.finish_reason == "tool_calls"
    assert ended[0] < len(outputs) - 1
    assert not any(
        output.pieces[0].tool_calls[0].name == "b" for output in outputs[: ended[0] + 1] if output.pieces[0].tool_calls
    )


def test_the_same_job_gives_its_calls_the_same_ids_and_each_choice_others(loaded: Loaded) -> None:
    def first_id(job_id: str, choice: int) -> str | None:
        parser = Speech(loaded.tokenizer, format_of("hermes", None)).parser(
            job(id=job_id, tools=DEFINITIONS), None, choice
        )
        assert parser is not None
        [call] = parser.feed('<tool_call>{"name": "f", "arguments": {}}').tool_calls
        assert isinstance(call, ToolCallDelta)
        return call.id

    assert first_id("1", 0) == first_id("1", 0)
    assert len({first_id("1", 0), first_id("1", 1), first_id("2", 0)}) == 3
    assert (first_id("1", 0) or "").startswith("call_")


def test_the_rendered_prompt_says_whether_the_model_thinks_already(loaded: Loaded) -> None:
    speech = Speech(loaded.tokenizer, format_of(None, "qwen3"))

    def is_open(end: str, **fields: Any) -> bool | None:
        prompt: Any = loaded.tokenizer(f"<|im_start|>assistant\n{end}", add_special_tokens=False)["input_ids"]
        return speech.is_open(job(**fields), prompt)

    assert is_open("<think>\n") is True
    assert is_open("<think>\n\n</think>\n\n") is False
    assert is_open("") is None
    said = (Message(role="user", content="Hi"), Message(role="assistant", content="<think>well"))
    assert is_open("<think>well", messages=said, template_kwargs={"continue_final_message": True}) is True


def test_a_constrained_answer_of_a_model_that_thinks_comes_behind_its_reasoning(loaded: Loaded) -> None:
    guide = Guide(kind="json_object")
    plain = Speech(loaded.tokenizer, format_of(None, None)).sampling(job(sampling=Sampling(guide=guide)), None)
    assert plain.guide == guide
    thinking = Speech(loaded.tokenizer, format_of(None, "qwen3")).sampling(job(sampling=Sampling(guide=guide)), True)
    assert "</think>" in getattr(thinking.guide, "before")  # noqa: B009
    over = Speech(loaded.tokenizer, format_of(None, "qwen3")).sampling(job(sampling=Sampling(guide=guide)), False)
    assert over.guide == guide


def allowed(loaded: Loaded, guide: Guide, text: str) -> bool:
    """Whether a model that follows this guide can say this, and end there."""
    eos, size = loaded.eos_ids, len(loaded.tokenizer)
    guided = Guides(loaded.tokenizer, size, eos).guided(guide, 1000)
    wait_until(lambda: guided.ready, "it is compiled")
    ids: Any = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    bits = np.zeros(4 * -(-size // 32), dtype=np.uint8)
    for done, token in enumerate([*ids, min(eos)]):
        guided.fill(bits, ids[:done])
        if not np.unpackbits(bits, bitorder="little")[token]:
            return False
    return True


def test_an_answer_with_tools_and_a_format_is_calls_or_of_that_format(loaded: Loaded) -> None:
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    guided = Sampling(guide=Guide(kind="json_schema", value=schema))
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    speech = Speech(loaded.tokenizer, format_of("hermes", None))
    guide = speech.sampling(job(sampling=guided, tools=DEFINITIONS), None).guide
    assert guide is not None
    assert allowed(loaded, guide, call)
    assert allowed(loaded, guide, f"{call}\n{call}")
    assert allowed(loaded, guide, '{"a": 5}')
    assert not allowed(loaded, guide, '{"b": 5}')
    assert not allowed(loaded, guide, "Hello")
    one = speech.sampling(job(sampling=guided, tools=DEFINITIONS, parallel_tool_calls=False), None).guide
    assert one is not None
    assert not allowed(loaded, one, f"{call}\n{call}")
    for alone in (job(sampling=guided), job(sampling=guided, tools=DEFINITIONS, tool_choice="none")):
        assert speech.sampling(alone, None).guide == guided.guide


def test_calls_that_begin_as_an_answer_may_are_refused_beside_a_format(loaded: Loaded) -> None:
    speech = Speech(loaded.tokenizer, format_of("llama3_json", None))
    with pytest.raises(InvalidRequestError, match="tool_choice") as refused:
        speech.sampling(job(sampling=Sampling(guide=Guide(kind="json_object")), tools=DEFINITIONS), None)
    assert refused.value.param == "response_format"


def test_a_template_that_shows_no_tools_has_no_calls() -> None:
    written = format_of("hermes", "qwen3")
    assert format_for(written, "{{ messages }}").features == ("reasoning",)
    assert format_for(written, {"default": "", "tool_use": "{{ tools }}"}).features == ("tools", "reasoning")
