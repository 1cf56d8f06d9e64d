"""Text as it comes in, read by generators that pause where it ends, and what they say about it.

A parser is written as if it had the whole text: ``mark = yield from reader.until(marks, reader.say)``. What it says
does not depend on how the text is cut.
"""

from collections.abc import Callable, Generator
from typing import Literal, TypeVar

from fastchat_q.events import ToolCallDelta

from .parts import Parts

T = TypeVar("T")
Steps = Generator[None, None, T]
Show = Callable[[str], None]

LONGEST_NAME = 256


class NotACall(Exception):  # noqa: N818 (it is no error: the text is something else)
    """This only looked like a call."""


class Over(Exception):  # noqa: N818
    """The answer ends here."""


class Reader:
    """One answer's text, and the parts that it turns out to be.

    Args:
        call_id: makes the id of a call from its number and name.
        single: the answer is over with its first call.
        forced: there is nothing but calls and reasoning; what is neither is a call that was cut off.
    """

    def __init__(self, call_id: Callable[[int, str], str], single: bool, forced: bool = False) -> None:
        self.unread = ""
        self.ended = False
        self.over = False
        self._call_id, self._single, self._forced = call_id, single, forced
        self._taken: list[str] | None = None
        self._parts = Parts()
        self._calls = 0
        self._space = ""
        self._space_of: Literal["text", "reasoning"] = "text"
        self._at_edge = False

    # The text

    def take(self, size: int) -> str:
        """Reads so many characters that are there."""
        text, self.unread = self.unread[:size], self.unread[size:]
        if self._taken is not None:
            self._taken.append(text)
        return text

    def back(self, text: str) -> None:
        """Gives back what was read last."""
        self.unread = text + self.unread
        if self._taken is not None:
            self._taken.append("")
            self._taken = ["".join(self._taken).removesuffix(text)]

    def more(self) -> Steps[bool]:
        """Waits for more text; False: there will be none."""
        if self.ended:
            return False
        yield
        return True

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        while not self.unread:
            if not (yield from self.more()):
                return ""
        return self.unread[0]

    def space(self) -> Steps[str]:
        """Reads white space."""
        read = ""
        while True:
            read += self.take(len(self.unread) - len(self.unread.lstrip()))
            if self.unread or not (yield from self.more()):
                return read

    def expect(self, *options: str) -> Steps[str | None]:
        """Reads the one of these that comes next; None: it is something else, which is not read."""
        while True:
            for option in options:
                if self.unread.startswith(option):
                    return self.take(len(option))
            if not any(option.startswith(self.unread) for option in options) or not (yield from self.more()):
                return None

    def need(self, *options: str) -> Steps[str]:
        """The same, of what has to come.

        Raises:
            NotACall: something else does.
        """
        found = yield from self.expect(*options)
        if found is None:
            raise NotACall
        return found

    def until(self, marks: tuple[str, ...], show: Show, *, markup: bool = False) -> Steps[str | None]:
        """Shows what comes before a mark, and reads the mark; None: none came.

        Args:
            markup: the beginning of a mark at the end of the text is no text either.
        """
        while True:
            found = [(at, mark) for mark in marks if (at := self.unread.find(mark)) >= 0]
            if found:
                at, mark = min(found)
                show(self.take(at))
                return self.take(len(mark))
            show(self.take(len(self.unread) - (0 if self.ended and not markup else _held(self.unread, marks))))
            if not (yield from self.more()):
                if markup:
                    self.take(len(self.unread))
                return None

    def name(self, marks: tuple[str, ...]) -> Steps[tuple[str, str]]:
        """Reads a name and the mark behind it.

        Raises:
            NotACall: it is too long or too strange for a name.
        """
        read: list[str] = []

        def hold(text: str) -> None:
            read.append(text)
            if sum(map(len, read)) > LONGEST_NAME or "\n" in "".join(read).strip():
                raise NotACall

        mark = yield from self.until(marks, hold)
        name = "".join(read).strip()
        if mark is None or not name:
            raise NotACall
        return name, mark

    # What it may still turn out not to be

    def begin(self, mark: str = "") -> None:
        """From here on, what is read may be a call; the mark was read already."""
        self._taken = [mark]

    @property
    def undecided(self) -> bool:
        """Whether it may still be none."""
        return self._taken is not None

    def decided(self) -> None:
        """What was read is a mark, and not shown."""
        self._taken = None

    @property
    def cut(self) -> bool:
        """Whether the text ended where more had to come."""
        return self.ended and not self.unread

    def no_call(self) -> None:
        """It was none: what was read for one is content."""
        if self._taken is not None:
            taken, self._taken = "".join(self._taken), None
            self.say(taken)

    # What it says

    def say(self, text: str) -> None:
        """Content. White space around calls and behind reasoning is none."""
        if not self._forced:
            self._show("text", text)

    def think(self, text: str) -> None:
        """Reasoning, without the white space around it."""
        self._show("reasoning", text)

    def _show(self, field: Literal["text", "reasoning"], text: str) -> None:
        if not text:
            return
        text = self._space + text
        shown = text.rstrip()
        self._space_of, self._space = field, "" if self._at_edge and not shown else text[len(shown) :]
        if shown:
            shown = shown.lstrip() if self._at_edge else shown
            self._at_edge = False
            self._add(field, shown)

    def _add(self, field: Literal["text", "reasoning"], text: str) -> None:
        if field == "text":
            self._parts = self._parts._replace(text=self._parts.text + text)
        else:
            self._parts = self._parts._replace(reasoning=self._parts.reasoning + text)

    def turn(self) -> None:
        """Here something ends or begins: the white space around means nothing."""
        self._space, self._at_edge = "", True

    def call(self, name: str, call_id: str | None = None) -> None:
        """A call begins; it is one now, whatever comes."""
        self._taken = None
        self.turn()
        self._tell(ToolCallDelta(self._calls, "", call_id or self._call_id(self._calls, name), name))
        self._calls += 1

    def argue(self, text: str) -> None:
        """Arguments of the call, as JSON text."""
        if text:
            self._tell(ToolCallDelta(self._calls - 1, text))

    def close(self) -> None:
        """The call is complete.

        Raises:
            Over: the answer is over with it.
        """
        if self._single:
            raise Over

    def _tell(self, delta: ToolCallDelta) -> None:
        told = self._parts.tool_calls
        if told and told[-1].call == delta.call:
            told, delta = told[:-1], told[-1]._replace(arguments=told[-1].arguments + delta.arguments)
        self._parts = self._parts._replace(tool_calls=(*told, delta))

    def end(self) -> None:
        """Nothing more comes."""
        self.no_call()
        self._add(self._space_of, self._space)
        self._space = ""

    def told(self) -> Parts:
        """What was said since the last time."""
        parts, self._parts = self._parts._replace(over=self.over), Parts()
        return parts


def _held(text: str, marks: tuple[str, ...]) -> int:
    """How much of the end of the text may become a mark."""
    for size in range(min(len(text), max(map(len, marks), default=0) - 1), 0, -1):
        tail = text[-size:]
        if any(mark.startswith(tail) for mark in marks):
            return size
    return 0
