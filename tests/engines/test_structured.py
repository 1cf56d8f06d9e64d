"""A guided answer follows its grammar to the end, whatever the model would say, and troubles no neighbour."""

import json
import re
import threading
from typing import Any

import jsonschema
import pytest
import torch
from fastchat_q.workers.engines.base import Request
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.batching.sampling import Sampler
from fastchat_q.workers.engines.loading.model import Loaded
from fastchat_q.workers.engines.processing import structured
from fastchat_q.workers.engines.processing.grammars import Checker
from fastchat_q.workers.engines.processing.sequence import Language, Picked, Sequence
from fastchat_q.workers.engines.processing.structured import CACHED_GRAMMARS, Guides, check
from fastchat_q.workers.engines.processing.text import TokenTexts
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerBase

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import Piece
from fastchat_q.jobs import Guide, Job, Message, Sampling

from .conftest import Drive
from .driving import Answer, Driver
from .rows import language_of, row

NAME = {"type": "string", "maxLength": 12}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def closed(**properties: Any) -> dict[str, Any]:
    """An object of exactly these properties."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


POINT = closed(x=DIGIT, y=DIGIT)
SCHEMAS: dict[str, dict[str, Any] | bool] = {
    "boolean": {"type": "boolean"},
    "null or number": {"type": ["null", "number"]},
    "bounded integer": {"type": "integer", "minimum": -20, "maximum": 250},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "short text": {"type": "string", "minLength": 3, "maxLength": 10},
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "enum": {"enum": ["red", "green", 3, None, {"deep": [1, 2]}]},
    "const": {"const": {"a": [True, "b"]}},
    "list": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 5},
    "tuple": {"type": "array", "prefixItems": [NAME, DIGIT], "items": False, "minItems": 2},
    "flat": closed(name=NAME, age={"type": "integer", "minimum": 0, "maximum": 120}, ok={"type": "boolean"}),
    "optional": {
        "type": "object",
        "properties": {"a": DIGIT, "b": NAME, "c": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "nested": closed(items={"type": "array", "items": closed(id=DIGIT, tags={"enum": ["x", "y"]}), "maxItems": 2}),
    "references": {"$defs": {"point": POINT}, **closed(a={"$ref": "#/$defs/point"}, b={"$ref": "#/$defs/point"})},
    "anyOf": {"anyOf": [closed(kind={"const": "x"}, n=DIGIT), closed(kind={"const": "y"}, s=NAME)]},
    "oneOf": {"oneOf": [DIGIT, {"type": "boolean"}]},
    "allOf": {
        "allOf": [closed(a=DIGIT) | {"additionalProperties": True}, {"properties": {"a": {"maximum": 5}}}],
        "additionalProperties": False,
        "properties": {"a": True},
    },
    "unicode": closed(größe={"enum": ["klein", "groß", "日本"]}),
}
SEEDS = range(5)


def guided(job_id: str, kind: str, value: Any = "", **parameters: Any) -> Job:
    """A job whose answer is guided; schemas and choices are written as JSON."""
    guide = Guide(kind=kind, value=value if isinstance(value, str) else json.dumps(value))  # type: ignore[arg-type]
    sampling = Sampling(**{"max_tokens": 400, "guide": guide, **parameters})
    return Job(id=job_id, model="m", messages=(Message(role="user", content="tell me a story"),), sampling=sampling)


def error_of(answer: Answer) -> Exception:
    assert answer.ended is not None
    assert answer.ended.error is not None
    return answer.ended.error


@pytest.fixture
def running(drive: Drive, tiny: Loaded) -> Driver:
    return drive(TransformersEngine("m", 16, tiny))


@pytest.fixture(scope="module")
def speaks(tokenizer: PreTrainedTokenizerBase) -> Language:
    return language_of(tokenizer)


@pytest.mark.timeout(600)
def test_every_answer_is_json_of_its_schema(drive: Drive, tiny: Loaded) -> None:
    driver = drive(TransformersEngine("m", 32, tiny))
    jobs = [
        guided(f"{name} {seed}", "json_schema", schema, seed=seed, temperature=1.5)
        for name, schema in SCHEMAS.items()
        for seed in SEEDS
    ]
    for start in range(0, len(jobs), 25):
        for one, answer in zip(jobs[start : start + 25], driver.run(*jobs[start : start + 25]), strict=True):
            assert answer.finish_reason == "stop", f"{one.id}: {answer.text!r}"
            schema = SCHEMAS[one.id.rsplit(" ", 1)[0]]
            jsonschema.validate(json.loads(answer.text), schema, format_checker=jsonschema.FormatChecker())


def test_schemas_leave_room_for_more_than_one_answer(running: Driver) -> None:
    jobs = [guided(f"{seed}", "json_schema", SCHEMAS["flat"], seed=seed, temperature=1.5) for seed in range(10)]
    assert len({answer.text for answer in running.run(*jobs)}) > 5


def test_the_other_kinds_of_guide_are_followed(running: Driver) -> None:
    lark = 'start: greeting " " name\ngreeting: "hello" | "bye"\nname: /[A-Z][a-z]{2,5}/'
    choices = ["yes", "no", 'say "maybe"', "größe 日本"]
    running.submit(
        *(guided(f"regex {seed}", "regex", r"(\+49|0)[0-9]{3}-[0-9]{4,6} (home|work)", seed=seed) for seed in SEEDS),
        *(guided(f"choice {seed}", "choice", choices, seed=seed, temperature=2.0) for seed in SEEDS),
        *(guided(f"grammar {seed}", "grammar", lark, seed=seed) for seed in SEEDS),
        guided("one choice", "choice", ["only this"]),
    )
    for seed in SEEDS:
        phone, choice, hello = running.wait(f"regex {seed}", f"choice {seed}", f"grammar {seed}")
        assert re.fullmatch(r"(\+49|0)[0-9]{3}-[0-9]{4,6} (home|work)", phone.text)
        assert choice.text in choices
        assert re.fullmatch("(hello|bye) [A-Z][a-z]{2,5}", hello.text)
    [only] = running.wait("one choice")
    assert (only.text, only.finish_reason) == ("only this", "stop")


def test_json_object_is_an_object_or_the_start_of_one(running: Driver) -> None:
    jobs = [guided(f"{seed}", "json_object", seed=seed, max_tokens=300) for seed in range(8)]
    answers = running.run(*jobs)
    for answer in answers:
        assert answer.text.lstrip().startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)
    assert any(answer.finish_reason == "stop" for answer in answers)


@pytest.mark.parametrize(
    "parameters",
    [
        {"ignore_eos": True},
        {"min_tokens": 200},
        {"logit_bias": {2: -100.0}},
        {"temperature": 0.0, "repetition_penalty": 3.0},
        {"temperature": 2.0, "min_p": 1.0},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0, "top_k": 3},
    ],
    ids=str,
)
def test_a_complete_answer_ends_whatever_else_is_asked(running: Driver, parameters: dict[str, Any]) -> None:
    [answer] = running.run(guided("a", "choice", ["done now"], **parameters))
    assert (answer.text, answer.finish_reason) == ("done now", "stop")


def test_min_tokens_holds_the_end_off_while_the_grammar_allows_more(running: Driver) -> None:
    job = guided("a", "regex", "a{1,60}", min_tokens=20, temperature=2.0)
    [answer] = running.run(job)
    assert len(answer.ids) >= 20
    assert re.fullmatch("a{1,60}", answer.text)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("json_schema", '{"type": "strin"}', "strin"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}', "minLength"),
        ("json_schema", '{"$ref": "#/$defs/none"}', "none"),
        ("json_schema", '{"$ref": "http://localhost:1/schema"}', "localhost"),
        ("json_schema", '{"oneOf": [{"type": "string"}, {"pattern": "a"}]}', "use 'anyOf'"),
        ("grammar", 'start: %json {"oneOf": [{"type": "string"}, {"pattern": "a"}]}', "use 'anyOf'"),
        ("json_schema", '{"if": {}, "not": {}}', "keywords are not supported"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ("json_schema", '{"a"', "delimiter"),
        ("json_schema", "[]", "object"),
        ("json_schema", '{"type":"array","items":' * 3000 + "{}" + "}" * 3000, "recursion"),
        ("regex", "(", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("choice", "[]", "at least one"),
        ("choice", "[1]", "string"),
        ("choice", "yes", "Expecting value"),
        ("grammar", "start: missing", "missing"),
        ("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        ("grammar", "", "cannot be used"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_reason_while_others_go_on(
    running: Driver, kind: str, value: str, said: str
) -> None:
    bad, good = running.run(guided("bad", kind, value), guided("good", "choice", ["fine"]))
    error = error_of(bad)
    assert isinstance(error, InvalidRequestError)
    assert error.param
    assert error.code == ("invalid_schema" if kind.startswith("json") else "invalid_grammar")
    assert said in str(error)
    assert len(str(error)) < 500
    assert not any(theirs in str(error) for theirs in ("coerce", "option", "failed to compile", " | ", "\n"))
    assert not bad.ids
    assert good.text == "fine"


def test_a_regex_beyond_the_limits_fails_alone(running: Driver) -> None:
    bad, good = running.run(guided("bad", "regex", "(a{900}){900}"), guided("good", "choice", ["fine"]))
    assert isinstance(error_of(bad), InvalidRequestError)
    assert "too many" in str(error_of(bad))
    assert good.text == "fine"


ENDLESS = '{"type": "integer", "multipleOf": 99396891}'


@pytest.mark.parametrize(("kind", "value"), [("json_schema", ENDLESS), ("grammar", f"start: %json {ENDLESS}")])
def test_a_grammar_that_compiles_for_minutes_is_refused_and_those_behind_it_are_served(
    running: Driver, kind: str, value: str
) -> None:
    bad, good = running.run(guided("bad", kind, value), guided("good", "regex", "fine"))
    error = error_of(bad)
    assert isinstance(error, InvalidRequestError)
    assert error.param == ("response_format" if kind == "json_schema" else "structured_outputs")
    assert "more than 3 seconds" in str(error)
    assert good.text == "fine"


def test_the_process_that_compiles_first_ends_with_who_asked_it() -> None:
    checker = Checker()
    assert not checker.error(LLMatcher.grammar_from_regex("a+"))
    assert "unclosed" in checker.error(LLMatcher.grammar_from_regex("("))
    process = checker._process
    assert process is not None
    assert process.poll() is None
    process.kill()
    with pytest.raises(OSError, match="ended with code -9"):  # nothing is said of the grammar
        checker.error(LLMatcher.grammar_from_regex("a+"))
    assert not checker.error(LLMatcher.grammar_from_regex("a+")), "by another one"
    process = checker._process
    assert process is not None
    del checker
    assert process.wait(10) is not None


def test_a_model_without_an_end_token_follows_no_guide(drive: Drive, tiny: Loaded) -> None:
    endless = Loaded(tiny.model, tiny.tokenizer, tiny.device, tiny.context_length, frozenset())
    [answer] = drive(TransformersEngine("m", 2, endless)).run(guided("a", "choice", ["x"]))
    assert isinstance(error_of(answer), InvalidRequestError)


def test_neighbours_run_while_a_grammar_is_compiled(running: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, compile_now = threading.Event(), Guides._matcher

    def slow(guides: Guides, guide: Guide) -> Any:
        assert go_on.wait(60)
        return compile_now(guides, guide)

    monkeypatch.setattr(Guides, "_matcher", slow)
    running.submit(guided("waits", "choice", ["at last"]))
    [free] = running.run(guided("free", "json_object", guide=None, max_tokens=20, ignore_eos=True))
    assert len(free.ids) == 20
    assert not running.answer("waits").outputs
    go_on.set()
    [waited] = running.wait("waits")
    assert waited.text == "at last"


def test_a_request_can_be_dropped_while_its_grammar_is_compiled(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(Guides, "_matcher", lambda *_: go_on.wait(60) and None)
    engine = TransformersEngine("m", 2, tiny)
    engine.admit(Request(guided("a", "choice", ["x"]), "a"))
    assert engine.wait_s()
    assert engine.step() == []
    engine.drop("a")
    assert engine.wait_s() is None
    go_on.set()


def test_an_answer_outside_its_grammar_fails_alone(running: Driver, tokenizer: PreTrainedTokenizerBase) -> None:
    running.submit(guided("good", "regex", "[a-z]{30}"))
    prior = tokenizer.encode("no JSON", add_special_tokens=False)
    running.resume(guided("bad", "json_object"), prior)
    bad, good = running.wait("bad", "good")
    assert getattr(error_of(bad), "code", "") == "guide_error"
    assert re.fullmatch("[a-z]{30}", good.text)


@pytest.mark.parametrize("name", ["flat", "nested", "references"])
def test_a_resumed_answer_is_the_uninterrupted_one(running: Driver, name: str) -> None:
    parameters = {"seed": 8, "temperature": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2, "top_p": 0.9}
    [whole] = running.run(guided("whole", "json_schema", SCHEMAS[name], **parameters))
    for cut in (1, len(whole.ids) // 2, len(whole.ids) - 1):
        running.resume(guided(f"{cut}", "json_schema", SCHEMAS[name], **parameters), whole.ids[:cut])
        [rest] = running.wait(f"{cut}")
        assert whole.ids[:cut] + rest.ids == whole.ids


def test_the_choices_of_a_request_go_their_own_ways(speaks: Language) -> None:
    guide = Guide(kind="regex", value="[a-z]{12}")
    rows = [row(speaks, guide=guide, n=3, seed=1, choice=choice) for choice in range(3)]
    alone = row(speaks, guide=guide, seed=1)
    assert finish(rows)[0] == finish([alone])[0]
    assert len({tuple(one.ids) for one in rows}) == 3


def finish(rows: list[Sequence]) -> list[list[int]]:
    """Runs rows to their ends over logits that say nothing."""
    sampler, going = Sampler(TokenTexts(rows[0].language.guides._tokenizer)), list(rows)
    while going:
        assert all(one.guide is None or one.guide._compiled.result() for one in going)
        picks = sampler.pick(torch.zeros(len(going), rows[0].language.vocabulary), going)
        going = [one for one, picked in zip(going, picks, strict=True) if one.accept(picked).ended is None]
    return [one.ids for one in rows]


def test_a_guided_row_draws_the_same_beside_any_neighbours(speaks: Language) -> None:
    def fresh() -> list[Sequence]:
        return [
            row(speaks, seed=1, guide=Guide(kind="regex", value="[a-z]{12}")),
            row(speaks, seed=2, guide=Guide(kind="json_schema", value=json.dumps(SCHEMAS["flat"])), top_p=0.9),
            row(speaks, seed=3, limit=30, top_k=50, min_tokens=30),
            row(speaks, seed=4, limit=20, temperature=0.0, logit_bias={5: 1.0}),
            row(speaks, seed=5, guide=Guide(kind="choice", value='["a", "b"]'), temperature=0.0),
        ]

    assert finish(fresh()) == [finish([one])[0] for one in fresh()]


def test_logprobs_of_a_guided_row_are_those_of_the_model(speaks: Language) -> None:
    logits = torch.randn(1, speaks.vocabulary, generator=torch.Generator().manual_seed(0))
    one = row(speaks, guide=Guide(kind="choice", value='["a"]'), logprobs=2)
    assert one.guide is not None
    one.guide._compiled.result()
    [picked] = Sampler(TokenTexts(speaks.guides._tokenizer)).pick(logits.clone(), [one])
    raw = logits[0].log_softmax(-1)
    assert picked.logprobs is not None
    assert picked.logprobs.logprob == pytest.approx(float(raw[picked.token]), abs=1e-5)
    assert picked.logprobs.top[0].id == int(raw.argmax())


def test_grammars_are_compiled_once_and_only_so_many_are_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    guides = language_of(tokenizer).guides
    same = Guide(kind="choice", value='["a"]')
    assert guides.guided(same, 100)._compiled is guides.guided(same, 100)._compiled
    first = guides.guided(same, 100)._compiled
    for number in range(CACHED_GRAMMARS):
        guides.guided(Guide(kind="choice", value=f'["{number}"]'), 100)
    assert len(guides._compiled) == CACHED_GRAMMARS
    assert guides.guided(same, 100)._compiled is not first


def test_grammars_that_took_long_make_room(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    guides = language_of(tokenizer).guides
    short, long, new = (Guide(kind="choice", value=json.dumps(["a" * size])) for size in (1, 2, 3))
    for guide in (short, long):
        guides.guided(guide, 100)._compiled.result()
    monkeypatch.setattr(structured, "CACHED_S", guides._compiled[long].result().took_s)
    guides.guided(new, 100)
    assert list(guides._compiled) == [long, new]


def test_the_log_of_a_finished_guided_answer_ends_it_at_once(tiny: Loaded, running: Driver) -> None:
    [whole] = running.run(guided("a", "choice", ["done now"]))
    engine = TransformersEngine("m", 2, tiny)
    engine.admit(Request(guided("a", "choice", ["done now"]), "a", (Piece(whole.ids),)))
    [output] = engine.step()
    assert output.pieces == ()
    assert output.ended is not None
    assert output.ended.finish_reason == "stop"


def test_a_picked_token_outside_the_mask_is_noticed(speaks: Language) -> None:
    one = row(speaks, guide=Guide(kind="regex", value="[0-9]+"))
    sampler = Sampler(TokenTexts(speaks.guides._tokenizer))
    assert one.guide is not None
    one.guide._compiled.result()
    letter = int(speaks.guides._tokenizer.encode("q", add_special_tokens=False)[0])
    one.accept(Picked(letter))
    [picked] = sampler.pick(torch.zeros(1, speaks.vocabulary), [one])
    with pytest.raises(InvalidRequestError, match="cannot be followed"):
        one.accept(picked)


def test_a_grammar_may_name_control_tokens_beyond_those_of_the_process_that_checks_it() -> None:
    grammar = 'start: <[1022]> word <|im_end|>\nword: "<[7]>" | /a\\/<[8]>/ | %json {"const": "<[9]>"}\n'
    checker = Checker()
    assert check(Guide(kind="grammar", value=grammar), checker) == grammar
    with pytest.raises(InvalidRequestError, match="unknown name"):
        check(Guide(kind="grammar", value="start: <[1022]> nobody\n"), checker)
