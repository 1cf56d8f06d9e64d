"""A conversation in the terminal: what ``fastchat-q run`` shows and understands. What it asks, ``client`` asks."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.status import Status

from .cli_common import printable, say
from .client import RECONNECTING, Api, RefusedError, ServerAwayError, ServerEvent, StreamedAnswer, told, whole_answer

EXIT_INTERRUPTED, EXIT_PIPE = 130, 141
FENCE = '"""'
HELP = f"""\
  {FENCE}               begins a text of several lines, and ends it
  /clear            forget the conversation
  /system TEXT      what the model is told before it; without TEXT: nothing
  /set NAME VALUE   a parameter of the API, such as temperature 0.2; without VALUE: the model's own
  /set              show what is set
  /help, /?         this
  /bye              end (also Ctrl-D); Ctrl-C ends an answer"""
OWN = frozenset(("messages", "model", "stream", "stream_options", "n", "tools", "tool_choice", "functions"))
"""Parameters that a conversation sets itself, or could not show."""


@dataclass(slots=True)
class Options:
    """What goes with every request."""

    model: str
    system: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Chat:
    """A conversation so far."""

    options: Options
    turns: list[dict[str, str]] = field(default_factory=list)

    def body(self, prompt: str) -> dict[str, Any]:
        """The request that goes on with it."""
        before = [{"role": "system", "content": self.options.system}] if self.options.system else []
        parameters = {name: value for name, value in self.options.parameters.items() if value is not None}
        messages = [*before, *self.turns, {"role": "user", "content": prompt}]
        return {"model": self.options.model, "messages": messages, **parameters}

    def said(self, prompt: str, answer: str) -> None:
        """A turn, with the answer as far as it came."""
        self.turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def one_answer(api: Api, chat: Chat, prompt: str, as_json: bool) -> int:
    """Prints the answer to one prompt; the exit code."""
    try:
        if as_json:
            print(json.dumps(whole_answer(api, chat.body(prompt)), indent=2, ensure_ascii=False))
        else:
            answer = StreamedAnswer(api, chat.body(prompt))
            with cancelled_if_left(answer):
                show(answer, print_text)
            print()
    except KeyboardInterrupt:
        print()
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    return 0


def converse(api: Api, chat: Chat) -> int:
    """A conversation until its end; the exit code."""
    api.get(f"/v1/models/{quote(chat.options.model, safe='/')}")  # what is wrong is said before anything is typed
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history for input()
    print(f"{printable(chat.options.model)} at {api.server.url}. /help says what can be done, /bye ends.")
    for prompt in prompts():
        if prompt.startswith("/"):
            if not command(chat, prompt):
                break
            continue
        answer = StreamedAnswer(api, chat.body(prompt))
        text: list[str] = []

        def hear(piece: str, text: list[str] = text) -> None:
            text.append(piece)
            print_text(piece)

        try:
            with cancelled_if_left(answer):
                show(answer, hear)
        except KeyboardInterrupt:
            pass
        except (RefusedError, ServerAwayError) as error:
            say(f"! {told(error)}")
            if not text:
                continue
        if text:
            chat.said(prompt, "".join(text))
        print("\n")
    return 0


@contextlib.contextmanager
def cancelled_if_left(answer: StreamedAnswer) -> Iterator[None]:
    """Whoever stops reading wants no more of it."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        answer.cancel()
        raise


class Screen:
    """What is shown of an answer beside its text: a line that says what it waits for, thoughts, why it ended."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status: Status | None = None
        self._thinks = False
        self.spoke = False
        """Something of the answer is there."""

    def waits(self, words: str) -> None:
        """Shows a line until something else is shown."""
        if not self._console.is_terminal:
            return
        if self._status is None:
            self._status = self._console.status(words)
            self._status.start()
        self._status.update(words)

    def speaks(self) -> None:
        """Takes that line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def thought(self, text: str) -> None:
        """A piece of what the model thinks: for people only."""
        self.speaks()
        self.spoke = True
        if self._console.is_terminal:
            self._thinks = True
            self._console.print(printable(text), end="", style="dim", markup=False, highlight=False, soft_wrap=True)

    def answers(self) -> None:
        """The text itself follows."""
        self.speaks()
        self.spoke = True
        if self._thinks:
            self._thinks = False
            self._console.print("\n")


def show(answer: StreamedAnswer, hear: Callable[[str], None]) -> None:
    """Hands on the text of an answer as it comes, with its place in the queue shown until then."""
    screen = Screen()
    screen.waits("…")
    try:
        for event in answer:
            if event.data is None:
                if event.comment == RECONNECTING or not screen.spoke:
                    screen.waits(waiting(event))
                continue
            for choice in json.loads(event.data)["choices"]:
                if thought := choice["delta"].get("reasoning_content"):
                    screen.thought(thought)
                if text := choice["delta"].get("content"):
                    screen.answers()
                    hear(text)
                if choice.get("finish_reason") == "length":
                    screen.speaks()
                    say("\n(cut: --max-tokens or the model's context allow no more)")
    finally:
        screen.speaks()


def waiting(event: ServerEvent) -> str:
    """What a comment says, for people."""
    if event.comment == RECONNECTING:
        return "the server is gone; trying to go on where it was …"
    found = re.match(r"queued position=(\d+)(?: eta=([\d.]+))?", event.comment or "")
    if found is None:
        return "…"
    eta = f", about {float(found[2]):.0f} s" if found[2] else ""
    return f"waiting: place {found[1]} in the queue{eta}"


def print_text(text: str) -> None:
    """A piece of an answer; on a terminal, without what would drive it."""
    if sys.stdout.isatty():
        text = "".join(part if part in "\n\t" else printable(part) for part in re.split(r"([\n\t])", text))
    print(text, end="", flush=True)


def prompts() -> Iterator[str]:
    """What a person types, until the end of input."""
    while True:
        try:
            line = input(">>> ")
            if line.strip().startswith(FENCE):
                line = _several_lines(line.strip().removeprefix(FENCE))
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /bye ends)")
            continue
        except EOFError:
            print()
            return
        if line.strip():
            yield line.strip()


def _several_lines(first: str) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(FENCE):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines)


def command(chat: Chat, line: str) -> bool:
    """Does what a line with a slash asks for; false: the conversation is over."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/bye", "/exit", "/quit"):
        return False
    if name in ("/help", "/?"):
        print(HELP)
    elif name == "/clear":
        chat.turns.clear()
        print("The conversation is forgotten.")
    elif name == "/system":
        chat.options.system = rest or None
        print("Set." if rest else "The model is told nothing before the conversation.")
    elif name == "/set":
        print(setting(chat.options.parameters, rest))
    else:
        print(f"{printable(name)} is no command. /help lists them.")
    return True


def setting(parameters: dict[str, Any], words: str) -> str:
    """Sets a parameter of the requests to come; what to say about it. Whether it is one, the server knows."""
    name, _, value = words.partition(" ")
    if not name:
        given = {name: value for name, value in parameters.items() if value is not None}
        return "\n".join(f"  {name} {json.dumps(value)}" for name, value in given.items()) or "Nothing is set."
    if not name.isidentifier() or name in OWN:
        return f"{printable(name)} cannot be set here."
    if not value.strip():
        parameters.pop(name, None)
        return f"{name}: as the model has it."
    try:
        parameters[name] = json.loads(value)
    except ValueError:
        parameters[name] = value.strip()
    return f"{name} = {json.dumps(parameters[name])}"
