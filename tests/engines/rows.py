"""Sequences without an engine: what the tests of sampling hand to the sampler."""

from collections.abc import Iterable
from typing import Any

import torch
from fastchat_q.workers.engines.batching.sampling import Sampler
from fastchat_q.workers.engines.processing.rules import ModelRules
from fastchat_q.workers.engines.processing.sequence import Language, Sequence
from fastchat_q.workers.engines.processing.structured import Guides
from fastchat_q.workers.engines.processing.text import TokenTexts
from fastchat_q.workers.parsing import Parser
from transformers import PreTrainedTokenizerBase

from fastchat_q.jobs import Sampling


class NamedTokens:
    """A vocabulary in which token 7 is spelt t7, of any size."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        return f"t{ids} "

    def decode(self, ids: list[int]) -> str:
        return "".join(map(self.convert_ids_to_tokens, ids))


class NoGuides(Guides):
    """For rows without a guide."""

    def __init__(self) -> None:
        """Knows no tokenizer."""


def language(vocabulary: int, eos_ids: Iterable[int] = (), rules: ModelRules | None = None) -> Language:
    return Language(vocabulary, frozenset(eos_ids), NamedTokens().decode, NoGuides(), rules)


def language_of(tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int] = (2,)) -> Language:
    """That of a real tokenizer, whose guides work."""

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    eos = frozenset(eos_ids)
    return Language(len(tokenizer), eos, decode, Guides(tokenizer, len(tokenizer), eos))


def row(
    speaks: Language,
    *,
    ids: Iterable[int] = (),
    prompt: Iterable[int] = (),
    choice: int = 0,
    limit: int = 10**6,
    parser: Parser | None = None,
    **parameters: Any,
) -> Sequence:
    """A row with these tokens behind it."""
    sequence = Sequence("row", list(prompt), limit, Sampling(**parameters), speaks, choice, parser)
    for token in ids:
        sequence.ids.append(token)
        if sequence.edits is not None:
            sequence.edits.add(token)
    return sequence


def pick(logits: torch.Tensor, rows: list[Sequence]) -> list[int]:
    """The next tokens; the logits stay as they are."""
    return [picked.token for picked in Sampler(TokenTexts(NamedTokens())).pick(logits.clone(), rows)]
