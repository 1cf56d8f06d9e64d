"""What a model's own generation_config forbids or forces, in any request: transformers' processors, row by row.

Entries that a request has a parameter for are no rules: loading warns of those that are set.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process as processors


def decoder_start(model: PreTrainedModel) -> int | None:
    """The token before the first of an encoder-decoder's answer; None: not one."""
    if not model.config.is_encoder_decoder:
        return None
    text = model.config.get_text_config(decoder=True)
    for config in (model.generation_config, model.config, text):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return int(start)
    return int(text.bos_token_id)


class Rules:
    """One row's processors, and the tokens that they see before the answer's."""

    def __init__(self, chain: LogitsProcessorList, before: list[int], device: torch.device) -> None:
        self.chain, self._before, self._device = chain, before, device

    def apply(self, logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """Logits (1, vocabulary) for the token behind an answer's ids -> what the model's config makes of them."""
        return self.chain(torch.tensor([self._before + ids], device=self._device), logits)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class ModelRules:
    """What all rows of a model have in common."""

    config: Any
    device: torch.device
    start: int | None = None
    """Where a decoder begins that has an encoder: what its prompt says is no part of its answer."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelRules | None":
        """None: its generation_config has none of them, as is usual."""
        config = getattr(model, "generation_config", None)  # a model of an adapter need not have one
        if config is None:
            return None
        rules = cls(config, model.device, decoder_start(model))
        return rules if rules.row([], 1).chain else None

    def row(self, prompt: list[int], limit: int) -> Rules:
        """The rules for a row that may generate ``limit`` tokens, in the order of ``generate``."""
        before = prompt if self.start is None else [self.start]
        config, device, chain = self.config, str(self.device), LogitsProcessorList()
        if config.sequence_bias:
            chain.append(processors.SequenceBiasLogitsProcessor(config.sequence_bias))
        if config.no_repeat_ngram_size:
            chain.append(processors.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
        if config.bad_words_ids:
            chain.append(processors.NoBadWordsLogitsProcessor(config.bad_words_ids, config.eos_token_id))
        if (forced := config.forced_bos_token_id) is not None:
            chain.append(processors.ForcedBOSTokenLogitsProcessor(forced))
        if config.forced_eos_token_id is not None:
            length = len(before) + limit
            chain.append(processors.ForcedEOSTokenLogitsProcessor(length, config.forced_eos_token_id, device))
        if config.suppress_tokens:
            chain.append(processors.SuppressTokensLogitsProcessor(config.suppress_tokens, device))
        if config.begin_suppress_tokens:
            begin = len(before) + (len(before) == 1 and forced is not None)
            chain.append(processors.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device))
        return Rules(chain, before, self.device)
