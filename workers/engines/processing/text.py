"""From token ids to text that may be shown: whole characters, and nothing that may yet become a stop string."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from fastchat_q.events import spelt

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8
"""An incomplete character has at most 4 bytes; a longer run of undecodable bytes is shown as it is."""
MAX_UNFINISHED_TOKENS = 3
"""The last tokens of such a run still wait: they may begin a character, which would be lost if they were shown."""


class Detokenizer:
    """Incremental decoding with a short window, for any tokenizer: constant cost a token.

    The window starts a few tokens back, because what a token decodes to depends on its left neighbour (leading spaces).
    The technique is that of vLLM's and TGI's detokenisers.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        """
        Args:
            before: tokens on whose text it goes on, so that a first word keeps its space.
        """
        self._decode = decode
        self._window: list[int] = list(before)
        if before and decode(self._window).endswith(REPLACEMENT):  # it would not be known what is new
            self._window = []
        self._shown = len(self._window)  # tokens of the window whose text is out

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._window.append(token_id)
        before = self._decode(self._window[: self._shown])
        now = self._decode(self._window)
        end = len(self._window)
        if len(now) <= len(before) or now.endswith(REPLACEMENT):
            if end - self._shown <= MAX_HELD_TOKENS:
                return ""
            if len(now) <= len(before):  # tokens without text, such as special ones: the window would grow for ever
                del self._window[self._shown :]
                return ""
            end -= MAX_UNFINISHED_TOKENS
            now = self._decode(self._window[:end])
        del self._window[: self._shown]
        self._shown = end - self._shown
        return now[len(before) :]

    def flush(self) -> str:
        """What is still held back, incomplete as it is."""
        before = self._decode(self._window[: self._shown])
        text = self._decode(self._window)[len(before) :]
        self._shown = len(self._window)
        return text


class StopMatcher:
    """Finds stop strings across chunk borders, and holds back text that may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.found: str | None = None
        """The stop string that came."""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was found); the stop string itself is never shown."""
        if not self._stop:
            return text, False
        text = self._held + text
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:  # the one that is complete first, as if text came by the character: chunks change nothing
            self._held = ""
            _, at, self.found = min(found)
            return text[:at], True
        keep = self._suffix_that_may_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The held-back text, when generation ended without the rest of a stop string."""
        text, self._held = self._held, ""
        return text

    def _suffix_that_may_stop(self, text: str) -> int:
        for size in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[-size:]
            if any(s.startswith(tail) for s in self._stop):
                return size
        return 0


class TokenTexts:
    """What each token of a transformers tokenizer decodes to by itself.

    With its leading space, which ``decode`` drops, and bytes that make no character by themselves spelt out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.decoder.__getstate__()) if backend is not None and backend.decoder else {}
        self._bytes = _byte_alphabet() if "ByteLevel" in json.dumps(decoder) else None
        self._texts: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        """Empty for an id that the tokenizer does not know: logits may be wider than the vocabulary."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._text(self._tokenizer.convert_ids_to_tokens(token_id) or "")
        return text

    def _text(self, token: str) -> str:
        if self._bytes is not None and all(letter in self._bytes for letter in token):
            return spelt(bytes(self._bytes[letter] for letter in token))
        if self._bytes is None and len(token) == 6 and token.startswith("<0x"):
            return spelt(bytes([int(token[3:5], 16)]))
        return token.replace("\u2581", " ") if self._bytes is None else token


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}
