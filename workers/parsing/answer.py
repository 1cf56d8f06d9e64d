"""One answer, taken apart: reasoning first, then content and calls. And the formats that there are."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fastchat_q.errors import ConfigurationError
from fastchat_q.jobs import Feature

from .form import Form
from .harmony import HarmonyForm
from .json_form import JsonForm
from .lark import Function, Lark
from .loose_form import LooseForm
from .named_form import NamedForm
from .parts import Parts
from .python_form import PythonForm
from .reader import NotACall, Over, Reader, Steps
from .thinking import Thinking
from .xml_form import XmlForm

AnyForm = Annotated[JsonForm | NamedForm | XmlForm | PythonForm | LooseForm | HarmonyForm, Field(discriminator="form")]


class _Rows(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tools: dict[str, AnyForm]
    reasoning: dict[str, Thinking | HarmonyForm]


@dataclass(frozen=True, slots=True)
class Format:
    """How a model writes calls and reasoning; None: it has no such thing, or nothing is known of it."""

    calls: Form | None = None
    thinking: Thinking | HarmonyForm | None = None

    @property
    def features(self) -> tuple[Feature, ...]:
        """What a model of this format can do."""
        calls: tuple[Feature, ...] = ("tools",) if self.calls is not None else ()
        return (*calls, "reasoning") if self.thinking is not None else calls

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that may be special tokens, and which the parser must see."""
        found = [part.marks for part in (self.calls, self.thinking) if part is not None]
        return tuple(mark for marks in found for mark in marks if mark)

    def is_open(self, prompt: str) -> bool | None:
        """Whether a prompt that ends like this has begun the reasoning; see `Thinking.is_open`."""
        return self.thinking.is_open(prompt) if isinstance(self.thinking, Thinking) else None

    def grammar(
        self,
        functions: Sequence[Function],
        many: bool,
        is_open: bool | None,
        tokens: Mapping[str, int],
    ) -> str:
        """A grammar in which one of these functions is called, or several calls are made, after the reasoning.

        Args:
            tokens: those that the tokenizer keeps whole.
        """
        assert self.calls is not None
        lark = Lark(tokens)
        calls = self.calls.grammar(lark, functions, many)
        return lark.grammar(f"{self._reasoning(lark, is_open)} {calls}")

    def before(
        self,
        is_open: bool | None,
        tokens: Mapping[str, int],
        functions: Sequence[Function] = (),
        many: bool = True,
    ) -> str:
        """A grammar of what comes before an answer that is constrained: reasoning, and then ``@answer``; or empty.

        Args:
            functions: in the place of the answer one of these may be called, or several calls be made.
        """
        lark = Lark(tokens)
        reasoning, answer = self._reasoning(lark, is_open), "@answer"
        if isinstance(self.thinking, HarmonyForm):
            answer = f"{self.thinking.final(lark)} {answer}"
        if functions and self.calls is not None:
            answer = f"({self.calls.grammar(lark, functions, many)} | {answer})"
        return lark.grammar(f"{reasoning} {answer}") if reasoning or answer != "@answer" else ""

    def _reasoning(self, lark: Lark, is_open: bool | None) -> str:
        if self.thinking is None:
            return ""
        if isinstance(self.thinking, HarmonyForm):
            return self.thinking.thinking(lark)
        return self.thinking.grammar(lark, is_open)


@cache
def _rows() -> _Rows:
    text = files(__package__).joinpath("formats.toml").read_text(encoding="utf-8")
    return _Rows.model_validate(tomllib.loads(text))


def format_of(tool_parser: str | None, reasoning_parser: str | None) -> Format:
    """The format of these names; None or ``none``: nothing of that kind.

    Raises:
        ConfigurationError: there is no such parser.
    """
    rows = _rows()
    tool_parser, reasoning_parser = (None if name == "none" else name for name in (tool_parser, reasoning_parser))
    for option, name, known in (
        ("--tool-call-parser", tool_parser, rows.tools),
        ("--reasoning-parser", reasoning_parser, rows.reasoning),
    ):
        if name is not None and name not in known:
            raise ConfigurationError(f"{option} {name}: there is no such parser. Known are {', '.join(sorted(known))}.")
    return Format(
        rows.tools[tool_parser] if tool_parser is not None else None,
        rows.reasoning[reasoning_parser] if reasoning_parser is not None else None,
    )


class Answer:
    """The parser of one answer. See `Parser` for the contract.

    Args:
        functions: what may be called; empty: no calls are looked for.
        is_open: see `Format.is_open`.
        call_id: makes the id of a call from its number and name.
        single: the answer is over with its first call.
        forced: a grammar lets the model write nothing but calls and reasoning.
    """

    def __init__(
        self,
        written: Format,
        functions: Sequence[Function],
        is_open: bool | None,
        call_id: Callable[[int, str], str],
        single: bool = False,
        forced: bool = False,
    ) -> None:
        self._format, self._is_open = written, is_open
        self._functions = {function.name: function for function in functions}
        self._reader = Reader(call_id, single, forced)
        self._steps = self._read()

    def feed(self, text: str) -> Parts:
        """What this text completes."""
        if text and not self._reader.over:
            self._reader.unread += text
            self._go()
        return self._reader.told()

    def flush(self) -> Parts:
        """What was held back at the end."""
        self._reader.ended = True
        self._go()
        if not self._reader.over:
            self._reader.end()
        return self._reader.told()

    def _go(self) -> None:
        try:
            next(self._steps)
        except Over:
            self._reader.over = True
        except StopIteration:
            pass

    def _read(self) -> Steps[None]:
        reader, form, thinking = self._reader, self._format.calls, self._format.thinking
        harmony = next((part for part in (form, thinking) if isinstance(part, HarmonyForm)), None)
        if harmony is not None:
            yield from harmony.answer(reader, bool(self._functions))
            return
        drop: tuple[str, ...] = ()
        if isinstance(thinking, Thinking):
            if self._is_open is not False:
                yield from thinking.read(reader, self._is_open)
            drop = thinking.drop
        form = form if self._functions else None
        if form is not None and form.bare:
            yield from self._bare(form)
        marks = (*(form.starts if form is not None else ()), *drop)
        while (mark := (yield from reader.until(marks, reader.say))) is not None:
            if mark in drop:
                reader.turn()
            elif form is not None:
                yield from self._call(form, mark)

    def _bare(self, form: Form) -> Steps[None]:
        """Reads calls that begin an answer without a mark."""
        self._reader.begin()
        yield from self._reader.space()
        first = yield from self._reader.peek()
        if first and first in form.bare:
            yield from self._call(form, "")
        self._reader.no_call()

    def _call(self, form: Form, mark: str) -> Steps[None]:
        if mark:
            self._reader.begin(mark)
        try:
            yield from form.read(self._reader, mark, self._functions)
        except NotACall:
            if mark and self._reader.cut:  # a call that was begun is no text
                self._reader.decided()
                self._reader.turn()
            self._reader.no_call()
        self._reader.decided()
