"""What all forms of calls have in common."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from .lark import Function, Lark
from .reader import NotACall, Reader, Steps

Functions = Mapping[str, Function]


class Form(BaseModel):
    """How calls are written. A row gives the texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: tuple[str, ...] = ()
    """What begins a call, or a section of calls; the first is what the model should write."""
    end: str = ""
    short_ids: bool = False
    """The chat template takes ids of nine letters and digits only."""
    bare: str = ""
    """Characters with which an answer begins that may be a call without a mark."""

    @property
    def starts(self) -> tuple[str, ...]:
        """All that a call may begin with."""
        return self.start

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that may be special tokens, and which the parser must see."""
        return (*self.starts, self.end)

    def read(self, reader: Reader, mark: str, functions: Functions) -> Steps[None]:
        """Reads the calls behind a mark (empty: at the beginning), and what ends them.

        Raises:
            NotACall: there is none, and nothing was told.
        """
        try:
            yield from self.body(reader, mark, functions)
        except NotACall:
            if reader.undecided:
                raise
        if self.end:
            found = yield from reader.until((self.end, *self.starts), reader.say, markup=True)
            if found in self.starts:
                reader.back(found or "")

    @abstractmethod
    def body(self, reader: Reader, mark: str, functions: Functions) -> Steps[None]:
        """Reads the calls."""

    @abstractmethod
    def grammar(self, lark: Lark, functions: Sequence[Function], many: bool) -> str:
        """An expression for a call of one of these functions, or for several calls."""


def raw_arguments(reader: Reader, marks: Sequence[str]) -> Steps[None]:
    """Of a call whose arguments are broken: what the model wrote, up to a mark. Ends the call."""
    mark = yield from reader.until(tuple(filter(None, marks)), reader.argue)
    if mark is not None:
        reader.back(mark)
    reader.close()
