"""Rows: what may stand in one, and which family a model is given."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastchat_q.workers.families import Family, choose, detect, families, read_rows
from fastchat_q.workers.families.choice import declared_names
from fastchat_q.workers.families.preview import render
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils.chat_template_utils import render_jinja_template

from fastchat_q.errors import ConfigurationError

OWN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
IM = "<|im_start|> {{ message['content'] }} <|im_end|>"
REMOTE_TYPES = {"hunyuan_v1_moe", "internlm2", "phi4_multimodal", "step3p7"}
"""Architectures that transformers may know only from a checkpoint's code."""

TODAY: list[tuple[str | None, str, str]] = [
    ("gpt_oss", "<|start|>assistant<|channel|>analysis<|message|>", "gpt-oss"),
    ("llama", "<|channel|>", "own"),
    ("deepseek_v32", "<｜DSML｜function_calls>", "deepseek-v3.2"),
    ("deepseek_v3", "{% if thinking %}<think></think>{% endif %}<｜tool▁calls▁begin｜>", "deepseek-v3.1"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>```json {{ content.split('</think>') }}", "deepseek-r1"),
    ("qwen2", "<｜tool▁calls▁begin｜>```json {{ content.split('</think>') }}", "deepseek-r1"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>```json", "deepseek-v3"),
    ("kimi_k2", "<|tool_calls_section_begin|>", "kimi-k2"),
    ("glm4_moe", "<tool_call>name<arg_key>k</arg_key></tool_call><think>", "glm-4.5"),
    ("minimax_m2", "<minimax:tool_call>", "minimax-m2"),
    ("qwen3_moe", "<tool_call><function=name>" + IM, "qwen3-coder"),
    ("qwen3_5", "<tool_call><function=name><think>" + IM, "qwen3.5"),
    ("qwen3", "<tool_call></tool_call><think></think>" + IM, "qwen3"),
    ("qwen2", "<tool_call></tool_call>" + IM, "hermes"),
    ("qwen2", "<tool_call></tool_call><think></think>" + IM, "qwq"),
    ("llama", "<tool_call></tool_call>" + IM, "hermes"),
    ("granite", "<|start_of_role|><|tool_call|>{% if thinking %}", "granite-3.2"),
    ("granitemoehybrid", "<|start_of_role|><tool_call>", "granite-4"),
    ("mistral", "[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral-tools"),
    ("mistral", "[INST] {{ message['content'] }} [/INST]", "own"),
    ("llama", '<|start_header_id|>"parameters": dictionary of argument name and its value<|eot_id|>', "llama-3.1"),
    ("llama", "<|start_header_id|>{{ message['content'] }}<|eot_id|>", "llama-3-chat"),
    ("phi3", "<|tool|><|end|>", "phi-4-mini"),
    ("phi3", "<|user|><|end|>", "phi-3"),
    ("gemma3_text", "<start_of_turn>", "gemma-2-and-3"),
    ("jamba", "<tool_calls>", "jamba"),
    ("internlm2", "<|im_start|>", "internlm-2.5"),
    ("llama", IM, "chatml-plain"),
    (None, OWN, "own"),
]


@pytest.mark.parametrize(("model_type", "template", "name"), TODAY)
def test_a_model_belongs_to_the_family_whose_marks_its_own_template_bears(
    model_type: str | None, template: str, name: str
) -> None:
    assert detect(model_type, template).name == name


def test_the_marks_of_a_tool_template_count_where_a_tokenizer_has_several() -> None:
    assert detect("llama", {"default": IM, "tool_use": IM + "<tool_call>"}).name == "hermes"


def test_rows_name_architectures_as_transformers_does() -> None:
    named = {name for family in families().values() for name in family.model_types}
    assert named - set(CONFIG_MAPPING_NAMES) <= REMOTE_TYPES


def test_no_model_is_named_by_two_rows() -> None:
    named = [model for family in families().values() for model in family.models]
    assert len(named) == len(set(named))


def test_the_tokenizer_s_own_template_comes_before_the_row_that_the_model_names() -> None:
    names = ["lmsys/vicuna-7b-v1.5"]
    own = choose(None, OWN, "llama", names, "here")
    row = choose(None, None, "llama", names, "here")
    assert (own.template, own.origin, own.family.name) == (OWN, "model", "vicuna_v1.1")
    assert (row.template, row.origin, row.declared) == (families()["vicuna_v1.1"].chat_template(), "row", True)


@pytest.mark.parametrize("name", ["vicuna", "/models/vicuna-7b-v1.5", "me/lmsys-vicuna-7b-v1.5", "Hunyuan-A13B"])
def test_a_part_of_a_name_or_path_decides_nothing(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no chat template.*--chat-template NAME.*FILE.*instruction-tuned"):
        choose(None, None, "llama", [name], name)


def test_a_model_names_itself_and_its_base_in_its_config_and_its_card() -> None:
    names = declared_names("here", {"_name_or_path": "a/b"}, {"base_model": ["lmsys/vicuna-7b-v1.5", "c/d"]})
    assert choose(None, None, "llama", names, "here").family.name == "vicuna_v1.1"
    assert names == ["here", "a/b", "lmsys/vicuna-7b-v1.5", "c/d"]


def test_an_explicit_name_wins_over_the_tokenizer_s_own_template() -> None:
    choice = choose("zephyr", OWN, "llama", [], "here")
    assert (choice.template, choice.origin) == (families()["zephyr"].chat_template(), "row")
    assert not choice.declared


def test_a_family_without_a_template_names_the_formats_of_a_model_s_own() -> None:
    choice = choose("hermes", OWN, "llama", [], "here")
    assert (choice.template, choice.family.tool_parser) == (OWN, "hermes")
    with pytest.raises(ConfigurationError, match=r"bring their own template.*FILE\.jinja"):
        choose("hermes", None, "llama", [], "here")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("vicna_v1.1", "did you mean vicuna_v1.1"),
        ("claude-3-opus-20240229", "--engine anthropic"),
        ("nowhere.jinja", "No such file"),
        ("nowhere.toml", "No such file"),
    ],
)
def test_a_wish_that_cannot_be_met_says_why(wanted: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        choose(wanted, OWN, "llama", [], "here")


def test_a_jinja_file_is_a_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("<tool_call> {{ messages }}")
    choice = choose(str(path), OWN, "llama", [], "here")
    assert (choice.template, choice.origin, choice.family.name) == ("<tool_call> {{ messages }}", "file", "hermes")


def test_a_row_of_one_s_own_lies_in_a_file_and_may_have_a_template_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[[family]]\nname = "mine"\ntemplate = "mine.jinja"\nsystem = "Hi."\nstop = ["###"]\n')
    (tmp_path / "mine.jinja").write_text("{{ system }}{{ messages[0]['content'] }}")
    choice = choose(str(path), None, "llama", [], "here")
    assert isinstance(choice.template, str)
    assert render(choice.template, [{"role": "user", "content": "Yo"}]) == "Hi.Yo"
    assert (choice.family.stop, choice.declared) == (("###",), True)
    path.write_text(path.read_text().replace("mine.jinja", "other.jinja"))
    with pytest.raises(ConfigurationError, match=r"no template 'other\.jinja'"):
        choose(str(path), None, "llama", [], "here")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[family]]\nname = ", "is not TOML"),
        ("[family]\nname = 'a'", r"rows begin with \[\[family\]\]"),
        ("[[families]]\nname = 'a'", r"rows begin with \[\[family\]\]"),
        ("[[family]]\nstop = ['a']", "name: Field required"),
        ("[[family]]\nname = 'a'\nstpo = ['a']", "stpo: Extra inputs"),
        ("[[family]]\nname = 'a'\nstop = 'a'", "stop: Input should be a valid tuple"),
        (
            "[[family]]\nname = 'a'\n[family.format]\nuser = 'U: '\nassistant = 'A: {content}'\nopen = 'A:'",
            "user = 'U: ' must hold {content} once",
        ),
        ("[[family]]\nname = 'a'\n[family.format]\nuser = '{content}'", "format.assistant: Field required"),
    ],
)
def test_a_row_with_a_mistake_is_refused_by_the_entry(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read_rows(text, "mine.toml")


@pytest.mark.parametrize("family", [f for f in families().values() if f.bundled], ids=lambda family: family.name)
def test_the_preview_is_what_the_worker_renders(family: Family) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello!\n"}]
    template = family.chat_template()
    assert template is not None
    [prompt], _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
    assert render(template, messages) == prompt


def test_the_bundled_chatml_shows_tools_calls_and_their_results() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 7, "b": "é"}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "7 + 5?"},
        {"role": "assistant", "tool_calls": [call, call]},
        {"role": "tool", "content": "12", "tool_call_id": "1"},
        {"role": "tool", "content": "13", "tool_call_id": "2"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "Sure?"},
    ]
    [prompt], _ = render_jinja_template(
        [messages], tools=[tool], chat_template=families()["chatml"].chat_template(), add_generation_prompt=True
    )
    calls = '<tool_call>\n{"name": "add", "arguments": {"a": 7, "b": "é"}}\n</tool_call>'
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\n")
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in prompt
    assert f"<|im_start|>assistant\n{calls}\n{calls}<|im_end|>\n" in prompt
    results = "<tool_response>\n12\n</tool_response>\n<tool_response>\n13\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n" in prompt
    assert prompt.endswith("<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n")
