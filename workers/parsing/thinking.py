"""Reasoning before the content, between marks or behind words that announce it."""

from pydantic import BaseModel, ConfigDict

from .lark import Lark
from .reader import Reader, Steps


class Thinking(BaseModel):
    """How reasoning is written. A row gives the texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: tuple[str, ...]
    end: tuple[str, ...]
    assumed: bool = False
    """An answer begins with reasoning even if nothing says so: its mark is in most prompts."""
    breaks: tuple[str, ...] = ()
    """What ends the reasoning without being its end, as calls do."""
    drop: tuple[str, ...] = ()
    """Marks around the content."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that may be special tokens, and which the parser must see."""
        return (*self.start, *self.end, *self.breaks, *self.drop)

    def is_open(self, written: str) -> bool | None:
        """Whether a prompt that ends like this has begun the reasoning; False: it has ended it; None: neither."""
        tail = written.rstrip()
        if tail.endswith(self.start):
            return True
        return False if tail.endswith(self.end) else None

    def read(self, reader: Reader, is_open: bool | None) -> Steps[None]:
        """Reads the reasoning, if there is any."""
        reader.begin()
        yield from reader.space()
        started = yield from reader.expect(*self.start)
        if started is None and not (is_open or (self.assumed and is_open is None)):
            reader.no_call()
            return
        reader.decided()
        reader.turn()
        mark = yield from reader.until((*self.end, *self.breaks), reader.think)
        if mark in self.breaks:
            reader.back(mark or "")
        if mark is not None:
            reader.turn()

    def grammar(self, lark: Lark, is_open: bool | None) -> str:
        """An expression for the reasoning; empty where the prompt has it already."""
        if is_open is False:
            return ""
        if is_open or self.assumed:
            return rf"{lark.up_to(self.end[0], *self.end[1:], *self.breaks)} /\n{{0,2}}/"
        return rf"({lark.text(self.start[0])} {lark.up_to(self.end[0], *self.end[1:], *self.breaks)} /\n{{0,2}}/)?"
