"""Calls as a name and JSON arguments between marks: ``<|call|>f<|sep|>{"a": 1}<|end|>``."""

import re
from collections.abc import Sequence
from typing import Literal

from . import json_text
from .form import Form, Functions, raw_arguments
from .json_form import JsonForm
from .lark import Function, Lark
from .reader import NotACall, Reader, Steps

OBJECT = "{"


class NamedForm(Form):
    """Names with arguments behind them. ``start`` and ``end`` are of a section, if ``call`` begins its calls."""

    form: Literal["named"] = "named"
    call: str = ""
    call_end: str = ""
    prefix: str = ""
    """Before the name."""
    separators: tuple[str, ...] = (OBJECT,)
    """Behind the name; ``{`` is the beginning of the arguments themselves."""
    id_mark: str = ""
    """Instead of a separator: an id, and then the first separator."""
    fence: str = ""
    """Behind the arguments."""
    numbered: bool = False
    """The name is ``functions.NAME:NUMBER``, and this is also the call's id."""
    or_json: bool = False
    """The model may as well write a JSON list."""
    between: str = ""
    """Between the calls of a section."""

    @property
    def starts(self) -> tuple[str, ...]:
        return (*self.start, self.call) if self.call else self.start

    @property
    def marks(self) -> tuple[str, ...]:
        names = (self.prefix, *self.separators, self.id_mark, self.fence)
        return (*self.starts, self.end, self.call_end, *names)

    def body(self, reader: Reader, mark: str, functions: Functions) -> Steps[None]:
        if self.or_json and (yield from _begins_json(reader)):
            yield from JsonForm().body(reader, mark, functions)
            return
        if mark != self.call and self.call:
            yield from reader.space()
            yield from reader.need(self.call)
        while True:
            yield from self._call(reader)
            if not self.call:
                return
            yield from reader.space()
            if self.end and (yield from reader.expect(self.end)):
                reader.back(self.end)
                return
            yield from reader.need(self.call)
            reader.begin(self.call)

    def _call(self, reader: Reader) -> Steps[None]:
        yield from reader.space()
        if self.prefix:
            yield from reader.need(self.prefix)
        own_id = None
        marks = (*self.separators, self.id_mark) if self.id_mark else self.separators
        name, mark = yield from reader.name(marks)
        if mark == self.id_mark and self.id_mark:
            own_id, mark = yield from reader.name(self.separators[:1])
        if mark == OBJECT:
            reader.back(mark)
        if self.numbered:
            own_id, name = name, re.sub(r":\d+$", "", name).removeprefix("functions.")
        yield from reader.space()
        if (yield from reader.peek()) != "{":
            raise NotACall
        reader.call(name, own_id)
        try:
            yield from json_text.value(reader, reader.argue)
        except NotACall:
            yield from raw_arguments(reader, (self.call_end, self.end, *self.starts))
        else:
            reader.close()
        yield from reader.space()
        if self.fence and (yield from reader.expect(self.fence)):
            yield from reader.space()
        if self.call_end:
            yield from reader.need(self.call_end)

    def grammar(self, lark: Lark, functions: Sequence[Function], many: bool) -> str:
        calls = [self._grammar_of(lark, function) for function in functions]
        if not self.call:
            return lark.calls(calls, many)
        inner = lark.calls(calls, many, lark.text(self.between))
        return f"{lark.text(self.start[0]) if self.start else ''} {inner} {lark.text(self.end)}"

    def _grammar_of(self, lark: Lark, function: Function) -> str:
        begin = (self.call or self.start[0]) + self.prefix
        separator = "" if self.separators[0] == OBJECT else self.separators[0]
        if self.numbered:
            head = f"{lark.text(begin + 'functions.' + function.name + ':')} /[0-9]/ {lark.text(separator)}"
        else:
            head = lark.text(begin + function.name + separator)
        fence = r"/\n/ " + lark.text(self.fence) if self.fence else ""
        ends = self.call_end if self.call else self.end
        return f"{head} {lark.arguments(function)} {fence} {lark.text(ends)}"


def _begins_json(reader: Reader) -> Steps[bool]:
    yield from reader.space()
    return (yield from reader.peek()) in ("[", "{")
