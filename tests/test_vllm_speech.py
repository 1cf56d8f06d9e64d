"""Tools, reasoning and guides of the vLLM engine, with a real vLLM: `make test-vllm`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from fastchat_q.workers.engines.tiny.dialogues import TOOLS

from fastchat_q.errors import ConfigurationError, InvalidRequestError
from fastchat_q.events import Piece
from fastchat_q.jobs import Guide, Job, Message

from .engines.driving import Driver
from .servers import wait_until
from .stack import Stack
from .vllm_driving import EAGER, LOAD, OPTIONS, SLOW, STARTUP_S, asks, environment, needs_vllm, resumed, running, talker

pytestmark = [*SLOW, needs_vllm]

DEFINITIONS = tuple(tool.definition(name) for name, tool in TOOLS.items())
WEATHER = "What is the weather in Rome?"
BOTH = {"tools": DEFINITIONS}
SCRIPTS = {
    "<a>": ("<think>", "Well", ", let", " me see.", "</think>", "It", " is", "<|quiet|>", " 5."),
    "<b>": (
        *("Sure.", "<tool_call>", '{"name": "ad', 'd", "argu', 'ments": {"a": 1', ', "b": 2', "}}", "</tool_call>"),
        *("\n<tool_call>", '{"name": "get_time", "arguments":', ' {"city": "Oslo"}', "}</tool_call>"),
    ),
}
SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|quiet|>", *SCRIPTS)
Said = tuple[str, str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Driver]:
    """The built-in model, which knows tools."""
    with running(replace(OPTIONS, model="tiny", load=replace(LOAD, max_model_len=1024), engine_arg=EAGER)) as driver:
        yield driver


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A model that says its scripts, with marks that are special tokens."""
    folder = talker(tmp_path_factory.mktemp("models") / "talker", SCRIPTS, SPECIAL)
    load = replace(LOAD, tool_call_parser="hermes", reasoning_parser="qwen3")
    with running(replace(OPTIONS, model=str(folder), load=load, engine_arg=EAGER)) as driver:
        yield driver


def says(job_id: str, script: str, **fields: Any) -> Job:
    return asks(job_id, "hi", job_fields={"template_kwargs": {"script": script}, **fields}, ignore_eos=False)


def tools(job_id: str, text: str, *, job_fields: Any = None, **fields: Any) -> Job:
    given = {"max_tokens": 200, "ignore_eos": False, **fields}
    return asks(job_id, text, job_fields={**BOTH, **(job_fields or {})}, **given)


def said(pieces: Sequence[Piece], choice: int = 0) -> Said:
    """(content, reasoning, names and arguments of calls)."""
    text, reasoning, calls = "", "", []
    for piece in pieces:
        if piece.choice != choice:
            continue
        text, reasoning = text + piece.text, reasoning + piece.reasoning
        for delta in piece.tool_calls:
            if delta.name is not None:
                assert delta.call == len(calls)
                assert delta.id
                calls.append([delta.name, ""])
            calls[delta.call][1] += delta.arguments
    return text, reasoning, [(name, arguments) for name, arguments in calls]


def ids_of(pieces: Sequence[Piece]) -> tuple[int, ...]:
    return tuple([token for piece in pieces for token in piece.ids])


def test_the_card_says_what_the_model_can_do(tiny: Driver, talking: Driver) -> None:
    assert "tools" in tiny.engine.card.features
    assert "reasoning" not in tiny.engine.card.features
    assert {"tools", "reasoning", "structured_outputs"} <= set(talking.engine.card.features)
    assert "vision" not in talking.engine.card.features


def test_a_parser_that_is_not_known_keeps_the_engine_from_starting() -> None:
    from fastchat_q.workers.engines.vllm import setup as vllm_setup

    with environment(), pytest.raises(ConfigurationError, match="there is no such parser"):
        vllm_setup.build(replace(OPTIONS, load=replace(LOAD, tool_call_parser="nothing")), "tiny")


def test_the_model_calls_a_tool_of_itself_and_is_streamed(tiny: Driver) -> None:
    [answer] = tiny.run(tools("auto", WEATHER))
    assert said(answer.pieces) == ("", "", [("get_weather", '{"city": "Rome"}')])
    assert answer.finish_reason == "tool_calls"
    assert sum(bool(piece.tool_calls) for piece in answer.pieces) > 2, "arguments come in fragments"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(answer.ids)


def test_without_tools_or_with_none_the_same_text_is_content(tiny: Driver) -> None:
    plain, none = tiny.run(
        asks("plain", "Hello!", ignore_eos=False), tools("none", WEATHER, job_fields={"tool_choice": "none"})
    )
    assert plain.text == "Hello! How can I help you?"
    assert said(none.pieces)[2] == []
    assert none.finish_reason == "stop"


def test_an_answer_without_a_call_is_content(tiny: Driver) -> None:
    [answer] = tiny.run(tools("hello", "Hello!"))
    assert said(answer.pieces) == ("Hello! How can I help you?", "", [])
    assert answer.finish_reason == "stop"


def test_the_result_of_a_tool_is_put_into_words(tiny: Driver) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = (
        Message(role="user", content=WEATHER),
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content="sunny, 20 degrees", tool_call_id="call_1"),
    )
    [answer] = tiny.run(tools("result", "", job_fields={"messages": messages}))
    assert said(answer.pieces) == ("The weather in Rome is sunny, 20 degrees.", "", [])


def test_a_call_that_must_come_is_valid_whatever_is_asked(tiny: Driver) -> None:
    """At a temperature of 1: the grammar makes it so, not the model."""
    jobs = [
        tools(
            f"required{seed}",
            "Hello!",
            job_fields={"tool_choice": "required", "parallel_tool_calls": seed % 2 == 0},
            temperature=1.0,
            seed=seed,
            max_tokens=800,
        )
        for seed in range(12)
    ]
    for number, answer in enumerate(tiny.run(*jobs)):
        text, _, calls = said(answer.pieces)
        assert (text, answer.finish_reason) == ("", "tool_calls")
        assert len(calls) == 1 or (calls and number % 2 == 0)
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), TOOLS[name].definition(name)["function"]["parameters"])


def test_a_named_function_is_called(tiny: Driver) -> None:
    [answer] = tiny.run(tools("named", "Hello!", job_fields={"tool_choice": "function:add"}, ignore_eos=True))
    text, _, [(name, arguments)] = said(answer.pieces)
    assert (text, name, answer.finish_reason) == ("", "add", "tool_calls")
    jsonschema.validate(json.loads(arguments), TOOLS["add"].definition("add")["function"]["parameters"])


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_call_is_resumed_wherever_it_was_cut(tiny: Driver, choice: str) -> None:
    fields = {"tool_choice": choice, "parallel_tool_calls": False}
    [whole] = tiny.run(tools(f"whole {choice}", WEATHER, job_fields=fields))
    for cut in range(1, len(whole.pieces), 4):
        one = tools(f"whole {choice}", WEATHER, job_fields=fields)  # the ids of its calls hang on the job's
        rest = resumed(tiny, one, whole.pieces[:cut])
        both = [*whole.pieces[:cut], *rest.pieces]
        assert ids_of(both) == whole.ids
        assert said(both) == said(whole.pieces)
        assert (rest.finish_reason, rest.usage) == ("tool_calls", whole.usage)


def test_a_strict_function_whose_schema_cannot_be_held_to_is_refused(tiny: Driver) -> None:
    parameters = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    [answer] = tiny.run(tools("strict", "Hello!", job_fields={"tools": (tool,), "tool_choice": "required"}))
    assert answer.ended is not None
    assert isinstance(answer.ended.error, InvalidRequestError)
    assert answer.ended.error.param == "tools"


def test_choices_of_a_job_call_each_for_itself(tiny: Driver) -> None:
    fields = {"tool_choice": "required", "parallel_tool_calls": False}
    [answer] = tiny.run(tools("n", "Hello!", job_fields=fields, n=3, temperature=1.0, seed=3, max_tokens=400))
    calls = [said(answer.pieces, choice)[2] for choice in range(3)]
    assert [len(some) for some in calls] == [1, 1, 1]
    assert len({delta.id for piece in answer.pieces for delta in piece.tool_calls if delta.id}) == 3
    assert [piece.finish for piece in answer.pieces if piece.finish] == ["tool_calls"] * 3


def test_reasoning_is_told_from_content_behind_marks_that_are_special_tokens(talking: Driver) -> None:
    [answer] = talking.run(says("reason", "<a>"))
    assert said(answer.pieces) == ("It is 5.", "Well, let me see.", [])
    assert answer.finish_reason == "stop"
    assert len([piece for piece in answer.pieces if piece.reasoning]) > 1


def test_calls_come_one_after_the_other_behind_content(talking: Driver) -> None:
    expected = [("add", '{"a": 1, "b": 2}'), ("get_time", '{"city": "Oslo"}')]
    both, one = talking.run(says("calls", "<b>", **BOTH), says("call", "<b>", **BOTH, parallel_tool_calls=False))
    assert said(both.pieces) == ("Sure.", "", expected)
    assert said(one.pieces) == ("Sure.", "", expected[:1])
    assert both.finish_reason == one.finish_reason == "tool_calls"
    assert len(one.ids) < len(both.ids)
    engine: Any = talking.engine
    wait_until(lambda: engine._llm.get_num_unfinished_requests() == 0, "vLLM forgot the rest of it")


@pytest.mark.parametrize("script", ["<a>", "<b>"])
def test_reasoning_and_calls_are_resumed_wherever_they_were_cut(talking: Driver, script: str) -> None:
    [whole] = talking.run(says(f"w{script}", script, **BOTH))
    for cut in range(1, len(whole.pieces)):
        rest = resumed(talking, says(f"w{script}", script, **BOTH), whole.pieces[:cut])
        assert said([*whole.pieces[:cut], *rest.pieces]) == said(whole.pieces)
        assert ids_of([*whole.pieces[:cut], *rest.pieces]) == whole.ids
        assert (rest.finish_reason, rest.usage) == (whole.finish_reason, whole.usage)


def test_stop_strings_end_an_answer_that_is_parsed(talking: Driver) -> None:
    job = says("stop", "<a>")
    stopped = job.model_copy(update={"sampling": job.sampling.model_copy(update={"stop": ("is 5",)})})
    [answer] = talking.run(stopped)
    assert said(answer.pieces) == ("It ", "Well, let me see.", [])
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "guide",
    [
        Guide(kind="regex", value="[0-9]{3}/[ab]"),
        Guide(kind="choice", value='["north", "south"]'),
        Guide(
            kind="json_schema",
            value='{"properties": {"a": {"enum": [1, 2]}}, "required": ["a"], '
            '"type": "object", "additionalProperties": false}',
        ),
        Guide(kind="grammar", value='start: "yes" | no\nno: "no"'),
    ],
    ids=lambda guide: guide.kind,
)
def test_a_guide_begins_behind_the_reasoning(talking: Driver, guide: Guide) -> None:
    job = says(f"guided {guide.kind}", "<think>")  # the prompt begins the reasoning
    fields = {"guide": guide, "max_tokens": 100}
    [answer] = talking.run(job.model_copy(update={"sampling": job.sampling.model_copy(update=fields)}))
    text, reasoning, _ = said(answer.pieces)
    assert answer.finish_reason == "stop"
    assert reasoning == "Well, let me see."
    match guide.kind:
        case "json_schema":
            assert json.loads(text)["a"] in (1, 2)
        case "regex":
            assert len(text) == 5
            assert text[:3].isdigit()
        case _:
            assert text in ("north", "south", "yes", "no")


def test_tools_go_through_the_whole_path(stack: Stack) -> None:
    flags = ["--engine", "vllm", "--model", "tiny", "--dtype", "float32", "--max-model-len", "512"]
    with environment():
        worker = stack.start("worker", "worker", "--no-supervise", *flags, *(f"--engine-arg={pair}" for pair in EAGER))
        wait_until(lambda: not worker.alive or stack.registered(worker.pid), "the worker serves", STARTUP_S)
    assert worker.alive, worker.output()
    with stack.client() as client:
        create: Any = client.chat.completions.create
        asked = {"model": "tiny", "messages": [{"role": "user", "content": WEATHER}], "temperature": 0}
        [call] = create(**asked, tools=list(DEFINITIONS)).choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Rome"}')
        deltas = [
            delta
            for chunk in create(**asked, tools=list(DEFINITIONS), tool_choice="required", stream=True)
            for choice in chunk.choices
            for delta in choice.delta.tool_calls or ()
        ]
        assert deltas[0].function.name == "get_weather"
        assert len(deltas) > 1
        json.loads("".join(delta.function.arguments or "" for delta in deltas))
    assert worker.stop() == 0
