"""The short way to the end of a JSON answer: brackets are closed, no field is begun that need not be there.

An answer that is cut off by ``max_tokens`` is no JSON. So when the tokens that are left come near to what the end takes
at the least, the rest is not the model's to choose. The way is found by trying: no grammar knows its shortest end.
"""

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

EVERY = 16
"""Tokens between two looks. They lie at fixed places, so that an answer which is resumed takes the same course."""
MARGIN = 32
"""Tokens that are kept beyond what the end takes: the model may begin a new object between two looks."""
CHARACTERS_PER_TOKEN = 4
LONGEST = 512
"""No way to the end is looked for that takes more tokens."""
AGAIN = 8.0
"""What a token costs more each time that a way takes it: an address must not go on with dots for ever."""


class Closing:
    """Knows of each token of a vocabulary how far it leads to the end. Made once for a model."""

    def __init__(self, tree: LLTokenizer, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self._eos = min(eos_ids)
        self._costs = np.array([_cost(tree.decode_bytes([token])) for token in range(vocabulary)], np.float32)
        self._costs[list(eos_ids)] = -1e6
        self._bits = np.zeros((vocabulary + 31) // 32 * 4, np.uint8)

    def way(self, matcher: LLMatcher, most: int) -> list[int] | None:
        """Tokens from where the matcher is to the end, that of the answer included; None: none of so many was found."""
        matcher, costs, way = matcher.deep_copy(), self._costs.copy(), list[int]()
        while len(way) < min(most, LONGEST):
            matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            allowed = np.unpackbits(self._bits, count=len(costs), bitorder="little")
            ids = np.flatnonzero(allowed)
            if matcher.is_error() or not len(ids):
                return None
            token = int(ids[costs[ids].argmin()])
            way.append(token)
            if costs[token] <= -1e6:
                return way
            matcher.consume_token(token)
            costs[token] += AGAIN
        return None


class Budget:
    """When one row has to go that way.

    Args:
        limit: tokens that it may generate.
        size: characters of its schema: what a new object may take is a part of them.
    """

    def __init__(self, closing: Closing, limit: int, size: int) -> None:
        self._closing = closing
        self._limit = limit
        self._margin = min(max(MARGIN, size // CHARACTERS_PER_TOKEN), limit // 4)
        self._hopeless = False
        self.way: Sequence[int] = ()
        """The tokens to the end, once there is no other choice."""
        self.begun = 0
        """How many tokens came before the first of them."""

    def look(self, matcher: LLMatcher, done: int) -> None:
        """Looks behind ``done`` tokens, if it is time for it; see `way`."""
        left = self._limit - done
        if self.way or self._hopeless or left % EVERY or left > max(self._limit // 2, 2 * self._margin):
            return
        way = self._closing.way(matcher, left)
        self._hopeless = way is None
        if way is not None and left - len(way) < self._margin + EVERY:
            self.way, self.begun = way, done


def only(bits: NDArray[np.uint8], token: int) -> None:
    """Makes a mask of one token."""
    bits[:] = 0
    bits[token // 8] = 1 << token % 8


def _cost(text: bytes) -> float:
    """The less, the nearer to the end: closing comes before separating, that before all other marks and those before
    words; opening, blanks and escapes come last. A quotation mark closes a text, and is the shortest value."""
    if not text:
        return 1e4
    if text in (b"[]", b"{}") or not text.strip(b'"]}'):
        return -100.0 - 10 * len(text)
    if text[:1] in b",:":
        return -50.0
    if text[:1] in b"[{":
        return 50.0
    if not text.strip():
        return 1000.0
    if text[:1].isspace() or b"\\" in text:
        return 100.0
    if text == b"@":
        return -30.0
    if len(text) == 1 and text in b".-+/_":
        return -5.0
    return -0.01 * len(text)
