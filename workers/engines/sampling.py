"""Choosing tokens from logits: all rows in one go, each draw a function of (seed, position) and nothing else."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CANDIDATES = 256
"""Nucleus sampling looks at this many tokens first; only a row whose nucleus is larger pays for a full sort."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's parameters for one step; ``position`` is the index of the token among those generated."""

    temperature: float
    top_p: float
    seed: int
    position: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments, so neighbours and restarts cannot change it."""
    digest = hashlib.blake2b(
        position.to_bytes(8, "big"), digest_size=8, key=seed.to_bytes(8, "big", signed=True)
    ).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Token ids for logits (rows, vocabulary) float32; temperature 0 is greedy."""
    tokens: list[int] = logits.argmax(-1).tolist()
    hot = [i for i, draw in enumerate(draws) if draw.temperature > 0]
    if hot:
        for i, token in zip(hot, _sample_hot(logits[hot], [draws[i] for i in hot]), strict=True):
            tokens[i] = token
    return tokens


def _sample_hot(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    """Inverse transform sampling over the (truncated) distribution of each row."""
    device = logits.device
    temperature = torch.tensor([d.temperature for d in draws], device=device)[:, None]  # (rows, 1)
    u = torch.tensor([uniform(d.seed, d.position) for d in draws], device=device)[:, None]  # (rows, 1)
    logits = logits / temperature
    if all(d.top_p >= 1 for d in draws):
        probabilities, order = logits.softmax(-1), None
    else:
        top_p = torch.tensor([d.top_p for d in draws], device=device)[:, None]
        probabilities, order = _nucleus(logits, top_p)
    cumulative = probabilities.cumsum(-1)
    picks = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp_max(probabilities.shape[-1] - 1)
    if order is not None:
        picks = order.gather(-1, picks)
    chosen: list[int] = picks.squeeze(-1).tolist()
    return chosen


def _nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in descending order, zero outside of the smallest set that reaches top_p, and their token ids."""
    size = min(CANDIDATES, logits.shape[-1])
    values, order = logits.topk(size, -1)
    probabilities = (values - logits.logsumexp(-1, keepdim=True)).exp()
    if size < logits.shape[-1] and bool((probabilities.sum(-1, keepdim=True) < top_p).any()):
        values, order = logits.sort(-1, descending=True)
        probabilities = (values - logits.logsumexp(-1, keepdim=True)).exp()
    before = probabilities.cumsum(-1) - probabilities
    return probabilities.masked_fill(before >= top_p, 0), order
