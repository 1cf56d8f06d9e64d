"""What a model's generation_config forbids or forces is followed as `generate` follows it, by every request alone."""

from typing import Any

import pytest
import torch
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.processing.rules import ModelRules
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conftest import Drive
from .driving import job
from .random_models import loaded, random_model

COUNT = 24


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = encoded["input_ids"]  # type: ignore[index, call-overload]
    assert isinstance(ids, list)
    return ids


def generated(model: PreTrainedModel, ids: list[int]) -> tuple[int, ...]:
    """What `generate` says, greedily."""
    mask = torch.ones(1, len(ids), dtype=torch.long)
    output = model.generate(  # type: ignore[operator]
        torch.tensor([ids]),
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=COUNT,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(output[0, len(ids) :].tolist())


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
def test_greedy_answers_are_those_of_generate(drive: Drive, tokenizer: PreTrainedTokenizerBase, entry: str) -> None:
    model = random_model("llama")
    texts = ["hi", "what is the capital of France"]
    plain = [generated(model, prompt_ids(tokenizer, text)) for text in texts]
    values: dict[str, Any] = {
        "no_repeat_ngram_size": 1,
        "bad_words_ids": [[plain[0][0]], [plain[1][2], plain[1][3]]],
        "suppress_tokens": [plain[0][1], plain[1][0]],
        "begin_suppress_tokens": [plain[0][0], plain[1][0]],
        "forced_eos_token_id": 77,
        "sequence_bias": {(plain[0][1],): -50.0, (plain[1][0],): -50.0},
    }
    setattr(model.generation_config, entry, values[entry])
    ruled = [generated(model, prompt_ids(tokenizer, text)) for text in texts]
    assert ruled != plain, "the rule changes something"
    answers = drive(TransformersEngine("m", 4, loaded(model, tokenizer))).run(
        *(job(text, text, max_tokens=COUNT) for text in texts)
    )
    assert [answer.ids for answer in answers] == ruled


def test_most_models_have_no_rules() -> None:
    assert ModelRules.of(random_model("llama")) is None
