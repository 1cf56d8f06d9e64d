"""Bias and penalties as sparse edits: only the tokens that a row names or has seen are touched, never all logits."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fastchat_q.jobs import Sampling

from ..tensors import to_device

ROOM = 64


class Edits:
    """One row's changes to its logits, kept up as tokens come: an entry for each token that changes at all.

    An edited logit is ``penalised(logit + plus) - minus``, where penalised divides by ``scale`` what is positive and
    multiplies by it what is not (the repetition penalty of Keskar et al., https://arxiv.org/abs/1909.05858). ``minus``
    is OpenAI's ``count * frequency_penalty + (count > 0) * presence_penalty`` over the tokens that were generated;
    the repetition penalty counts those of the prompt too.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._repetition = sampling.repetition_penalty
        self._frequency = sampling.frequency_penalty
        self._presence = sampling.presence_penalty
        seen = prompt if self._repetition != 1.0 else ()
        tokens = list(dict.fromkeys([*sampling.logit_bias, *seen]))
        self._at = {token: entry for entry, token in enumerate(tokens)}
        """The entry of a token."""
        self._counts = [0] * len(tokens)
        self._ids = np.zeros(len(tokens) + ROOM, np.int64)
        self._ids[: len(tokens)] = tokens
        self._factors = np.zeros((3, len(tokens) + ROOM), np.float32)  # plus, scale, minus
        self._factors[0, : len(sampling.logit_bias)] = [*sampling.logit_bias.values()]
        self._factors[1] = 1.0
        if seen:
            self._factors[1, [self._at[token] for token in set(seen)]] = self._repetition

    @classmethod
    def of(cls, sampling: Sampling, prompt: Sequence[int]) -> "Edits | None":
        """None: this row has no bias and no penalties."""
        penalties = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
        return cls(sampling, prompt) if penalties or sampling.logit_bias else None

    def add(self, token: int) -> None:
        """Counts a generated token."""
        if not self._frequency and not self._presence and self._repetition == 1.0:
            return
        entry = self._entry(token)
        self._counts[entry] += 1
        self._factors[1, entry] = self._repetition
        self._factors[2, entry] = self._counts[entry] * self._frequency + self._presence

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens that change, each once."""
        return self._ids[: len(self._counts)]

    @property
    def factors(self) -> NDArray[np.float32]:
        """(3, tokens): plus, scale and minus."""
        return self._factors[:, : len(self._counts)]

    def _entry(self, token: int) -> int:
        entry = self._at.get(token)
        if entry is None:
            entry = self._at[token] = len(self._counts)
            if entry == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._factors = np.concatenate([self._factors, np.zeros_like(self._factors)], axis=1)
            self._ids[entry] = token
            self._factors[:, entry] = 0.0, 1.0, 0.0
            self._counts.append(0)
        return entry


def edit(logits: torch.Tensor, at: Sequence[int], edits: Sequence[Edits]) -> None:
    """Changes the rows ``at`` of logits (rows, vocabulary) in place, all in one gather and one scatter."""
    sizes = [len(one.ids) for one in edits]
    where = np.stack([np.repeat(np.asarray(at), sizes), np.concatenate([one.ids for one in edits])])
    factors = np.concatenate([one.factors for one in edits], axis=1)
    rows, tokens = to_device(torch.from_numpy(where), logits.device)  # (entries) each
    plus, scale, minus = to_device(torch.from_numpy(factors), logits.device)
    values = logits[rows, tokens] + plus
    logits[rows, tokens] = torch.where(values > 0, values / scale, values * scale) - minus
