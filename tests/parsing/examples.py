"""What models write, as their own chat templates and vLLM's parsers have it, and what it means."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastchat_q.workers.parsing import Answer, Format, format_of
from fastchat_q.workers.parsing.lark import Function

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "places": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
)
FUNCTIONS = [Function.of(tool) for tool in TOOLS]


class Call(NamedTuple):
    """A call: its arguments are compared as values."""

    name: str
    arguments: Any


class Said(NamedTuple):
    """What an answer turned out to be."""

    text: str
    reasoning: str
    calls: list[tuple[str, str]]
    """Names and arguments, as text."""
    ids: list[str | None]
    over: bool


class Example(NamedTuple):
    """An answer as it came from the model."""

    calls_by: str | None
    reasoning_by: str | None
    raw: str
    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    is_open: bool | None = None


ROME = Call("get_weather", {"city": "Rome"})
ROME_3 = Call("get_weather", {"city": "Rome", "days": 3})
NOW = Call("now", {})

EXAMPLES = {
    "Qwen 2.5": Example(
        "hermes",
        None,
        'Sure.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Sure.",
        calls=(ROME_3, NOW),
    ),
    "Qwen 3": Example(
        "hermes",
        "qwen3",
        '<think>\nhm\n</think>\n\nSure.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Sure.",
        "hm",
        (NOW,),
    ),
    "Qwen 3 that does not think": Example(None, "qwen3", "2 < 3\n", "2 < 3\n", is_open=False),
    "Qwen 3.5": Example(
        "qwen3_coder",
        "qwen3",
        'I should look.\n</think>\n\nLet me look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nRo"me\n'
        '</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=places>\n["a"]\n</parameter>\n</function>\n'
        "</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "Let me look.",
        "I should look.",
        (Call("get_weather", {"city": 'Ro"me', "days": 3, "places": ["a"]}), NOW),
        is_open=True,
    ),
    "Qwen 3 Coder without the outer marks": Example(
        "qwen3_coder", None, "<function=now>\n</function>\n</tool_call>", calls=(NOW,)
    ),
    "QwQ": Example(
        "hermes",
        "deepseek_r1",
        'hm\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        reasoning="hm",
        calls=(NOW,),
    ),
    "Granite 3": Example(
        "granite",
        "granite",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome"}}, {"name": "now", "arguments": null}]',
        calls=(ROME, NOW),
    ),
    "Granite 3.2 that thinks": Example(
        "granite",
        "granite",
        "Here is my thought process: a: b. Here's my response:\n\nYes.",
        "Yes.",
        "a: b.",
    ),
    "Jamba": Example(
        "jamba",
        None,
        '<tool_calls>[\n  {"name": "get_weather", "arguments": {"city": "Rome"}}\n]</tool_calls>',
        calls=(ROME,),
    ),
    "Phi 4 mini": Example(
        "phi4_mini_json", None, 'functools[{"name": "get_weather", "arguments": {"city": "Rome"}}]', calls=(ROME,)
    ),
    "InternLM 2.5": Example(
        "internlm",
        None,
        'I look.<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Rome"}}<|action_end|>\n',
        "I look.",
        calls=(ROME,),
    ),
    "Command A": Example(
        "cohere_command3",
        "cohere_command3",
        '<|START_THINKING|>hm<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", '
        '"parameters": {"city": "Rome"}}\n]<|END_ACTION|>',
        reasoning="hm",
        calls=(ROME,),
    ),
    "Command A that answers": Example(
        "cohere_command3",
        "cohere_command3",
        "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Hello.<|END_RESPONSE|>",
        "Hello.",
        "hm",
    ),
    "GigaChat 3": Example(
        "gigachat3",
        None,
        'Let me look.\n\nfunction call<|role_sep|>\n{"name": "get_weather", "arguments": {"city": "Rome"}}',
        "Let me look.",
        calls=(ROME,),
    ),
    "Apertus": Example(
        "apertus",
        None,
        'I look. <|tools_prefix|>[{"get_weather": {"city": "Rome"}}, {"now": {}}]<|tools_suffix|>',
        "I look.",
        calls=(ROME, NOW),
    ),
    "Llama 3.1": Example(
        "llama3_json",
        None,
        '{"name": "get_weather", "parameters": {"city": "Rome"}}; {"name": "now", "parameters": {}}',
        calls=(ROME, NOW),
    ),
    "Llama 3.1 with its tag": Example(
        "llama3_json", None, '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}', calls=(ROME,)
    ),
    "Llama 3.1 that answers in JSON": Example("llama3_json", None, '{"city": "Rome"} it is', '{"city": "Rome"} it is'),
    "Mistral 7B v0.3": Example(
        "mistral",
        None,
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}}, {"name": "now", "arguments": {}}]',
        calls=(ROME, NOW),
    ),
    "Mistral Small 3.2": Example(
        "mistral",
        None,
        'Yes.[TOOL_CALLS]get_weather[CALL_ID]abc123def[ARGS]{"city": "Rome"}[TOOL_CALLS]now{}',
        "Yes.",
        calls=(ROME, NOW),
    ),
    "Ministral 3": Example(
        "mistral",
        "mistral",
        '[THINK]hm[/THINK]Yes.[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}',
        "Yes.",
        "hm",
        (ROME,),
    ),
    "Kimi K2": Example(
        "kimi_k2",
        "kimi_k2",
        "<think>hm</think>Sure.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_call_begin|>functions.now:1'
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "Sure.",
        "hm",
        (ROME, NOW),
    ),
    "DeepSeek R1": Example(
        "deepseek_v3",
        "deepseek_r1",
        "hm\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Rome"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "hm",
        (ROME, NOW),
    ),
    "DeepSeek V3.1": Example(
        "deepseek_v31",
        "deepseek_v3",
        'Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Rome"}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Let me look.",
        calls=(ROME, NOW),
        is_open=False,
    ),
    "DeepSeek V3.2": Example(
        "deepseek_v32",
        "deepseek_v3",
        'hm</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" '
        'string="true">杭州</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">5</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        reasoning="hm",
        calls=(Call("get_weather", {"city": "杭州", "days": 5}),),
        is_open=True,
    ),
    "DeepSeek V4": Example(
        "deepseek_v4",
        "deepseek_v4",
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Rome'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
        calls=(ROME,),
        is_open=False,
    ),
    "Functionary 3.1": Example(
        "functionary_v3_llama_31",
        None,
        'Ok.<function=get_weather>{"city": "Rome"}</function><function=now>{}</function>',
        "Ok.",
        calls=(ROME, NOW),
    ),
    "GLM 4.6": Example(
        "glm45",
        "glm45",
        "\n<think>I should look.</think>\nLet me look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "Let me look.",
        "I should look.",
        (ROME_3,),
    ),
    "GLM 4.7": Example(
        "glm45",
        "glm45",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call><tool_call>now</tool_call>",
        calls=(ROME, NOW),
        is_open=False,
    ),
    "MiniMax M2": Example(
        "minimax_m2",
        "minimax_m2",
        'hm\n</think>\n\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        reasoning="hm",
        calls=(ROME_3, NOW),
    ),
    "Seed OSS": Example(
        "seed_oss",
        "seed_oss",
        "<seed:think>I should look.</seed:think>\nLet me look.\n\n<seed:tool_call>\n<function=get_weather>\n"
        "<parameter=city>Rome</parameter>\n<parameter=days>3</parameter>\n<parameter=places>['a']</parameter>\n"
        "</function>\n</seed:tool_call>",
        "Let me look.",
        "I should look.",
        (Call("get_weather", {"city": "Rome", "days": 3, "places": ["a"]}),),
    ),
    "Llama 4": Example(
        "llama4_pythonic", None, '<|python_start|>[get_weather(city="Rome"), now()]<|python_end|>', calls=(ROME, NOW)
    ),
    "Llama 3.2 in Python": Example(
        "pythonic",
        None,
        "[get_weather(city='Ro\\'me, (x)', places=[\"a\", 'b']), f(a={'k': None}, b=-1.5, c=true)]",
        calls=(
            Call("get_weather", {"city": "Ro'me, (x)", "places": ["a", "b"]}),
            Call("f", {"a": {"k": None}, "b": -1.5, "c": True}),
        ),
    ),
    "Llama 3.2 that writes a list": Example("pythonic", None, "[see(1)] and [2]", "[see(1)] and [2]"),
    "LFM 2": Example(
        "lfm2",
        None,
        '<|tool_call_start|>[get_weather(city="Rome")]<|tool_call_end|>Checking.',
        "Checking.",
        calls=(ROME,),
    ),
    "Olmo 3": Example(
        "olmo3",
        "olmo3",
        '<think>hm</think><function_calls>\nget_weather(city="Rome")\nnow()\n</function_calls>',
        reasoning="hm",
        calls=(ROME, NOW),
    ),
    "Gemma 4": Example(
        "gemma4",
        "gemma4",
        '<|channel>thought\nhm\n<channel|><|tool_call>call:get_weather{city:<|"|>Rome<|"|>,days:3,'
        'n:{a:[<|"|>x<|"|>,1,true]}}<tool_call|>',
        reasoning="hm",
        calls=(Call("get_weather", {"city": "Rome", "days": 3, "n": {"a": ["x", 1, True]}}),),
    ),
    "FunctionGemma": Example(
        "functiongemma",
        None,
        "<start_function_call>call:get_weather{city:<escape>Rome<escape>}<end_function_call>",
        calls=(ROME,),
    ),
    "gpt-oss": Example(
        "openai",
        "openai_gptoss",
        "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city":"Rome"}<|call|>',
        "Let me look.",
        "They ask.",
        (ROME,),
    ),
    "gpt-oss with the recipient before the channel": Example(
        "openai",
        "openai_gptoss",
        '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
        calls=(ROME,),
    ),
    "gpt-oss that answers": Example(
        "openai",
        "openai_gptoss",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>1 < 2 <b>!<|return|>",
        "1 < 2 <b>!",
        "Easy.",
    ),
    "Hunyuan A13B": Example(
        "hunyuan_a13b",
        "hunyuan_a13b",
        '<think>\nhm\n</think>\n<answer>\nOk.\n<tool_calls>[{"name": "get_weather", "arguments": {"city": "Rome"}}]'
        "</tool_calls>\n</answer>",
        "Ok.",
        "hm",
        (ROME,),
    ),
    "ERNIE 4.5": Example(
        "ernie45",
        "ernie45",
        'hm\n</think>\n\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n',
        reasoning="hm",
        calls=(ROME,),
    ),
    "a call inside the reasoning": Example(
        "hermes", "qwen3", '<think>hm <tool_call>{"name": "now", "arguments": {}}</tool_call>', "", "hm", (NOW,)
    ),
    "arguments before the name, and a key of no meaning": Example(
        "hermes",
        None,
        '<tool_call>{"id": [1], "arguments": {"city": "Rome"}, "name": "get_weather"}</tool_call>',
        calls=(ROME,),
    ),
    "arguments as text": Example(
        "hermes",
        None,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        calls=(Call("f", {"a": 1}),),
    ),
    "line breaks and escapes of a regular expression in a string": Example(
        "hermes",
        None,
        '<tool_call>{"name": "f", "arguments": {"a": "1\n\\d+"}}</tool_call>',
        calls=(Call("f", {"a": "1\n\\d+"}),),
    ),
    "Python's words in JSON": Example(
        "hermes",
        None,
        '<tool_call>{"name": "f", "arguments": {"a": True, "b": None}}</tool_call>',
        calls=(Call("f", {"a": True, "b": None}),),
    ),
    "what looks like a call": Example(
        "hermes",
        None,
        'Write <tool_call>{"nome": 1}</tool_call> there.',
        'Write <tool_call>{"nome": 1}</tool_call> there.',
    ),
    "a mark that is left alone": Example("hermes", None, "a <tool_call>", "a"),
    "reasoning that is cut off": Example("hermes", "qwen3", "<think>\nso", "", "so"),
}


def said(
    written: Format,
    pieces: Iterable[str],
    is_open: bool | None = None,
    single: bool = False,
    flush: bool = True,
    forced: bool = False,
) -> Said:
    """Feeds an answer and collects what comes out."""
    parser = Answer(written, FUNCTIONS, is_open, lambda call, name: f"call_{call}", single, forced)
    text = reasoning = ""
    calls: list[list[str]] = []
    ids: list[str | None] = []
    over = False
    for piece in [*pieces, *([None] if flush else [])]:
        parts = parser.flush() if piece is None else parser.feed(piece)
        text, reasoning = text + parts.text, reasoning + parts.reasoning
        for delta in parts.tool_calls:
            if delta.name is not None:
                assert delta.call == len(calls), "calls begin in their order"
                calls.append([delta.name, ""])
                ids.append(delta.id)
            calls[delta.call][1] += delta.arguments
        over = over or parts.over
        if over:
            break
    return Said(text, reasoning, [(name, arguments) for name, arguments in calls], ids, over)


def format_for(example: Example) -> Format:
    """The format of an example."""
    return format_of(example.calls_by, example.reasoning_by)


def values(found: Said) -> tuple[Call, ...]:
    """Its calls with their arguments decoded."""
    return tuple(Call(name, json.loads(arguments)) for name, arguments in found.calls)
