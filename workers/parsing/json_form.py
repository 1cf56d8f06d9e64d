"""Calls as JSON objects: ``<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>``, or lists of them."""

import json
from collections.abc import Sequence
from typing import Literal

from . import json_text
from .form import Form, Functions, raw_arguments
from .lark import Function, Lark
from .reader import NotACall, Reader, Steps


class JsonForm(Form):
    """Objects with a name and arguments."""

    form: Literal["json"] = "json"
    name: str = "name"
    arguments: tuple[str, ...] = ("arguments", "parameters")
    """The key of the arguments; the first is what the model should write."""
    keyed: bool = False
    """The object is ``{name: arguments}``."""
    listed: bool = False
    """Calls are written as a list, even a single one."""
    separator: str = ""
    """What stands between calls that are no list and have no marks."""

    def body(self, reader: Reader, mark: str, functions: Functions) -> Steps[None]:
        while True:
            yield from reader.space()
            if (yield from reader.need("[", "{")) == "{":
                yield from self._object(reader, mark)
            else:
                yield from self._list(reader, mark)
            if not self.separator:
                return
            yield from reader.space()
            if (yield from reader.expect(self.separator)) is None:
                return
            reader.begin(self.separator)

    def _list(self, reader: Reader, mark: str) -> Steps[None]:
        while True:
            yield from reader.space()
            yield from reader.need("{")
            yield from self._object(reader, mark)
            yield from reader.space()
            if (yield from reader.need(",", "]")) == "]":
                return
            reader.begin(",")

    def _object(self, reader: Reader, mark: str) -> Steps[None]:
        name, held, begun = None, None, False
        while True:
            yield from reader.space()
            key = yield from json_text.read_string(reader)
            yield from reader.space()
            yield from reader.need(":")
            yield from reader.space()
            if self.keyed and not begun:
                begun = yield from self._tell(reader, key)
            elif key == self.name and name is None and not self.keyed:
                name = yield from json_text.read_string(reader)
                if held is not None:
                    reader.call(name)
                    reader.argue(held)
                    begun = True
            elif key in self.arguments and not begun and held is None:
                if name is None:
                    held = _object_text((yield from json_text.read(reader)))
                else:
                    begun = yield from self._tell(reader, name)
            else:
                yield from json_text.read(reader)
            yield from reader.space()
            if (yield from reader.need(",", "}")) == "}":
                break
        if not begun:
            if not name or not mark:  # without a mark, a name alone says too little
                raise NotACall
            reader.call(name)
            reader.argue("{}")
        reader.close()

    def _tell(self, reader: Reader, name: str) -> Steps[bool]:
        """Reads the arguments of a call and tells it."""
        if not name:
            raise NotACall
        if (yield from reader.peek()) != "{":
            held = _object_text((yield from json_text.read(reader)))
            reader.call(name)
            reader.argue(held)
            return True
        reader.call(name)
        try:
            yield from json_text.value(reader, reader.argue)
        except NotACall:
            yield from raw_arguments(reader, (self.end, *self.starts))
            raise
        return True

    def grammar(self, lark: Lark, functions: Sequence[Function], many: bool) -> str:
        calls = [self._call(lark, function) for function in functions]
        start, end = lark.text(self.start[0] if self.start and not self.bare else ""), lark.text(self.end)
        if self.listed:
            return f'{start} "[" {lark.calls(calls, many, lark.text(", "))} "]" {end}'
        if self.separator:
            return f"{start} {lark.calls(calls, many, lark.text(self.separator + ' '))} {end}"
        blank = r"/\n?/" if self.end else ""
        wrapped = [f"{start} {blank} {call} {blank} {end}" for call in calls]
        return lark.calls(wrapped, many, r"/\n?/")

    def _call(self, lark: Lark, function: Function) -> str:
        if self.keyed:
            return f'{lark.text("{" + json_text.of(function.name) + ": ")} {lark.arguments(function)} "}}"'
        name, arguments = json_text.of(self.name), json_text.of(self.arguments[0])
        head = lark.text(f"{{{name}: {json_text.of(function.name)}, {arguments}: ")
        return f'{head} {lark.arguments(function)} "}}"'


def _object_text(text: str) -> str:
    """Arguments as an object: some models write it as text, or null for nothing.

    Raises:
        NotACall: it is none.
    """
    found = json.loads(text)
    if isinstance(found, str):
        try:
            found, text = json.loads(found), found
        except (ValueError, RecursionError):
            raise NotACall from None
    if found is None:
        return "{}"
    if not isinstance(found, dict):
        raise NotACall
    return text
