"""What the tests of the transformers engine share: questions, what `generate` says to them, a watch on the model."""

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TALK = "what is the capital of France and how many legs does a spider have tell me a story about the sea "
WORDS = TALK.split()


def question(number: int) -> str:
    """Texts of 1 to 20 words in no order of length."""
    return " ".join(WORDS[: 1 + number * 7 % 20])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = encoded["input_ids"]  # type: ignore[index, call-overload]
    assert isinstance(ids, list)
    return ids


def generated(model: PreTrainedModel, ids: list[int], max_tokens: int, eos_id: int | None = None) -> tuple[int, ...]:
    """What `generate` makes of a prompt, greedily."""
    output = model.generate(  # type: ignore[operator]
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=eos_id,
        pad_token_id=0,
    )
    start = 1 if model.config.is_encoder_decoder else len(ids)
    return tuple(output[0, start:].tolist())


@dataclass
class Forwards:
    """What the model's forward pass was given, call by call; a call can be made to fail."""

    calls: list[list[int]] = field(default_factory=list)
    """All tokens of each call, of whichever rows."""
    failing: int = 0
    """So many of the next calls with a poisoned token raise."""
    poison: int | None = None
    """None: all tokens are."""

    def __call__(self, ids: torch.Tensor) -> None:
        tokens = ids.flatten().tolist()
        self.calls.append(tokens)
        if self.failing and (self.poison is None or self.poison in tokens):
            self.failing -= 1
            raise RuntimeError("simulated: a broken kernel")

    @property
    def tokens(self) -> list[int]:
        """How many tokens each call had."""
        return [len(call) for call in self.calls]


def watch(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, name: str = "input_ids") -> Forwards:
    """Watches what engines do with a model, by the argument of that name."""
    forwards, original = Forwards(), model.forward

    @functools.wraps(original)  # engines read its signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        forwards(kwargs[name])
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    return forwards
