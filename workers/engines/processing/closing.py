"""The short way to the end of a JSON answer: brackets are closed, no field is begun that need not be there.

An answer that is cut off by ``max_tokens`` is no JSON. So when the tokens that are left come near to what the end takes
at the least, the rest is not the model's to choose. The way is found by trying: no grammar knows its shortest end.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

LEAST = 16
"""Tokens between two looks, at the least; more while there is time: a part of what is left beyond the end."""
PART = 4
MARGIN = 32
"""Tokens that are kept beyond what the end takes: the model may begin a new object between two looks."""
CHARACTERS_PER_TOKEN = 4
LONGEST = 256
"""No way to the end is looked for that takes more tokens."""
WORST, BLANK = 1e6, 1e3
"""What no way takes, and what it takes in need."""
QUOTE, MARKS = b'"', (b"}", b"]", b",", b":", b'"')
"""What ends a text, and what leads to the end outside of texts, the best first. A quotation mark begins one there."""
LETTER = b"q"
"""It may follow within a text, and nowhere else in JSON: no number and no name begins with it."""
AGAIN = 8.0
"""What a token costs more each time that a way takes it: an address must not go on with dots for ever."""


class Closing:
    """Knows which tokens of a vocabulary lead to the end. Made once for a model."""

    def __init__(self, tree: LLTokenizer, vocabulary: int, eos_ids: frozenset[int]) -> None:
        texts = [tree.decode_bytes([token]) for token in range(vocabulary)]
        ids = {text: token for token, text in enumerate(texts) if len(text) == 1}
        self._eos = min(eos_ids)
        self._marks = [ids[mark] for mark in MARKS if mark in ids]
        self._quote = [ids[QUOTE]] if QUOTE in ids else []
        self._letter = [ids[LETTER]] if LETTER in ids else []
        self._costs = np.array([_cost(text) for text in texts], np.float32)
        self._costs[list(eos_ids)] = WORST  # the end of an answer is seen without it

    def way(self, matcher: LLMatcher, most: int) -> list[int] | None:
        """Tokens from where the matcher is to the end, that of the answer included; None: none of so many was found."""
        matcher, way, again = matcher.deep_copy(), list[int](), Counter[int]()
        bits = np.zeros((len(self._costs) + 31) // 32 * 4, np.uint8)  # of its own: threads look at a time
        while len(way) < min(most, LONGEST):
            if matcher.is_accepting():
                return [*way, self._eos]
            token = self._next(matcher, again, bits)
            if token is None:
                return None
            way.append(token)
            matcher.consume_token(token)
        return None

    def _next(self, matcher: LLMatcher, again: "Counter[int]", bits: NDArray[np.uint8]) -> int | None:
        """The allowed token that costs least; a mark that leads to the end if there is one."""
        in_text = self._letter and matcher.validate_tokens(self._letter)
        for mark in self._quote if in_text else self._marks:
            if matcher.validate_tokens([mark]):
                return mark
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        costs = np.where(np.unpackbits(bits, count=len(self._costs), bitorder="little"), self._costs, np.inf)
        for token, times in again.items():
            costs[token] += AGAIN * times
        token = int(costs.argmin())
        again[token] += 1
        return None if matcher.is_error() or costs[token] == np.inf else token


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
        self._next = limit if limit <= 4 * self._margin + LEAST else limit // 2
        """How many tokens are left when it looks again; the looks hang on the tokens alone, so that an answer which is
        resumed takes the same course."""
        self.way: Sequence[int] = ()
        """The tokens to the end, once there is no other choice."""
        self.begun = 0
        """How many tokens came before the first of them."""

    def look(self, matcher: LLMatcher, done: int) -> None:
        """Looks behind ``done`` tokens, if it is time for it; see `way`."""
        left = self._limit - done
        if self.way or left > self._next:
            return
        way = self._closing.way(matcher, left)
        if way is None:
            self._next = -1  # there is none, and none is looked for again
            return
        beyond = left - len(way) - self._margin
        self._next = left - max(LEAST, beyond // PART)
        if beyond < LEAST:
            self.way, self.begun = way, done


def only(bits: NDArray[np.uint8], token: int) -> None:
    """Makes a mask of one token."""
    bits[:] = 0
    bits[token // 8] = 1 << token % 8


def _cost(text: bytes) -> float:
    """Of what is no mark, or not the one of its place: what formats ask for comes before words, long ones first."""
    if text == b"@":
        return -30.0
    if text in (b".", b":", b"-", b"+", b"/", b"_"):
        return -5.0
    if not text.strip():
        return BLANK
    if text[:1].isspace() or b"\\" in text or not text.strip(b'",:]}[{'):
        return BLANK / 2
    return -0.01 * len(text)
