"""What a model's generation_config forbids or forces is followed as `generate` follows it, by every request alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastchat_q.workers.engines.base import Engine
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.batching.generate import GenerateEngine
from fastchat_q.workers.engines.processing.rules import ModelRules
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conftest import Drive
from .driving import job
from .random_models import loaded, random_model, random_t5
from .scenes import generated, prompt_ids

COUNT = 24
TEXTS = ["hi", "what is the capital of France"]
SERVED: dict[str, tuple[Callable[[], PreTrainedModel], type[Engine]]] = {
    "step loop": (lambda: random_model("llama"), TransformersEngine),
    "generate": (lambda: random_model("llama"), GenerateEngine),
    "encoder-decoder": (random_t5, GenerateEngine),
}


@pytest.fixture(params=SERVED)
def served(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, type[Engine]]:
    make, engine = SERVED[request.param]
    return make(), engine


def said(
    drive: Drive, served: tuple[PreTrainedModel, type[Engine]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    model, engine = served
    driver = drive(engine("m", 4, loaded(model, tokenizer)))  # type: ignore[call-arg, arg-type]
    return [answer.ids for answer in driver.run(*(job(text, text, max_tokens=COUNT) for text in TEXTS))]


@pytest.mark.parametrize(
    "entry",
    [
        "no_repeat_ngram_size",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_eos_token_id",
        "sequence_bias",
    ],
)
def test_greedy_answers_are_those_of_generate(
    drive: Drive, tokenizer: PreTrainedTokenizerBase, served: tuple[PreTrainedModel, type[Engine]], entry: str
) -> None:
    model, _ = served
    plain = [generated(model, prompt_ids(tokenizer, text), COUNT) for text in TEXTS]
    values: dict[str, Any] = {
        "no_repeat_ngram_size": 1,
        "bad_words_ids": [[plain[0][0]], [plain[1][2], plain[1][3]]],
        "suppress_tokens": [plain[0][1], plain[1][0]],
        "begin_suppress_tokens": [plain[0][0], plain[1][0]],
        "forced_eos_token_id": 77,
        "sequence_bias": {(plain[0][1],): -50.0, (plain[1][0],): -50.0},
    }
    setattr(model.generation_config, entry, values[entry])
    ruled = [generated(model, prompt_ids(tokenizer, text), COUNT) for text in TEXTS]
    assert ruled != plain, "the rule changes something"
    assert said(drive, served, tokenizer) == ruled


def test_a_bias_counts_once(
    drive: Drive, tokenizer: PreTrainedTokenizerBase, served: tuple[PreTrainedModel, type[Engine]]
) -> None:
    model, _ = served
    plain = [generated(model, prompt_ids(tokenizer, text), COUNT) for text in TEXTS]
    lead, runner_up = _lead(model, prompt_ids(tokenizer, TEXTS[0]))
    model.generation_config.sequence_bias = {(runner_up,): 0.7 * lead}  # too little for the first place; not if doubled
    answers = said(drive, served, tokenizer)
    assert answers[0][0] == plain[0][0]
    assert answers == [generated(model, prompt_ids(tokenizer, text), COUNT) for text in TEXTS]


@torch.no_grad()
def _lead(model: PreTrainedModel, ids: list[int]) -> tuple[float, int]:
    """By how much the first token of an answer leads, and before which."""
    inputs = {"decoder_input_ids": torch.tensor([[0]])} if model.config.is_encoder_decoder else {}
    best = model(torch.tensor([ids]), **inputs).logits[0, -1].topk(2)
    return float(best.values[0] - best.values[1]), int(best.indices[1])


def test_an_answer_of_an_encoder_decoder_may_begin_with_a_forced_token(
    drive: Drive, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = random_t5()
    plain = generated(model, prompt_ids(tokenizer, TEXTS[0]), COUNT)
    model.generation_config.forced_bos_token_id = 0
    forced = generated(model, prompt_ids(tokenizer, TEXTS[0]), COUNT)
    assert forced[0] == 0 != plain[0]
    model.generation_config.begin_suppress_tokens = [forced[1]]  # of what comes behind the forced token
    ruled = [generated(model, prompt_ids(tokenizer, text), COUNT) for text in TEXTS]
    assert ruled[0][1] != forced[1]
    assert said(drive, (model, GenerateEngine), tokenizer) == ruled


def test_what_a_request_has_a_parameter_for_is_no_rule(
    drive: Drive, tokenizer: PreTrainedTokenizerBase, served: tuple[PreTrainedModel, type[Engine]]
) -> None:
    model, _ = served
    plain = [generated(model, prompt_ids(tokenizer, text), COUNT) for text in TEXTS]
    model.generation_config.repetition_penalty = 5.0
    assert [generated(model, prompt_ids(tokenizer, text), COUNT) for text in TEXTS] != plain
    assert said(drive, served, tokenizer) == plain


def test_most_models_have_no_rules() -> None:
    assert ModelRules.of(random_model("llama")) is None
