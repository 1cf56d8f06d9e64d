"""Calls with a mark around each parameter: ``<function=f><parameter=a>text</parameter></function>``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from . import json_text, literal
from .form import Form, Functions
from .lark import Function, Lark
from .reader import NotACall, Reader, Show, Steps

Kind = Literal["schema", "text", "json"]


class XmlForm(Form):
    """Texts between marks. What a text means, the schema of its parameter says."""

    form: Literal["xml"] = "xml"
    call: str
    """Before the name."""
    name_ends: tuple[str, ...] = (">",)
    call_end: str
    key: str
    """Before the name of a parameter."""
    key_ends: dict[str, Kind]
    """Behind it, and what it says of the value."""
    value: str = ""
    """Before the value, if the end of the key does not say it."""
    value_end: str
    line: bool = False
    """The value stands on lines of its own."""

    @property
    def starts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.start, self.call)))

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.starts, self.end, self.call_end, self.key, *self.key_ends, self.value, self.value_end)

    def body(self, reader: Reader, mark: str, functions: Functions) -> Steps[None]:
        if mark != self.call:
            yield from reader.space()
            yield from reader.need(self.call)
        while True:
            yield from self._call(reader, functions)
            if not self.end:
                return
            yield from reader.space()
            if (yield from reader.expect(self.end)):
                reader.back(self.end)
                return
            yield from reader.need(self.call)
            reader.begin(self.call)

    def _call(self, reader: Reader, functions: Functions) -> Steps[None]:
        name, mark = yield from reader.name(self.name_ends)
        if mark in (self.key, self.call_end):
            reader.back(mark)
        yield from reader.space()
        first = yield from reader.need(self.key, self.call_end)
        reader.call(name)
        function = functions.get(name)
        before = "{"
        while first == self.key:
            key, kind = yield from reader.name(tuple(self.key_ends))
            if self.value:
                yield from reader.space()
                yield from reader.need(self.value)
            reader.argue(f"{before}{json_text.of(key)}: ")
            schema = function.schema_of(key) if function is not None else {}
            yield from self._value(reader, self.key_ends[kind], schema)
            before = ", "
            yield from reader.space()
            first = yield from reader.need(self.key, self.call_end)
        reader.argue("{}" if before == "{" else "}")
        reader.close()

    def _value(self, reader: Reader, kind: str, schema: Mapping[str, Any]) -> Steps[None]:
        if kind == "text" or (kind == "schema" and is_text(schema)):
            reader.argue('"')
            yield from self._text(reader, lambda text: reader.argue(json_text.escaped(text)))
            reader.argue('"')
            return
        parts: list[str] = []
        yield from self._text(reader, parts.append)
        reader.argue(typed("".join(parts), schema))

    def _text(self, reader: Reader, show: Show) -> Steps[None]:
        """Reads a value to its end, or to the end of the call if that was forgotten."""
        if self.line:
            yield from reader.expect("\n")
        ends: tuple[str, ...] = (self.value_end, self.call_end)
        if self.line:
            ends += ("\n" + self.value_end, "\n" + self.call_end)
        mark = yield from reader.until(ends, show)
        if mark is None:
            raise NotACall
        if mark.endswith(self.call_end):
            reader.back(self.call_end)

    def grammar(self, lark: Lark, functions: Sequence[Function], many: bool) -> str:
        calls = [self._grammar_of(lark, function) for function in functions]
        if self.call in self.start:
            return lark.calls(calls, many, r"/\n?/")
        inner = lark.calls(calls, many and not self.line, r"/\n?/")
        whole = rf"{lark.text(self.start[0])} /\n?/ {inner} /\n?/ {lark.text(self.end)}"
        return lark.calls([whole], many, r"/\n?/") if self.line else whole

    def _grammar_of(self, lark: Lark, function: Function) -> str:
        end = "\n" if "\n" in self.name_ends else self.name_ends[0]
        head = f"{lark.text(self.call + function.name + end)} /\\n?/"
        if "\n" in self.name_ends:
            head = lark.text(self.call + function.name + end)
        parts = []
        for name in function.properties:
            one = self._parameter(lark, function, name)
            parts.append(one if name in function.required else f"({one})?")
        return f"{head} {' '.join(parts)} {lark.text(self.call_end)}"

    def _parameter(self, lark: Lark, function: Function, name: str) -> str:
        schema = function.schema_of(name)
        textual = is_text(schema)
        ends = {kind: end for end, kind in self.key_ends.items()}
        end = ends.get("text" if textual else "json") or ends["schema"]
        line = "\n" if self.line else ""
        head = lark.text(self.key + name + end + (f"\n{self.value}" if self.value else "") + line)
        choices = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
        if not textual:
            body = f"{lark.json(schema, function.strict)} {lark.text(line + self.value_end)}"
        elif choices:
            body = f"({' | '.join(lark.text(str(one)) for one in choices)}) {lark.text(line + self.value_end)}"
        else:
            body = lark.up_to(line + self.value_end, self.value_end, self.call_end)
        return f"{head} {body} /\\n?/"


def kinds(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema allows; empty: any."""
    found: set[str] = set()
    kind = schema.get("type")
    found |= {kind} if isinstance(kind, str) else {one for one in kind or () if isinstance(one, str)}
    for word in ("anyOf", "oneOf"):
        for one in schema.get(word) or ():
            found |= kinds(one) if isinstance(one, Mapping) else set()
    if not found and isinstance(schema.get("enum"), list) and all(isinstance(one, str) for one in schema["enum"]):
        found = {"string"}
    if not found and "$ref" in schema:
        found = {"object"}
    return found


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a value can be nothing but text. So is one of which nothing is known."""
    return kinds(schema) <= {"string"}


def typed(text: str, schema: Mapping[str, Any]) -> str:
    """A value as JSON text: what the schema makes of it, else the text itself."""
    allowed = kinds(schema)
    try:
        found = literal.to_json(text)
    except NotACall:
        return json_text.of(text)
    if "string" in allowed and not allowed & _kinds_of(json.loads(found)):
        return json_text.of(text)
    return found


def _kinds_of(found: Any) -> set[str]:
    if isinstance(found, bool):
        return {"boolean"}
    if isinstance(found, int | float):
        return {"integer", "number"} if isinstance(found, int) else {"number"}
    kinds_of: dict[type, set[str]] = {dict: {"object"}, list: {"array"}, str: {"string"}}
    return kinds_of.get(type(found), {"null"})
