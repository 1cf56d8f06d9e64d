"""What fails in a step fails alone: passes, draws and memory that is not there, with one choice or several."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from fastchat_q.workers import watch
from fastchat_q.workers.active import Active
from fastchat_q.workers.engines.base import OUT_OF_MEMORY, Request
from fastchat_q.workers.engines.batching import draws, kv, prefixes
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.batching.intake import Choice
from fastchat_q.workers.engines.batching.passes import Part, Result
from fastchat_q.workers.engines.batching.sampling import Sampler
from fastchat_q.workers.engines.batching.scheduler import Pace
from fastchat_q.workers.engines.loading.model import Loaded
from fastchat_q.workers.engines.processing import sequence
from fastchat_q.workers.line import Line
from transformers import PreTrainedTokenizerBase

from fastchat_q.errors import FastchatQError, JobFailedError, RetryableError
from fastchat_q.queue import Claim

from .conftest import Drive
from .driving import Answer, Driver, job
from .random_models import loaded, random_model
from .scenes import WORDS, generated, prompt_ids, question

ALWAYS = 10**6


@pytest.fixture(scope="module", params=["llama", "falcon", "jamba", "llama4"])
def either(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """One model for each way that rows can decode: packed, in a padded batch, with states, one by one."""
    return loaded(random_model(request.param), tokenizer)


@pytest.fixture
def engine(either: Loaded) -> TransformersEngine:
    return TransformersEngine("m", 8, either)


@pytest.fixture(scope="module")
def llama(tokenizer: PreTrainedTokenizerBase) -> Loaded:
    return loaded(random_model("llama"), tokenizer)


def expected(model: Loaded, text: str, tokens: int) -> tuple[int, ...]:
    return generated(model.model, prompt_ids(model.tokenizer, text), tokens)


def error_of(answer: Answer) -> FastchatQError:
    assert answer.ended is not None
    assert answer.ended.error is not None
    return answer.ended.error


def assert_serves(driver: Driver, model: Loaded) -> None:
    [after] = driver.run(job("after", question(3), max_tokens=10))
    assert after.ids == expected(model, question(3), 10)


class Faults:
    """Raises an error in so many of the next calls."""

    def __init__(self, error: Exception) -> None:
        self.left = 0
        self.met = 0
        self._error = error

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            self.met += 1
            raise self._error


def out_of_memory() -> Faults:
    return Faults(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))


class ShortTorch:
    """Torch, whose named functions meet faults first."""

    def __init__(self, faults: Faults, *names: str) -> None:
        self._faults, self._names = faults, names

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in self._names:
            return found

        def function(*args: Any, **kwargs: Any) -> Any:
            self._faults()
            return found(*args, **kwargs)

        return function


def before_runs(engine: TransformersEngine, check: Callable[[Part], None]) -> None:
    """Has a check look at every part before its pass."""
    run = engine.way.run

    def checked(part: Part) -> Result:
        check(part)
        return run(part)

    engine.way.run = checked  # type: ignore[method-assign]


def choice_of(engine: TransformersEngine, row: Any) -> Choice:
    choice = engine.scheduler.run_of(row).owner
    assert isinstance(choice, Choice)
    return choice


# ---- passes of jobs with several choices


@pytest.mark.parametrize("index", [0, 1])
def test_a_pass_that_fails_for_one_choice_ends_its_job_and_the_engine_goes_on(
    drive: Drive, engine: TransformersEngine, either: Loaded, index: int
) -> None:
    broken: list[str] = []

    def check(part: Part) -> None:
        for choice in (choice_of(engine, row) for row in part.rows):
            if choice.answers.ticket in broken and choice.index == index:
                raise RuntimeError("simulated: a broken kernel")

    driver = drive(engine)
    before_runs(engine, check)
    driver.submit(job("several", question(2), max_tokens=300, n=2, temperature=1.0), job("b", "hi", max_tokens=60))
    driver.wait_tokens("several", 6)
    driver.wait_tokens("b", 3)
    broken.append("several")
    several, b = driver.wait("several", "b")
    assert isinstance(error_of(several), JobFailedError)
    if either.model.config.model_type == "jamba":  # a failed pass spoils the states of all that decode
        assert isinstance(error_of(b), JobFailedError)
    else:
        assert b.ids == expected(either, "hi", 60)
    assert_serves(driver, either)


@pytest.mark.parametrize("times", [1, 3, ALWAYS])
def test_passes_that_fail_so_often_leave_an_engine_that_serves(
    drive: Drive, engine: TransformersEngine, either: Loaded, times: int
) -> None:
    faults = Faults(RuntimeError("simulated: a broken kernel"))
    driver = drive(engine)
    before_runs(engine, lambda part: faults())
    driver.submit(
        job("several", question(2), max_tokens=40, n=2, temperature=1.0),
        job("more", question(4), max_tokens=40, n=3, temperature=1.0),
        job("b", "hi", max_tokens=40),
    )
    for name in ("several", "more", "b"):
        driver.wait_tokens(name, 6)
    faults.left = times
    for answer in driver.wait("several", "more", "b"):
        assert answer.ended is not None
        assert answer.ended.error is None or isinstance(answer.ended.error, JobFailedError)
    faults.left = 0
    assert_serves(driver, either)


# ---- memory that is not there


@pytest.mark.parametrize("times", [1, 2, 5])
def test_kv_memory_that_is_short_for_a_while_fails_nobody(
    drive: Drive, llama: Loaded, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    faults = out_of_memory()
    driver = drive(TransformersEngine("m", 16, llama))
    monkeypatch.setattr(kv, "torch", ShortTorch(faults, "zeros"))
    driver.submit(job("a", question(1), max_tokens=300))
    driver.wait_tokens("a", 3)
    faults.left = times
    answers = driver.run(*(job(f"j{i}", question(i), max_tokens=20) for i in range(6)))
    [a] = driver.wait("a")
    assert faults.met == times
    assert [answer.ids for answer in answers] == [expected(llama, question(i), 20) for i in range(6)]
    assert a.ids == expected(llama, question(1), 300)


@pytest.mark.parametrize(
    "either", ["llama", "falcon", "jamba"], indirect=True
)  # the fourth way's caches grow in passes
@pytest.mark.parametrize("times", [1, 5])
def test_rows_that_find_no_memory_to_grow_go_on_when_there_is_some(
    drive: Drive, either: Loaded, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    faults = out_of_memory()
    driver = drive(engine)
    monkeypatch.setattr(kv, "torch", ShortTorch(faults, "zeros"))
    jobs = [job(f"j{i}", question(i), max_tokens=80) for i in range(3)]
    driver.submit(*jobs)
    driver.wait_tokens("j2", 3)
    faults.left = times
    answers = driver.wait(*(one.id for one in jobs))
    assert faults.met == times
    assert [answer.ids for answer in answers] == [expected(either, question(i), 80) for i in range(3)]


def test_a_request_for_which_there_is_never_memory_is_to_be_tried_elsewhere(
    drive: Drive, llama: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = out_of_memory()
    driver = drive(TransformersEngine("m", 8, llama))
    monkeypatch.setattr(kv, "torch", ShortTorch(faults, "zeros"))
    faults.left = ALWAYS
    for answer in driver.run(job("a", question(1), max_tokens=30), job("b", question(2), max_tokens=30, n=2)):
        error = error_of(answer)
        assert isinstance(error, RetryableError)
        assert error.code == OUT_OF_MEMORY
    faults.left = 0
    assert_serves(driver, llama)


@pytest.mark.parametrize("times", [1, ALWAYS])
def test_prefixes_that_find_no_memory_are_not_kept_and_nothing_else_happens(
    drive: Drive, llama: Loaded, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    faults = out_of_memory()
    engine = TransformersEngine("m", 8, llama)
    driver = drive(engine)
    monkeypatch.setattr(prefixes, "torch", ShortTorch(faults, "empty", "tensor"))
    text = " ".join(WORDS * 2)
    for i in range(3):
        faults.left = times
        [answer] = driver.run(job(f"j{i}", text, max_tokens=10))
        assert answer.ids == expected(llama, text, 10)
    assert faults.met
    faults.left = 0
    driver.run(job("kept", text, max_tokens=10))
    [again] = driver.run(job("again", text, max_tokens=10))
    assert again.ids == expected(llama, text, 10)


@pytest.mark.parametrize("name", ["cat", "tensor"])
def test_logits_that_find_no_memory_are_computed_again(
    drive: Drive, engine: TransformersEngine, either: Loaded, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    faults = out_of_memory()
    driver = drive(engine)
    monkeypatch.setattr(draws, "torch", ShortTorch(faults, name))
    faults.left = 1
    several, b = driver.run(
        job("several", question(5), max_tokens=12, temperature=1.0, n=3), job("b", "hi", max_tokens=30)
    )
    assert b.ids == expected(either, "hi", 30)
    assert several.finish_reason == "length"
    assert len(several.ids) == 36
    assert_serves(driver, either)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("times", [1, ALWAYS])
def test_passes_and_draws_without_memory_are_tried_again_before_anybody_fails(
    drive: Drive, engine: TransformersEngine, either: Loaded, monkeypatch: pytest.MonkeyPatch, times: int, n: int
) -> None:
    pick = Sampler.pick
    drawing, passing = out_of_memory(), out_of_memory()

    def checked(self: Sampler, logits: torch.Tensor, rows: Sequence[sequence.Sequence]) -> Any:
        picks = pick(self, logits, rows)  # it overwrites the logits
        drawing()
        return picks

    monkeypatch.setattr(Sampler, "pick", checked)
    driver = drive(engine)
    before_runs(engine, lambda part: passing())
    for faults in (drawing, passing):
        name = "drawing" if faults is drawing else "passing"
        one, other = job(f"{name} a", question(2), max_tokens=40, n=n, temperature=0.5), job(name, "hi", max_tokens=40)
        [whole] = driver.run(one.model_copy(update={"id": f"{name} whole"}))
        driver.submit(one, other)
        driver.wait_tokens(one.id, 3 * n)
        driver.wait_tokens(other.id, 3)
        faults.left = times
        answers = driver.wait(one.id, other.id)
        faults.left = 0
        if times == ALWAYS:
            assert [error_of(answer).code for answer in answers] == [OUT_OF_MEMORY] * 2
        else:
            assert by_choice(answers[0]) == by_choice(whole)
            assert answers[1].ids == expected(either, "hi", 40)
    assert_serves(driver, either)


def by_choice(answer: Answer) -> dict[int, list[int]]:
    ids: dict[int, list[int]] = {}
    for piece in answer.pieces:
        ids.setdefault(piece.choice, []).extend(piece.ids)
    return ids


# ---- draws


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_token_cannot_be_drawn_fails_alone(
    drive: Drive, engine: TransformersEngine, either: Loaded, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    pick = Sampler.pick
    jobs = [job(f"j{i}", question(i), max_tokens=30, temperature=temperature, n=1 + i % 2) for i in range(4)]
    driver = drive(engine)
    undisturbed = [by_choice(answer) for answer in driver.run(*jobs)]

    def checked(self: Sampler, logits: torch.Tensor, rows: Sequence[sequence.Sequence]) -> Any:
        picks = pick(self, logits, rows)  # it overwrites the logits
        if any(row.ticket == "bad" and len(row.ids) == 5 for row in rows):
            raise IndexError("simulated: a mask that does not fit")
        return picks

    monkeypatch.setattr(Sampler, "pick", checked)
    bad, *good = driver.run(job("bad", "hi", max_tokens=30, n=2, temperature=1.0), *jobs)
    error = error_of(bad)
    assert isinstance(error, JobFailedError)
    assert "a mask that does not fit" in error.message
    assert [by_choice(answer) for answer in good] == undisturbed
    assert_serves(driver, either)


def test_a_row_whose_logits_are_no_numbers_fails_alone(
    drive: Drive, engine: TransformersEngine, either: Loaded
) -> None:
    run = engine.way.run

    def spoiled(part: Part) -> Result:
        result = run(part)
        for row, logits in zip(result.rows, result.logits, strict=True):
            choice = choice_of(engine, row)
            if choice.answers.ticket == "bad" and choice.index == 0 and len(choice.sequence.ids) == 5:
                logits.fill_(torch.nan)
        return result

    engine.way.run = spoiled  # type: ignore[method-assign]
    bad, good = drive(engine).run(
        job("bad", question(2), max_tokens=30, temperature=1.0, top_p=0.9, n=2), job("good", "hi", max_tokens=30)
    )
    error = error_of(bad)
    assert isinstance(error, JobFailedError)
    assert error.code == "engine_error"
    assert "not finite" in error.message
    assert good.ids == expected(either, "hi", 30)


def test_draws_of_few_rows_at_a_time_are_the_same(
    drive: Drive, engine: TransformersEngine, either: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick, counts = Sampler.pick, []

    def counted(self: Sampler, logits: torch.Tensor, rows: Sequence[sequence.Sequence]) -> Any:
        counts.append(len(rows))
        assert logits.shape[0] == len(rows)
        assert logits.dtype == torch.float32
        return pick(self, logits, rows)

    monkeypatch.setattr(Sampler, "pick", counted)
    driver = drive(engine)
    jobs = [job(f"j{i}", question(i), max_tokens=8, temperature=i % 2, n=1 + 4 * i) for i in range(3)]
    whole = [by_choice(answer) for answer in driver.run(*jobs)]
    assert max(counts) > 9
    counts.clear()
    monkeypatch.setattr(draws, "NUMBERS", 3 * either.model.config.vocab_size)
    assert [by_choice(answer) for answer in driver.run(*jobs)] == whole
    assert max(counts) == 3


# ---- room that was promised


def test_a_prompt_in_pieces_keeps_the_room_that_it_was_promised(
    drive: Drive, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that decode must not grow into it: it would be too late to find that out when the prompt is in."""
    bloom = loaded(random_model("bloom"), tokenizer)
    monkeypatch.setattr(Pace, "tokens", lambda self, decoding: 4)
    per_column = TransformersEngine("m", 8, bloom, 2**26).way.room.per_column
    text = " ".join(WORDS * 4)
    tokens = len(prompt_ids(tokenizer, text))
    wanted = [expected(bloom, text, 100), expected(bloom, f"{text} again", 20)]
    for columns in range(2 * (tokens + 2), 2 * (tokens + 2) + 240, 60):
        driver = drive(TransformersEngine("m", 8, bloom, per_column * columns))
        driver.submit(job("a", text, max_tokens=100))
        driver.wait_tokens("a", 1)
        driver.submit(job("b", f"{text} again", max_tokens=20))
        assert [answer.ids for answer in driver.wait("a", "b")] == wanted


def test_a_wait_for_memory_that_others_hold_is_no_stall(llama: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends when another row does, and is not to cost the job one of its retries."""
    now = 0.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))
    per_column = TransformersEngine("m", 8, llama).way.room.per_column
    engine = TransformersEngine("m", 8, llama, per_column * 200 * 4 // 3)
    guard = watch.Watch(engine, stall_s=10.0)
    active = {
        name: Active(Claim(name, "1", 1, 0, "hi", b""), cast(Line, None), 0, 0.0, 0.0, 0.0, 0) for name in ("a", "b")
    }
    tickets = {one.ticket: one for one in active.values()}
    for name, one in active.items():
        engine.admit(Request(job(name, "hi", max_tokens=150, ignore_eos=True), one.ticket))
    left, waited = set(tickets), 0
    while left:
        outputs = engine.step()
        engine.steps += 1
        engine.alive()
        for output in outputs:
            assert output.ended is None or output.ended.error is None
            guard.given(tickets[output.ticket])
            tickets[output.ticket].emitted = True
            if output.ended is not None:
                left.remove(output.ticket)
        waited += len(left) - len(outputs) > 0 and bool(outputs)
        now += 0.5
        guard.tick()
        assert not [ticket for ticket in left if guard.stalled(tickets[ticket])]
    assert engine.scheduler.preempted
    assert waited > 25, "longer than a stall may be"


def test_a_job_that_does_not_wait_for_memory_stalls_all_the_same(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))
    engine = TransformersEngine("m", 8, llama)
    guard = watch.Watch(engine, stall_s=10.0)
    one = Active(Claim("a", "1", 1, 0, "hi", b""), cast(Line, None), 0, 0.0, 0.0, 0.0, 0, emitted=True)
    for _ in range(22):
        engine.steps += 1
        now += 0.5
        guard.tick()
    assert guard.stalled(one)


def test_steps_that_run_out_of_memory_again_and_again_end_their_jobs(drive: Drive, engine: TransformersEngine) -> None:
    """Else they would be computed from the start for every single token."""
    failing: list[int] = []

    def check(part: Part) -> None:
        if part.decode and failing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    driver = drive(engine)
    before_runs(engine, check)
    driver.submit(job("a", question(1), max_tokens=200), job("b", question(2), max_tokens=200))
    driver.wait_tokens("b", 3)
    failing.append(1)
    for answer in driver.wait("a", "b"):
        assert error_of(answer).code == OUT_OF_MEMORY
        assert len(answer.ids) < 20
