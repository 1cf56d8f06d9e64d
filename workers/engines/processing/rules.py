"""What a model's own generation_config forbids or forces, in any request: transformers' processors, row by row.

Entries that a request has a parameter for are no rules: loading warns of those that are set.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process as processors

APPLIED = frozenset(
    {
        "sequence_bias",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_eos_token_id",
    }
)
"""The entries of a generation_config that are followed here."""


class Rules:
    """One row's processors."""

    def __init__(self, chain: LogitsProcessorList, device: torch.device) -> None:
        self._chain, self._device = chain, device

    def apply(self, logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """Logits (1, vocabulary) for the token behind prompt and answer -> what the model's config makes of them."""
        return self._chain(torch.tensor([ids], device=self._device), logits)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class ModelRules:
    """What all rows of a model have in common."""

    config: Any
    device: torch.device

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelRules | None":
        """None: its generation_config has none of them, as is usual."""
        config = getattr(model, "generation_config", None)  # a model of an adapter need not have one
        has_any = config is not None and any(getattr(config, name, None) for name in APPLIED)
        return cls(config, model.device) if has_any else None

    def row(self, prompt_tokens: int, limit: int) -> Rules:
        """The rules for a row that may generate ``limit`` tokens, in the order of ``generate``."""
        config, device, chain = self.config, str(self.device), LogitsProcessorList()
        if config.sequence_bias:
            chain.append(processors.SequenceBiasLogitsProcessor(config.sequence_bias))
        if config.no_repeat_ngram_size:
            chain.append(processors.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
        if config.bad_words_ids:
            chain.append(processors.NoBadWordsLogitsProcessor(config.bad_words_ids, config.eos_token_id))
        if config.forced_eos_token_id:
            length = prompt_tokens + limit
            chain.append(processors.ForcedEOSTokenLogitsProcessor(length, config.forced_eos_token_id, device))
        if config.suppress_tokens:
            chain.append(processors.SuppressTokensLogitsProcessor(config.suppress_tokens, device))
        if config.begin_suppress_tokens:
            begin = config.begin_suppress_tokens
            chain.append(processors.SuppressTokensAtBeginLogitsProcessor(begin, prompt_tokens, device))
        return Rules(chain, self.device)
