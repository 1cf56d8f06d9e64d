"""Completions and tokens through the vLLM engine, with a real vLLM: `make test-vllm`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from fastchat_q.events import Usage
from fastchat_q.jobs import Job

from .engines.driving import Driver
from .engines.test_completions import completion, echoed, of_choice, reference
from .vllm_driving import EAGER, OPTIONS, SLOW, asks, llama, needs_vllm, resumed, running

pytestmark = SLOW
TEXTS = ("word1 word2 word3 word4", "word7 word8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama of the benchmarks."""
    return llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Any, Any]:
    """The same model as transformers has it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Driver]:
    """One engine for all tests."""
    with running(replace(OPTIONS, model=str(folder), engine_arg=EAGER)) as driver:
        yield driver


def ask(job_id: str, *prompts: Any, **fields: Any) -> Job:
    return completion(job_id, *prompts, **fields).model_copy(update={"model": "tiny"})


@needs_vllm
def test_prompts_are_completed_and_told_back_with_a_plain_passs_log_probabilities(
    driver: Driver, plain: tuple[Any, Any]
) -> None:
    import torch

    model, tokenizer = plain
    [answer] = driver.run(ask("j", *TEXTS, echo=True, logprobs=2, max_tokens=8))
    [bare] = driver.run(ask("k", *TEXTS, max_tokens=8))
    for index, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        made = model.generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert of_choice(answer, index) == of_choice(bare, index) == tuple(made[0, len(ids) :].tolist())
        assert echoed(answer, index).text == text
        got = torch.tensor([one.logprob for one in echoed(answer, index).logprobs[1:]])
        torch.testing.assert_close(got, reference(model, ids), atol=1e-3, rtol=1e-3)


@needs_vllm
def test_log_likelihoods_are_had_without_an_answer(driver: Driver, plain: tuple[Any, Any]) -> None:
    ids = tuple(plain[1](TEXTS[0])["input_ids"])
    [answer] = driver.run(ask("j", ids, echo=True, logprobs=1, max_tokens=0))
    assert len(echoed(answer).logprobs) == len(ids)
    assert (answer.ids, answer.finish_reason) == ((), "length")
    assert answer.usage == Usage(len(ids), 0)


@needs_vllm
def test_a_completion_goes_on_where_it_was(driver: Driver) -> None:
    one = ask("j", *TEXTS, echo=True, logprobs=1, max_tokens=12)
    [whole] = driver.run(one)
    prior = whole.pieces[: len(whole.pieces) // 2]
    rest = resumed(driver, one.model_copy(update={"id": "again"}), prior)
    for index in range(2):
        had = tuple(token for piece in prior if piece.choice == index for token in piece.ids)
        assert had + of_choice(rest, index) == of_choice(whole, index)
        assert sum(piece.echo for piece in (*prior, *rest.pieces) if piece.choice == index) == 1


@needs_vllm
def test_tokens_are_told_while_the_engine_is_busy(driver: Driver, plain: tuple[Any, Any]) -> None:
    driver.submit(asks("busy", max_tokens=400))
    job = Job(id="t", model="tiny", kind="tokenize", inputs=(TEXTS[0],))
    [told] = driver.run(job)
    ids = tuple(plain[1](TEXTS[0])["input_ids"])
    assert told.ids == ids
    assert orjson.loads(told.text)["count"] == len(ids)
    assert driver.answer("busy").ended is None
    driver.engine.cancel("busy")
