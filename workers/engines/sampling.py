"""Choosing tokens from logits: all rows in one go, each draw a function of (seed, position) and nothing else."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CANDIDATES = 256
"""Nucleus sampling looks at this many tokens first; only a row whose nucleus is larger pays for a full sort."""
COLDEST = 1e-5
"""Below this temperature logits would overflow float32, and nothing but the most likely token is left to draw."""
SMALLEST_TOP_P = 1e-9
"""Keeps the most likely token in the nucleus: as a float32, a smaller top_p may be 0."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's parameters for one step; ``position`` is the index of the token among those generated."""

    temperature: float
    top_p: float
    seed: int
    position: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments, so neighbours and restarts cannot change it.

    It has 24 bits, all that a float32 holds: more would round up to 1 there, and draw a token of probability 0.
    """
    digest = hashlib.blake2b(
        position.to_bytes(8, "big"), digest_size=8, key=seed.to_bytes(8, "big", signed=True)
    ).digest()
    return (int.from_bytes(digest, "big") >> 40) * 2.0**-24


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Token ids for logits (rows, vocabulary) float32; temperature 0 is greedy.

    Which way a row goes hangs on that row alone: the ways order tokens differently, so a neighbour would change a draw.
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    hot = [i for i, draw in enumerate(draws) if draw.temperature >= COLDEST]
    whole = [i for i in hot if draws[i].top_p >= 1]
    nucleus = [i for i in hot if draws[i].top_p < 1]
    for rows, way in ((whole, _sample_whole), (nucleus, _sample_nucleus)):
        if rows:
            for i, token in zip(rows, way(logits[rows], [draws[i] for i in rows]).tolist(), strict=True):
                tokens[i] = token
    return tokens


def _sample_whole(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Token ids (rows) drawn from all of the distribution."""
    return _invert((logits / _column([d.temperature for d in draws], logits)).softmax(-1), _uniforms(draws, logits))


def _sample_nucleus(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Token ids (rows) drawn from the smallest sets that reach top_p."""
    logits = logits / _column([d.temperature for d in draws], logits)
    top_p, u = _column([max(d.top_p, SMALLEST_TOP_P) for d in draws], logits), _uniforms(draws, logits)
    total = logits.logsumexp(-1, keepdim=True)
    values, order = logits.topk(min(CANDIDATES, logits.shape[-1]), -1)
    probabilities = (values - total).exp()  # (rows, candidates), descending
    tokens = order.gather(-1, _invert(_cut(probabilities, top_p), u)[:, None]).squeeze(-1)
    if order.shape[-1] < logits.shape[-1]:
        wide = (probabilities.sum(-1, keepdim=True) < top_p).squeeze(-1).nonzero().squeeze(-1)
        if len(wide):
            values, order = logits[wide].sort(-1, descending=True)
            probabilities = _cut((values - total[wide]).exp(), top_p[wide])
            tokens[wide] = order.gather(-1, _invert(probabilities, u[wide])[:, None]).squeeze(-1)
    return tokens


def _cut(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zeroes all outside of the nucleus, of probabilities (rows, tokens) in descending order."""
    before = probabilities.cumsum(-1) - probabilities
    return probabilities.masked_fill(before >= top_p, 0)


def _invert(probabilities: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: indices (rows) into probabilities (rows, tokens), which need not add up to 1."""
    cumulative = probabilities.cumsum(-1)
    picks = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)  # (rows, 1)
    return picks.clamp_max(probabilities.shape[-1] - 1).squeeze(-1)


def _uniforms(draws: list[Draw], like: torch.Tensor) -> torch.Tensor:
    return _column([uniform(d.seed, d.position) for d in draws], like)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device)[:, None]  # (rows, 1) float32
