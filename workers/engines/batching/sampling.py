"""Choosing tokens from logits: all rows in one go, each draw a function of (seed, choice, position) and nothing else.

The order is vLLM's (docstring of ``vllm/v1/sample/sampler.py``; its model runner applies the mask of a structured
output before): guide mask, minimum length, logit_bias, penalties of repetition, frequency and presence, then
temperature, min_p, top_k, top_p. ``generate`` has the same (``GenerationMixin._get_logits_processor``: sequence_bias,
repetition penalty, temperature, top_k, top_p, min_p) but for min_p, which comes last there: in both, a token that stays
is among the top_k and not below min_p; here top_p is a share of these alone.

Tokens of equal logits stay or go together, and draws are made in the order of token ids: what a sort makes of ties,
which differs between devices and batch sizes, changes nothing.
"""

import hashlib
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fastchat_q.events import Alternative, TokenLogprob
from fastchat_q.jobs import MAX_TOP_LOGPROBS, Sampling

from ..processing.penalties import edit
from ..processing.sequence import NO_NUMBER, Picked, Sequence
from ..processing.structured import mask
from ..processing.text import TokenTexts
from ..tensors import to_device

CANDIDATES = 128
"""top_k, top_p and min_p look at this many tokens first; only a row that keeps more pays for a longer look."""
MORE_CANDIDATES = 4096
"""The second look; beyond it all tokens are sorted, which takes ten times as long for a large vocabulary."""
BLOCK = 256
"""A draw from many tokens chooses a block of them, then one of the block: one pass instead of a running sum."""
COLDEST = 1e-5
"""Below this temperature logits would overflow float32, and nothing but the most likely token is left to draw."""
SMALLEST_TOP_P = 1e-9
"""Keeps the most likely token in the nucleus: as a float32, a smaller top_p may be 0."""
ALL = 2.0
"""A top_p that no sum of probabilities reaches, however it is rounded."""
LOWEST = float(np.finfo(np.float32).min)
"""Above the -inf of tokens that are ruled out."""
LARGEST = 1 - 2.0**-24
"""The largest float32 below 1."""
IMPOSSIBLE = -9999.0
"""OpenAI's logprob for what the model rules out: JSON has no infinity."""

GREEDY, WHOLE, CUT = range(3)
"""The ways to a token: the likeliest, a draw from all, a draw from what top_k, top_p and min_p leave."""
WIDER = -1
"""Stands for the token of a row that may keep more than was looked at."""
TEMPERATURE, UNIFORM, TOP_K, TOP_P, MIN_P = range(5)
"""Columns of the numbers (rows, 5) float32 that a draw hangs on."""


def way_of(sampling: Sampling) -> int:
    """Which way a row goes hangs on its parameters alone: the ways round differently, so a neighbour would show."""
    if sampling.temperature < COLDEST:
        return GREEDY
    return CUT if sampling.top_p < 1 or sampling.top_k or sampling.min_p else WHOLE


def uniform(seed: int, position: int, choice: int = 0) -> float:
    """A number in [0, 1) that is a pure function of its arguments, so neighbours and restarts cannot change it.

    It has 24 bits, all that a float32 holds: more would round up to 1 there, and draw a token of probability 0.
    """
    key, salt = seed.to_bytes(8, "big", signed=True), choice.to_bytes(4, "big")
    digest = hashlib.blake2b(position.to_bytes(8, "big"), digest_size=8, key=key, salt=salt).digest()
    return (int.from_bytes(digest, "big") >> 40) * 2.0**-24


class Sampler:
    """Picks the next tokens of any mix of rows, all of one model.

    The host waits for the device once, unless a row keeps more than `CANDIDATES` tokens after top_k, top_p or min_p:
    that one is drawn again, from more of them.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def pick(self, logits: torch.Tensor, rows: Rows[Sequence]) -> list[Picked]:
        """The next token of each row, from logits (rows, vocabulary) float32, which it may overwrite.

        NO_NUMBER is that of a row whose highest logit is not finite, as it is not where one of them is NaN.
        """
        asking = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
        raw = _select(logits, asking).log_softmax(-1) if asking else None  # before anything is overwritten
        _edit(logits, rows)
        drawn = _draw(logits, rows)  # (rows) int32
        if raw is None:
            return [Picked(token) for token in _settle(drawn.tolist(), logits, rows)]
        top, top_ids = raw.topk(min(MAX_TOP_LOGPROBS, raw.shape[-1]), -1)  # always as many: ties fall the same way
        chosen = raw.gather(-1, _select(drawn, asking).long().clamp_min(0)[:, None])
        values = torch.cat([chosen, top], -1).view(torch.int32)
        packed = torch.cat([drawn, values.flatten(), top_ids.int().flatten()]).cpu().numpy()  # one transfer for all
        tokens, found, ids = np.split(packed, [len(rows), len(rows) + values.numel()])
        found, ids = found.view(np.float32).reshape(values.shape), ids.reshape(top_ids.shape)
        settled = _settle(tokens.tolist(), logits, rows)
        picks = [Picked(token) for token in settled]
        for j, i in enumerate(asking):
            if settled[i] == NO_NUMBER:
                continue
            logprob = found[j, 0] if tokens[i] >= 0 else raw[j, settled[i]].item()
            picks[i] = self._with_logprobs(settled[i], logprob, ids[j], found[j, 1:], rows[i].sampling.logprobs or 0)
        return picks

    def _with_logprobs(self, token: int, logprob: float, ids: NDArray[Any], values: NDArray[Any], count: int) -> Picked:
        pairs = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
        top = tuple([Alternative(one, self._texts[one], max(value, IMPOSSIBLE)) for one, value in pairs])
        return Picked(token, TokenLogprob(token, self._texts[token], max(float(logprob), IMPOSSIBLE), top))


def score(logits: torch.Tensor, tokens: Rows[int], count: int, texts: TokenTexts) -> list[TokenLogprob]:
    """What a model thinks of tokens that are given, with the likeliest others.

    Args:
        logits: (tokens, vocabulary), those that each of the tokens would be drawn from.
    """
    found: list[TokenLogprob] = []
    for first in range(0, len(tokens), BLOCK):  # a block at a time: there are two copies of it in float32
        some = tokens[first : first + BLOCK]
        raw = logits[first : first + BLOCK].float().log_softmax(-1)
        top, top_ids = raw.topk(min(MAX_TOP_LOGPROBS, raw.shape[-1]), -1)
        chosen = raw.gather(-1, to_device(torch.tensor(some), raw.device)[:, None])[:, 0]
        for token, logprob, values, ids in zip(some, chosen.tolist(), top.tolist(), top_ids.tolist(), strict=True):
            others = zip(ids[:count], values[:count], strict=True)
            named = tuple([Alternative(one, texts[one], max(value, IMPOSSIBLE)) for one, value in others])
            found.append(TokenLogprob(token, texts[token], max(logprob, IMPOSSIBLE), named))
    return found


def _edit(logits: torch.Tensor, rows: Rows[Sequence]) -> None:
    """All that changes logits before temperature, in place."""
    edited = [i for i, row in enumerate(rows) if row.edited]
    if not edited:
        return
    _guide(logits, rows, [i for i in edited if rows[i].guide is not None])
    forbidden = [(i, token) for i in edited if rows[i].guide is None for token in rows[i].forbidden]
    if forbidden:
        at, tokens = to_device(torch.tensor(forbidden), logits.device).T
        logits[at, tokens] = -torch.inf
    changing = [(i, edits) for i in edited if (edits := rows[i].edits) is not None]
    if changing:
        edit(logits, [i for i, _ in changing], [edits for _, edits in changing])
    for i in edited:
        if (rules := rows[i].rules) is not None:
            logits[i] = rules.apply(logits[i : i + 1], rows[i].ids)[0]


def _guide(logits: torch.Tensor, rows: Rows[Sequence], at: Rows[int]) -> None:
    """Masks the guided rows. Where an answer is complete, its end comes even before min_tokens."""
    if not at:
        return
    bits = np.zeros((len(at), (logits.shape[-1] + 31) // 32 * 4), np.uint8)
    for row, allowed in zip([rows[i] for i in at], bits, strict=True):
        assert row.guide is not None
        row.guide.fill(allowed, row.ids)
        if forbidden := row.forbidden:
            less = allowed.copy()
            for token in forbidden:
                less[token // 8] &= 0xFF ^ 1 << token % 8
            if less.any():
                allowed[:] = less
    mask(logits, at, bits)


def _draw(logits: torch.Tensor, rows: Rows[Sequence]) -> torch.Tensor:
    """Tokens (rows) int32; WIDER for one that takes a longer look, NO_NUMBER for one that has no numbers."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(way_of(row.sampling), []).append(i)
    if len(groups) == 1:
        return WAYS[next(iter(groups))](logits, rows)
    drawn = torch.empty(len(rows), dtype=torch.int32, device=logits.device)
    for way, at in groups.items():
        index = to_device(torch.tensor(at), logits.device)
        drawn.index_copy_(0, index, WAYS[way](logits.index_select(0, index), [rows[i] for i in at]))
    return drawn


def _settle(tokens: list[int], logits: torch.Tensor, rows: Rows[Sequence]) -> list[int]:
    """Draws the rows again that keep more tokens than were looked at."""
    for count in (MORE_CANDIDATES, logits.shape[-1]):
        if wide := [i for i, token in enumerate(tokens) if token == WIDER]:
            drawn = _cut(_select(logits, wide), [rows[i] for i in wide], count).tolist()
            for i, token in zip(wide, drawn, strict=True):
                tokens[i] = token
    return tokens


def _greedy(logits: torch.Tensor, rows: Rows[Sequence]) -> torch.Tensor:
    if logits.device.type == "cpu":  # numpy's is several times as fast as torch's
        values = logits.numpy()
        tokens = values.argmax(-1)
        finite = np.isfinite(values[np.arange(len(tokens)), tokens])
        return torch.from_numpy(np.where(finite, tokens, NO_NUMBER).astype(np.int32))
    highest, ids = logits.max(-1, keepdim=True)
    return _checked(ids.squeeze(-1), highest)


def _whole(logits: torch.Tensor, rows: Rows[Sequence]) -> torch.Tensor:
    """Overwrites the logits: at this size, memory costs more than arithmetic."""
    numbers = _numbers(rows, logits.device)
    highest = logits.amax(-1, keepdim=True)
    weights = logits.sub_(highest).div_(numbers[:, TEMPERATURE, None]).exp_()
    return _checked(_invert(weights, numbers[:, UNIFORM, None]), highest)


def _cut(logits: torch.Tensor, rows: Rows[Sequence], count: int = CANDIDATES) -> torch.Tensor:
    """Tokens from the ``count`` likeliest; WIDER for a row that may keep more."""
    numbers = _numbers(rows, logits.device)
    if count < logits.shape[-1]:
        highest, ids = logits.topk(count, -1)  # (rows, count), descending
    else:
        highest, ids = logits.sort(-1, descending=True)
    values = highest / numbers[:, TEMPERATURE, None]
    total = values[:, :1]
    if any(not row.sampling.top_k and not row.sampling.min_p for row in rows):
        weights = (logits - highest[:, :1]).div_(numbers[:, TEMPERATURE, None]).exp_()
        total = total + weights.sum(-1, keepdim=True).log()
    first, lowest = _lowest(values, total, numbers)
    kept = values >= lowest
    ids, order = ids.masked_fill(~kept, logits.shape[-1]).sort(-1)
    weights = (values - values[:, :1]).exp().masked_fill(~kept, 0).gather(-1, order)
    tokens = ids.gather(-1, _invert(weights, numbers[:, UNIFORM, None])[:, None]).squeeze(-1)
    if count < logits.shape[-1]:
        last = values[:, -1:]
        tokens = tokens.where(((last < lowest) & ((last < first) | (first == -torch.inf))).squeeze(-1), WIDER)
    return _checked(tokens, highest[:, :1])


def _checked(tokens: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """Tokens (rows) int32, with NO_NUMBER where the highest logit (rows, 1) is none: to all that sorts, NaN is."""
    return tokens.int().where(highest.squeeze(-1).isfinite(), NO_NUMBER)


WAYS = {GREEDY: _greedy, WHOLE: _whole, CUT: _cut}


def _lowest(values: torch.Tensor, total: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest logits (rows, 1) that min_p and top_k keep, and that top_p keeps of those; -inf: they keep all.

    ``values`` are the highest logits in descending order, ``total`` is the logsumexp of all. Where a result is not
    above the last of the values, there may be more tokens to keep, and what top_p says of them is not right yet.
    """
    top_k, top_p = numbers[:, TOP_K, None], numbers[:, TOP_P, None]
    kth = values.gather(-1, (top_k.long() - 1).clamp(0, values.shape[-1] - 1))
    first = values[:, :1] + numbers[:, MIN_P, None].log()  # min_p is a share of the highest probability
    first = first.maximum(kth.where(top_k > 0, -torch.inf))
    left = values >= first
    total = total.where(first == -torch.inf, values.masked_fill(~left, -torch.inf).logsumexp(-1, keepdim=True))
    probabilities = (values - total).exp().masked_fill(~left, 0)
    before = probabilities.cumsum(-1) - probabilities
    size = ((before < top_p) & left).sum(-1, keepdim=True).clamp_min(1)
    return first, first.maximum(values.gather(-1, size - 1)).clamp_min(LOWEST)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: indices (rows) into weights (rows, tokens), which need not add up to 1."""
    if weights.shape[-1] <= MORE_CANDIDATES:  # where it takes longer
        return _search(weights, u)
    blocks = functional.pad(weights, (0, -weights.shape[-1] % BLOCK)).reshape(len(weights), -1, BLOCK)
    sums = blocks.sum(-1)  # (rows, blocks)
    block = _search(sums, u)[:, None]
    before = sums.cumsum(-1) - sums
    rest = (u * sums.sum(-1, keepdim=True) - before.gather(-1, block)) / sums.gather(-1, block)
    inside = blocks.take_along_dim(block[:, :, None], 1).squeeze(1)  # (rows, BLOCK)
    index = _search(inside, rest.clamp(0, LARGEST))
    return block.squeeze(-1) * BLOCK + index


def _search(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The first index (rows) where the running sum is above u of the whole: never one of weight 0."""
    cumulative = weights.cumsum(-1)
    picks = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)  # (rows, 1)
    return picks.clamp_max(weights.shape[-1] - 1).squeeze(-1)


def _numbers(rows: Rows[Sequence], device: torch.device) -> torch.Tensor:
    numbers = []
    for row in rows:
        s = row.sampling
        top_p = ALL if s.top_p >= 1 else max(s.top_p, SMALLEST_TOP_P)
        numbers.append((s.temperature, uniform(s.seed, len(row.ids), row.variant), s.top_k, top_p, s.min_p))
    return to_device(torch.tensor(numbers, dtype=torch.float32), device)


def _select(tensor: torch.Tensor, at: Rows[int]) -> torch.Tensor:
    """The rows at these indices; no copy if it is all of them."""
    return tensor if len(at) == len(tensor) else tensor.index_select(0, to_device(torch.tensor(at), tensor.device))
