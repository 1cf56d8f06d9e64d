"""Calls in Gemma's notation: ``call:f{a:<|"|>text<|"|>,b:1}``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from . import json_text
from .form import Form, Functions
from .lark import Function, Lark
from .literal import refuse
from .reader import NotACall, Reader, Steps

DEEPEST = 32
LONGEST_BARE = 4096
WORDS = {"True": "true", "False": "false", "None": "null"}


class LooseForm(Form):
    """Objects whose keys have no quotes, and whose texts stand between marks."""

    form: Literal["loose"] = "loose"
    quote: str
    call: str = "call:"

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.starts, self.end, self.quote)

    def body(self, reader: Reader, mark: str, functions: Functions) -> Steps[None]:
        yield from reader.space()
        yield from reader.need(self.call)
        name, brace = yield from reader.name(("{",))
        reader.back(brace)
        reader.call(name)
        yield from self._value(reader, 0)
        reader.close()

    def _value(self, reader: Reader, depth: int) -> Steps[None]:
        if depth > DEEPEST:
            raise NotACall
        yield from reader.space()
        opening = yield from reader.expect(self.quote, "{", "[")
        if opening == self.quote:
            yield from self._text(reader)
        elif opening is not None:
            yield from self._members(reader, opening, depth)
        else:
            reader.argue((yield from _bare(reader)))

    def _text(self, reader: Reader) -> Steps[None]:
        reader.argue('"')
        if (yield from reader.until((self.quote,), lambda text: reader.argue(json_text.escaped(text)))) is None:
            raise NotACall
        reader.argue('"')

    def _members(self, reader: Reader, opening: str, depth: int) -> Steps[None]:
        reader.argue(opening)
        closing = "}" if opening == "{" else "]"
        yield from reader.space()
        if (yield from reader.expect(closing)) is not None:
            reader.argue(closing)
            return
        while True:
            if opening == "{":
                yield from self._key(reader)
            yield from self._value(reader, depth + 1)
            yield from reader.space()
            if (yield from reader.need(",", closing)) == closing:
                reader.argue(closing)
                return
            reader.argue(", ")

    def _key(self, reader: Reader) -> Steps[None]:
        yield from reader.space()
        if (yield from reader.expect(self.quote)) is not None:
            key, _ = yield from reader.name((self.quote,))
            yield from reader.need(":")
        else:
            key, _ = yield from reader.name((":",))
        reader.argue(json_text.of(key) + ": ")

    def grammar(self, lark: Lark, functions: Sequence[Function], many: bool) -> str:
        calls = []
        for function in functions:
            head = lark.text(self.start[0] + self.call + function.name)
            calls.append(f"{head} {self._of_schema(lark, function.parameters, function, 0)} {lark.text(self.end)}")
        return lark.calls(calls, many)

    def _of_schema(self, lark: Lark, schema: Mapping[str, Any], function: Function, depth: int) -> str:
        """What llguidance cannot do for this notation; of a schema it holds to types, enumerations and nesting."""
        if "const" in schema or isinstance(schema.get("enum"), list):
            choices = schema.get("enum") or [schema.get("const")]
            return lark.rule(*[self._constant(lark, one) for one in choices])
        kind = schema.get("type")
        if kind == "string":
            return f"{lark.text(self.quote)} {lark.up_to(self.quote)}"
        if kind == "array" and depth < DEEPEST:
            items = schema.get("items")
            item = self._of_schema(lark, items if isinstance(items, Mapping) else {}, function, depth + 1)
            return lark.rule(f'"[" ({item} ("," {item})*)? "]"')
        if kind == "object" and depth < DEEPEST:
            return self._of_object(lark, schema, function, depth)
        if kind in ("integer", "number", "boolean", "null"):
            return lark.json(schema, function.strict)
        return lark.rule(f"{lark.text(self.quote)} {lark.up_to(self.quote)}", lark.json({"type": "number"}, False))

    def _of_object(self, lark: Lark, schema: Mapping[str, Any], function: Function, depth: int) -> str:
        properties = schema.get("properties") or {}
        required = [name for name in properties if name in (schema.get("required") or ())]
        pairs = {
            name: f"{lark.text(name + ':')} {self._of_schema(lark, one, function, depth + 1)}"
            for name, one in properties.items()
        }
        whole = ' "," '.join(pairs[name] for name in required)
        for name in properties:
            if name not in required:
                whole = f'{whole} ("," {pairs[name]})?' if required else (whole or pairs[name])
        return lark.rule(f'"{{" {whole if required or not whole else f"({whole})?"} "}}"')

    def _constant(self, lark: Lark, one: Any) -> str:
        return lark.text(f"{self.quote}{one}{self.quote}" if isinstance(one, str) else json.dumps(one))


def _bare(reader: Reader) -> Steps[str]:
    """Reads a number or word; as JSON text."""
    read = ""
    while (char := (yield from reader.peek())) and char not in ",}]" and len(read) < LONGEST_BARE:
        read += reader.take(1)
    if not char:
        raise NotACall
    read = WORDS.get(read.strip(), read.strip())
    try:
        json.loads(read, parse_constant=refuse)
    except (ValueError, RecursionError):
        return json_text.of(read)
    return read
