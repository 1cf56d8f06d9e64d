"""gpt-oss' messages: each has a channel, and perhaps a recipient.

``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f
<|constrain|>json<|message|>{…}<|call|>``. See https://cookbook.openai.com/articles/openai-harmony.
"""

import re
from collections.abc import Sequence
from typing import Literal

from . import json_text
from .form import Form, Functions
from .lark import Function, Lark
from .reader import NotACall, Reader, Show, Steps

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
HEADS = (START, CHANNEL, " to=", "to=", MESSAGE)
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
NAME_OF_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyForm(Form):
    """The whole of such an answer: reasoning, content and calls."""

    form: Literal["harmony"] = "harmony"

    @property
    def marks(self) -> tuple[str, ...]:
        return (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)

    def body(self, reader: Reader, mark: str, functions: Functions) -> Steps[None]:
        raise NotACall

    def answer(self, reader: Reader, with_calls: bool) -> Steps[None]:
        """Reads all messages of an answer."""
        while (yield from reader.peek()):
            head: list[str] = []
            reader.begin()
            first = yield from reader.expect(*HEADS)
            if first is None:
                reader.no_call()  # text without a head
                yield from _body(reader, reader.say)
                continue
            if first != MESSAGE and (yield from reader.until((MESSAGE,), head.append)) is None:
                reader.decided()  # a head that was cut off is no text
                return
            yield from self._message(reader, first + "".join(head), with_calls)

    def _message(self, reader: Reader, head: str, with_calls: bool) -> Steps[None]:
        channel, recipient = NAME_OF_CHANNEL.search(head), RECIPIENT.search(head)
        if recipient is not None and with_calls:
            reader.call(recipient[1].removeprefix("functions."))
            try:
                yield from json_text.value(reader, reader.argue)
            except NotACall:
                yield from _body(reader, reader.argue)
                reader.close()
            else:
                reader.close()
                yield from _body(reader, reader.say)
            return
        reader.decided()
        reader.turn()
        reasons = recipient is not None or (channel is not None and channel[1] == "analysis")
        yield from _body(reader, reader.think if reasons else reader.say)
        reader.turn()

    def grammar(self, lark: Lark, functions: Sequence[Function], many: bool) -> str:
        calls = [
            f"{lark.text(f'{CHANNEL}commentary to=functions.{function.name} {CONSTRAIN}json{MESSAGE}')} "
            f"{lark.arguments(function)}"
            for function in functions
        ]
        return lark.calls(calls, False)

    def thinking(self, lark: Lark) -> str:
        """An expression for reasoning, and what begins the next message."""
        analysis = lark.up_to(ENDS[0], *ENDS[1:], START)
        return f"({lark.text(CHANNEL + 'analysis' + MESSAGE)} {analysis} {lark.text(START + 'assistant')})?"

    def final(self, lark: Lark) -> str:
        """An expression for the head of an answer."""
        return lark.text(f"{CHANNEL}final{MESSAGE}")


def _body(reader: Reader, show: Show) -> Steps[None]:
    """Reads a message to its end."""
    mark = yield from reader.until((*ENDS, START), show)
    if mark == START:
        reader.back(mark)
