"""Calls as Python: ``[f(a=1, b="x"), g()]``."""

import re
from collections.abc import Sequence
from typing import Literal

from . import json_text, literal
from .form import Form, Functions
from .lark import Function, Lark
from .reader import LONGEST_NAME, NotACall, Reader, Steps

NAME = re.compile(r"[A-Za-z_][\w.\-]*")
OPENING, CLOSING = "([{", ")]}"


class PythonForm(Form):
    """Calls with keyword arguments, whose values are literals of Python or of JSON."""

    form: Literal["python"] = "python"
    lines: bool = False
    """One call a line, instead of a list."""

    def body(self, reader: Reader, mark: str, functions: Functions) -> Steps[None]:
        yield from reader.space()
        listed = (yield from reader.expect("[")) is not None
        if not listed and not self.lines:
            raise NotACall
        while True:
            yield from reader.space()
            yield from self._call(reader)
            yield from reader.space()
            if listed:
                if (yield from reader.need(",", "]")) == "]":
                    return
                reader.begin(",")
            else:
                if not (yield from reader.peek()) or (yield from reader.expect(self.end)):
                    reader.back(self.end if reader.unread or not reader.ended else "")
                    return
                reader.begin()

    def _call(self, reader: Reader) -> Steps[None]:
        name = yield from _word(reader)
        yield from reader.need("(")
        yield from reader.space()
        before = "{"
        while (yield from reader.expect(")")) is None:
            key = yield from _word(reader)
            yield from reader.space()
            yield from reader.need("=")
            text = literal.to_json((yield from _source(reader)))
            if before == "{":
                reader.call(name)
            reader.argue(f"{before}{json_text.of(key)}: {text}")
            before = ", "
            yield from reader.expect(",")
            yield from reader.space()
        if before == "{":
            reader.call(name)
        reader.argue("{}" if before == "{" else "}")
        reader.close()

    def grammar(self, lark: Lark, functions: Sequence[Function], many: bool) -> str:
        calls = lark.calls([_grammar_of(lark, one) for one in functions], many, '"\\n"' if self.lines else '", "')
        start, end = lark.text(self.start[0] if self.start else ""), lark.text(self.end)
        return f"{start} {calls} {end}" if self.lines else f'{start} "[" {calls} "]" {end}'


def _grammar_of(lark: Lark, function: Function) -> str:
    """All parameters that must be there, and then those that need not, each in its order."""
    required = [name for name in function.properties if name in function.required]
    optional = [name for name in function.properties if name not in function.required]
    pairs = [f"{lark.text(name + '=')} {lark.json(function.schema_of(name), function.strict)}" for name in required]
    whole = ' ", " '.join(pairs)
    for name in optional:
        pair = f"{lark.text(name + '=')} {lark.json(function.schema_of(name), function.strict)}"
        whole += f' (", " {pair})?' if required else ""
        if not required:
            whole = f"({whole + ' | ' if whole else ''}{pair})"
    if optional and not required:
        whole = f"({whole})?"
    return f'{lark.text(function.name + "(")} {whole} ")"'


def _word(reader: Reader) -> Steps[str]:
    while True:
        found = NAME.match(reader.unread)
        if found is None and reader.unread:
            raise NotACall
        if found is not None and found.end() > LONGEST_NAME:
            raise NotACall
        if found is not None and (found.end() < len(reader.unread)):
            return reader.take(found.end())
        if not (yield from reader.more()):
            raise NotACall


def _source(reader: Reader) -> Steps[str]:
    """Reads the text of a value: up to a comma or bracket that is not its own."""
    parts: list[str] = []
    depth, quote = 0, ""
    while char := (yield from reader.peek()):
        if quote:
            size = 2 if char == "\\" else 1
            while len(reader.unread) < size:
                if not (yield from reader.more()):
                    raise NotACall
            quote = "" if char == quote else quote
            parts.append(reader.take(size))
            continue
        if char in "\"'":
            quote = char
        elif char in OPENING:
            depth += 1
        elif char in CLOSING:
            depth -= 1
        if depth < 0 or (char == "," and depth == 0):
            return "".join(parts)
        parts.append(reader.take(1))
    raise NotACall
