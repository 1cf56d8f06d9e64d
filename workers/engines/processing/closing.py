"""The short way to the end of a JSON answer: brackets are closed, no field is begun that need not be there.

An answer that is cut off by ``max_tokens`` is no JSON. So when the tokens that are left come near to what the end takes
at the least, the rest is not the model's to choose. The way is found by trying: no grammar knows its shortest end.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

LEAST = 16
"""Tokens between two looks, at the least; more while there is time: a part of what is left beyond the end."""
PART = 4
MARGIN = 32
"""Tokens that are kept beyond what the end takes: the model may begin a new object between two looks."""
CHARACTERS_PER_TOKEN = 4
SHORTER = 3
"""A way is looked for that takes so many times the tokens: its marks may be joined to fewer."""
LONGEST = 4096
"""No way to the end is looked for that takes more tokens."""
MASKS = 256
"""Masks that one look may take: of all its steps those take longest. Forced tokens and marks take none."""
STEPS = 8
"""A look is worth so many of its tokens for each one that the row goes on: a long way is looked for less often."""
FILLINGS = 32
"""How often a look tries what the patterns of a schema ask for."""
PATTERNS, FILLING, TURNS = 16, 64, 3
"""Patterns that are tried, characters of each, and how often in a row."""
PIECES = re.compile(
    r"\\(?P<class>[dDwWsSbB]|[pP](\{[^}]*\})?)|\\u(?P<code>[0-9a-fA-F]{4})|\\(?P<mark>.)|"
    r"\[(?P<not>\^?)(?P<set>(\\.|[^\]\\])+)\]|\((?P<group>\?[:=!<>]*)|(?P<times>[*+?]|\{\d+(,\d*)?\})|(?P<other>.)",
    re.DOTALL,
)
"""Of a regular expression, as far as its characters go."""
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
        self._tree = tree
        self._eos = min(eos_ids)
        self._marks = [ids[mark] for mark in MARKS if mark in ids]
        self._quote = [ids[QUOTE]] if QUOTE in ids else []
        self._letter = [ids[LETTER]] if LETTER in ids else []
        self._bytes = {text[0]: token for text, token in ids.items()}
        self._fillings: list[list[list[int]]] = []
        self._costs = np.array([_cost(text) for text in texts], np.float32)
        self._costs[list(eos_ids)] = WORST  # the end of an answer is seen without it

    def of(self, schema: Any) -> "Closing":
        """The same for one schema, whose patterns say what a text may have to hold before it can end."""
        found = copy.copy(self)
        texts = dict.fromkeys(filling(pattern) for pattern in _patterns(schema))
        found._fillings = [self._written(text) for text in list(texts)[:PATTERNS]]
        return found

    def _written(self, text: str) -> list[list[int]]:
        """The tokens of each character, as it stands in JSON."""
        written = [json.dumps(character, ensure_ascii=False)[1:-1].encode() for character in text]
        return [[self._bytes[byte] for byte in one if byte in self._bytes] for one in written]

    def way(self, matcher: LLMatcher, most: int) -> list[int] | None:
        """Tokens from where the matcher is to the end, that of the answer included; None: none of so many was found."""
        way = self._found(matcher.deep_copy(), min(SHORTER * most, LONGEST))
        if way is None:
            return None
        joined = self._tree.tokenize_bytes(self._tree.decode_bytes(way))
        if len(joined) < len(way) and matcher.validate_tokens(joined) == len(joined):
            way = joined
        return [*way, self._eos] if len(way) < most else None

    def _found(self, matcher: LLMatcher, most: int) -> list[int] | None:
        way, again = list[int](), Counter[int]()
        bits = np.zeros((len(self._costs) + 31) // 32 * 4, np.uint8)  # of its own: threads look at a time
        masks, fillings = MASKS, FILLINGS
        while len(way) < most:
            if matcher.is_accepting():
                return way
            tokens = self._known(matcher)
            if not tokens and fillings > 0:
                fillings -= 1
                tokens = self._filled(matcher)
            if not tokens:
                masks -= 1
                token = self._cheapest(matcher, again, bits) if masks >= 0 else None
                if token is None:
                    return None
                tokens = [token]
            way += tokens
            if not matcher.consume_tokens(tokens):
                return None
        return None

    def _known(self, matcher: LLMatcher) -> list[int]:
        """What leads on without a choice: a mark, or what is forced."""
        in_text = bool(self._letter) and matcher.validate_tokens(self._letter) == 1
        for mark in self._quote if in_text else self._marks:
            if matcher.validate_tokens([mark]):
                return [mark]
        forced: list[int] = matcher.compute_ff_tokens()
        return forced

    def _filled(self, matcher: LLMatcher) -> list[int]:
        """What a text lacks of a pattern that it has to fit; nothing if that is of no use."""
        ways = [found for filling in self._fillings if self._quote and (found := self._up_to_quote(matcher, filling))]
        return min(ways, key=len, default=[])

    def _up_to_quote(self, matcher: LLMatcher, filling: list[list[int]]) -> list[int]:
        """As much of it as brings the text to its end, without what does not fit; nothing if it does not."""
        matcher, way = matcher.deep_copy(), list[int]()
        for tokens in filling * TURNS:
            if not tokens or matcher.validate_tokens(tokens) < len(tokens):
                continue
            matcher.consume_tokens(tokens)
            way += tokens
            if matcher.validate_tokens(self._quote):
                return way
        return []

    def _cheapest(self, matcher: LLMatcher, again: "Counter[int]", bits: NDArray[np.uint8]) -> int | None:
        """The allowed token that costs least."""
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
        least: the way from the beginning, if one is known.
    """

    def __init__(self, closing: Closing, limit: int, size: int, least: Sequence[int] | None) -> None:
        self._closing = closing
        self._limit = limit
        self._margin = min(max(MARGIN, size // CHARACTERS_PER_TOKEN), limit // 4)
        self._next = limit
        """How many tokens are left when it looks again; the looks hang on the tokens alone, so that an answer which is
        resumed takes the same course."""
        self.way: Sequence[int] = ()
        """The tokens to the end, once there is no other choice."""
        self.begun = 0
        """How many tokens came before the first of them."""
        self._settle(least, 0)

    def look(self, matcher: LLMatcher, done: int) -> None:
        """Looks behind ``done`` tokens, if it is time for it; see `way`."""
        left = self._limit - done
        if not self.way and left <= self._next:
            self._settle(self._closing.way(matcher, left), done)

    def _settle(self, way: Sequence[int] | None, done: int) -> None:
        """Goes that way, or says when to look again; where none was found, another may be from further on."""
        left = self._limit - done
        if way is None or len(way) > left:
            self._next = left - max(LEAST, left // 2)  # such a look costs most, and mostly there is none later either
            return
        beyond, least = left - len(way) - self._margin, max(LEAST, len(way) // STEPS)
        self._next = left - max(least, beyond // PART)
        if beyond < least:
            self.way, self.begun = way, done


def filling(pattern: str) -> str:
    """What a text may lack of a pattern, in order: its own characters, one of each class; at most `FILLING`."""
    found = ""
    for piece in PIECES.finditer(pattern):
        if piece["class"]:
            found += {"d": "0", "w": "a", "D": "a", "W": "-", "s": " ", "S": "a", "p": "aA0"}.get(
                piece["class"][:1], ""
            )
        elif piece["code"]:
            found += chr(int(piece["code"], 16))
        elif piece["mark"]:
            found += piece["mark"]
        elif piece["set"]:
            found += next((one for one in "a0A-_ .q@" if _is_in(piece[0], one)), "")
        elif piece["times"] and piece["times"][:1] == "{":
            found += found[-1:] * (min(int(re.findall(r"\d+", piece["times"])[0]), FILLING) - 1)
        elif piece["other"] and piece["other"] not in "^$.|()":
            found += piece["other"]
    return found[:FILLING]


def _is_in(characters: str, one: str) -> bool:
    try:
        return re.fullmatch(characters, one) is not None
    except re.error:  # what another dialect calls a class
        return False


def _patterns(schema: Any) -> Iterator[str]:
    """All that are somewhere in a schema."""
    below = [schema]
    while below:
        part = below.pop()
        if isinstance(part, dict):
            if isinstance(part.get("pattern"), str):
                yield part["pattern"]
            if isinstance(part.get("patternProperties"), dict):
                yield from part["patternProperties"]
        if isinstance(part, dict | list):
            below += part.values() if isinstance(part, dict) else part


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
