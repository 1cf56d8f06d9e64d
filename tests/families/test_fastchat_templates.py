"""Every conversation template of FastChat, byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastchat_q.workers.families import Family, families
from transformers.utils.chat_template_utils import render_jinja_template

from .conversations import CONVERSATIONS, PARTIAL

ORIGINAL: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "fastchat_prompts.json").read_text(encoding="utf-8")
)
BETTER = {
    ("deepseek-coder", "system"): "You answer in “verse”, {briefly}.\n### Instruction:\n"
    "Who are you?\r\nSay it in Grüße 你好.\n### Response:\n",
    ("deepseek-coder", "empty_system"): "### Instruction:\nHello!\n### Response:\n",
    ("deepseek-chat", "system"): "<｜begin▁of▁sentence｜>You answer in “verse”, {briefly}.User: "
    "Who are you?\r\nSay it in Grüße 你好.\n\nAssistant:",
    ("deepseek-chat", "empty_system"): "<｜begin▁of▁sentence｜>User: Hello!\n\nAssistant:",
    ("gemma", "system"): "<bos><start_of_turn>user\nYou answer in “verse”, {briefly}.\n\n"
    "Who are you?\r\nSay it in Grüße 你好.<end_of_turn>\n<start_of_turn>model\n",
}
"""What is rendered where the original is wrong by a bug of its own; each of these rows says so."""
REFUSED = {("yuan", "system"): "takes no system message"}
RENDERED = [name for name, family in families().items() if name in ORIGINAL and family.bundled]


def render(family: Family, messages: list[dict[str, Any]], **options: Any) -> str:
    """The prompt as the worker's tokenizer renders it."""
    [prompt], _ = render_jinja_template([messages], chat_template=family.chat_template(), **options)
    assert isinstance(prompt, str)
    return prompt


def test_each_of_the_102_names_has_a_row_and_each_without_a_prompt_is_a_hosted_model() -> None:
    assert len(ORIGINAL) == 102
    assert set(ORIGINAL) <= set(families())
    hosted = {name for name in ORIGINAL if families()[name].api is not None}
    assert hosted == set(ORIGINAL) - set(RENDERED)
    assert (len(RENDERED), len(hosted)) == (82, 20)


@pytest.mark.parametrize("name", RENDERED)
def test_a_row_renders_the_bytes_of_the_original(name: str) -> None:
    family = families()[name]
    for case, messages in CONVERSATIONS.items():
        if (why := REFUSED.get((name, case))) is not None:
            with pytest.raises(Exception, match=why):
                render(family, messages, add_generation_prompt=True)
            continue
        expected = ORIGINAL[name][case]
        prompt = render(family, messages, add_generation_prompt=case != "continuation")
        if (name, case) in BETTER:
            assert expected != BETTER[name, case], "the original is right after all"
            expected = BETTER[name, case]
        assert prompt.encode() == expected.encode(), case


@pytest.mark.parametrize("name", RENDERED)
def test_an_answer_that_is_begun_is_continued_where_it_stopped(name: str) -> None:
    original = ORIGINAL[name]["continuation"]
    prompt = render(families()[name], CONVERSATIONS["continuation"], continue_final_message=True)
    assert prompt == original[: original.rindex(PARTIAL) + len(PARTIAL)]


def test_rows_that_differ_from_the_original_say_why() -> None:
    for name, _ in [*BETTER, *REFUSED]:
        assert families()[name].differs, name


@pytest.mark.parametrize("name", ["vicuna_v1.1", "llama-2", "dolly_v2", "chatglm2", "internlm-chat"])
def test_two_turns_of_the_user_in_a_row_both_stay_the_user_s(name: str) -> None:
    family = families()[name]
    assert family.format is not None
    twice = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    prompt = render(family, twice, add_generation_prompt=True)
    second = family.format.user.replace("{content}", "two").replace("{round}", str(family.format.first_round + 1))
    assert prompt.endswith(second + family.format.open)


@pytest.mark.parametrize(
    ("messages", "options", "why"),
    [
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], {}, "not tool"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], {}, "not system"),
        ([{"role": "user", "content": "a"}], {"tools": [{"type": "function"}]}, "no place for tools"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{}]}],
            {},
            "no place for tool calls",
        ),
    ],
)
def test_what_a_plain_template_cannot_show_is_refused_not_dropped(
    messages: list[dict[str, Any]], options: dict[str, Any], why: str
) -> None:
    with pytest.raises(Exception, match=why):
        render(families()["vicuna_v1.1"], messages, **options)
