"""JSON as models write it, read as it comes: shown as it is where it is right, and mended where it can be."""

import json
import re
from typing import Any

from .reader import NotACall, Reader, Show, Steps

DEEPEST = 64
LONGEST_SCALAR = 400
PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
CLOSING = {"{": "}", "[": "]"}


def value(reader: Reader, show: Show) -> Steps[None]:
    """Reads a value and shows it. Line breaks in strings and escapes that JSON has not are mended.

    Raises:
        NotACall: it is none, or ends before it is whole; what was read of it is shown.
    """
    stack: list[str] = []
    while True:
        show((yield from reader.space()))
        char = yield from reader.peek()
        if char in CLOSING:
            if len(stack) == DEEPEST:
                raise NotACall
            show(reader.take(1))
            stack.append(CLOSING[char])
            show((yield from reader.space()))
            if (yield from reader.peek()) != stack[-1]:
                if char == "{":
                    yield from _key(reader, show)
                continue
        elif char == '"':
            yield from string(reader, show)
        else:
            yield from _scalar(reader, show)
        while stack:
            show((yield from reader.space()))
            char = yield from reader.peek()
            if char == stack[-1]:
                show(reader.take(1))
                stack.pop()
                continue
            if char != ",":
                raise NotACall
            show(reader.take(1))
            if stack[-1] == "}":
                show((yield from reader.space()))
                yield from _key(reader, show)
            break
        if not stack:
            return


def read(reader: Reader) -> Steps[str]:
    """Reads a value whole, as text.

    Raises:
        NotACall: see `value`.
    """
    parts: list[str] = []
    yield from value(reader, parts.append)
    return "".join(parts)


def read_string(reader: Reader) -> Steps[str]:
    """Reads a string, decoded.

    Raises:
        NotACall: it is none.
    """
    parts: list[str] = []
    yield from string(reader, parts.append)
    decoded: str = json.loads("".join(parts))
    return decoded


def string(reader: Reader, show: Show) -> Steps[None]:
    """Reads a string and shows it. Raises NotACall as `value` does."""
    yield from reader.need('"')
    show('"')
    while True:
        char = yield from reader.peek()
        if char == "":
            raise NotACall
        if plain := PLAIN.match(reader.unread):
            show(reader.take(plain.end()))
        elif char == '"':
            show(reader.take(1))
            return
        elif char == "\\":
            yield from _escape(reader, show)
        else:
            show(json.dumps(reader.take(1))[1:-1])


def escaped(text: str) -> str:
    """Text as it stands in a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _escape(reader: Reader, show: Show) -> Steps[None]:
    while len(reader.unread) < 2 or (reader.unread[1] == "u" and len(reader.unread) < 6):
        if not (yield from reader.more()):
            raise NotACall
    digits = reader.unread[2:6]
    if reader.unread[1] == "u" and re.fullmatch("[0-9a-fA-F]{4}", digits):
        show(reader.take(6))
    elif reader.unread[1] in '"\\/bfnrt':
        show(reader.take(2))
    else:
        show("\\" + reader.take(1))  # of a regular expression, mostly


def _key(reader: Reader, show: Show) -> Steps[None]:
    yield from string(reader, show)
    show((yield from reader.space()))
    show((yield from reader.need(":")))


def _scalar(reader: Reader, show: Show) -> Steps[None]:
    text = ""
    while (char := (yield from reader.peek())) and (char.isalnum() or char in "+-."):
        text += reader.take(1)
        if len(text) > LONGEST_SCALAR:
            break
    word = text if NUMBER.fullmatch(text) else WORDS.get(text)
    show(text if word is None else word)
    if word is None:
        raise NotACall


def of(found: Any) -> str:
    """JSON text of a value, as models write it."""
    return json.dumps(found, ensure_ascii=False)
