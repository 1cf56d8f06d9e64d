"""What the step loop cannot run goes through `generate`, and means the same: sampling, resuming, cancelling."""

from pathlib import Path

import pytest
import torch
from fastchat_q.workers.engines.batching.engine import TransformersEngine, build
from fastchat_q.workers.engines.batching.generate import GenerateEngine
from fastchat_q.workers.engines.loading.model import Loaded
from fastchat_q.workers.main import build_engine
from transformers import PreTrainedTokenizerBase

from fastchat_q.choices import LoadOptions, WorkerOptions
from fastchat_q.errors import ConfigurationError, JobFailedError
from fastchat_q.events import Usage

from .conftest import Drive
from .driving import Driver, job
from .random_models import loaded, random_model, random_t5
from .scenes import generated, prompt_ids, question, watch


@pytest.fixture(scope="module")
def t5(tokenizer: PreTrainedTokenizerBase) -> Loaded:
    return loaded(random_t5(), tokenizer)


@pytest.fixture
def running(drive: Drive, t5: Loaded) -> Driver:
    return drive(build("m", 4, t5))


def test_an_encoder_decoder_answers_as_generate_does_and_says_so(
    running: Driver, t5: Loaded, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert isinstance(running.engine, GenerateEngine)
    assert running.engine.card.batching == "generate"
    answers = running.run(*(job(f"j{i}", question(i), max_tokens=5 + i) for i in range(4)))
    for i, answer in enumerate(answers):
        prompt = prompt_ids(tokenizer, question(i))
        assert answer.ids == generated(t5.model, prompt, 5 + i)
        assert answer.usage == Usage(len(prompt), 5 + i)
        assert answer.finish_reason == "length"
        assert len(answer.outputs) == 5 + i, "token by token"
    assert len({token for answer in answers for token in answer.ids}) > 5


def test_a_decoder_goes_through_generate_with_the_tokens_of_the_step_loop(
    drive: Drive, tokenizer: PreTrainedTokenizerBase
) -> None:
    llama = loaded(random_model("llama"), tokenizer)
    seeded = job("a", question(3), max_tokens=20, temperature=1.0, top_p=0.9, seed=4)
    [one] = drive(GenerateEngine("m", 4, llama)).run(seeded)
    [other] = drive(TransformersEngine("m", 4, llama)).run(seeded)
    assert one.ids == other.ids
    assert one.text == other.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_resumed_answer_goes_on_exactly_where_it_was(running: Driver, temperature: float) -> None:
    one = job("j", question(4), max_tokens=12, temperature=temperature, seed=11)
    [whole] = running.run(one)
    for cut in (1, 6, 12):
        running.resume(one.model_copy(update={"id": f"j{cut}"}), whole.ids[:cut])
        [rest] = running.wait(f"j{cut}")
        assert rest.ids == whole.ids[cut:]
        assert rest.ended == whole.ended


def test_cancelling_ends_the_running_answer_and_the_next_is_served(
    running: Driver, t5: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = watch(t5.model, monkeypatch, name="decoder_input_ids")
    running.submit(job("gone", max_tokens=5000), job("waiting", max_tokens=5000), job("next", max_tokens=3))
    running.wait_tokens("gone", 3)
    running.engine.cancel("waiting")
    running.engine.cancel("gone")
    [answer] = running.wait("next")
    assert len(answer.ids) == 3
    assert len(forwards.calls) < 1000
    assert running.answer("gone").ended is None
    assert running.answer("waiting").outputs == []


def test_stopping_the_engine_does_not_wait_for_a_long_answer(drive: Drive, t5: Loaded) -> None:
    driver = drive(build("m", 4, t5))
    driver.submit(job("long", max_tokens=10**6))
    driver.wait_tokens("long", 2)
    driver.engine.stop()
    assert driver.engine.failure is None
    assert not driver.engine._thread.is_alive()


def test_a_failing_pass_fails_that_request_alone(running: Driver, t5: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = watch(t5.model, monkeypatch, name="decoder_input_ids")
    forwards.failing = 1
    failed, fine = running.run(job("a", max_tokens=5), job("b", max_tokens=5))
    assert failed.ended is not None
    assert isinstance(failed.ended.error, JobFailedError)
    assert len(fine.ids) == 5


def test_a_request_whose_logits_are_no_numbers_fails_alone(running: Driver, t5: Loaded) -> None:
    passes = iter(range(10**6))
    hook = t5.model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: logits * torch.nan if next(passes) == 2 else logits
    )
    try:
        failed, fine = running.run(job("a", max_tokens=5, temperature=1.0, top_p=0.9), job("b", max_tokens=5))
    finally:
        hook.remove()
    assert failed.ended is not None
    assert isinstance(failed.ended.error, JobFailedError)
    assert "not finite" in failed.ended.error.message
    assert (len(failed.ids), len(fine.ids)) == (2, 5)


def test_choices_differ_and_end_together(running: Driver) -> None:
    [answer] = running.run(job("a", max_tokens=6, temperature=2.0, n=3))
    ids = [tuple(i for piece in answer.pieces if piece.choice == choice for i in piece.ids) for choice in range(3)]
    assert [len(one) for one in ids] == [6, 6, 6]
    assert len(set(ids)) == 3
    assert [piece.finish for piece in answer.pieces if piece.finish] == ["length"] * 3


def test_memory_for_keys_and_values_is_refused_where_nobody_counts_them(tmp_path: Path, t5: Loaded) -> None:
    t5.model.save_pretrained(tmp_path)
    t5.tokenizer.save_pretrained(tmp_path)
    options = WorkerOptions(str(tmp_path), device="cpu", threads=1, load=LoadOptions(kv_memory="1GiB"))
    with pytest.raises(ConfigurationError, match=r"--kv-memory is not for .* goes through generate"):
        build_engine(options)
