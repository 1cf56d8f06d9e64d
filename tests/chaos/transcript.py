"""What one client got of one job, checked event by event for what a client can see by itself."""

import io
import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from .engine import TOKEN
from .wire import Event

Intent = Literal["read", "leave", "cancel", "detach", "poison"]
"""What the client means to do: read to the end; hang up for good; have it cancelled; hang up from a job that is to go
on; have it kill its worker."""


class BrokenStreamError(Exception):
    """The stream broke a promise; the message says which."""


@dataclass(slots=True)
class Transcript:
    """The tokens and the end, over all connections."""

    scenario: str
    intent: Intent
    bearer: str = field(repr=False)
    """The API key."""
    length: int
    """Tokens that the job must have in the end."""
    job_id: str = ""
    """The public id; empty: never learnt."""
    seen: int = 0
    last_id: int | None = None
    end: str = ""
    """``done``, or the code of an error; empty: not yet."""
    resumes: int = 0
    away_s: float = 0.0
    """The longest time without a connection."""
    pause_s: float = 0.0
    """The longest time between two events, the first excluded."""
    heard: float = 0.0
    broken: bool = False
    known: bool = False
    """It has a job."""
    _text: io.StringIO = field(default_factory=io.StringIO, repr=False)
    _finished: bool = False

    @property
    def text(self) -> str:
        """All that was said."""
        return self._text.getvalue()

    def feed(self, event: Event) -> None:
        """Takes an event of a stream.

        Raises:
            BrokenStreamError: it does not continue what was there.
        """
        now = time.monotonic()
        if self.heard:
            self.pause_s = max(self.pause_s, now - self.heard)
        self.heard = now
        if self.end:
            raise BrokenStreamError(f"event {event.id} after the end")
        if event.id is None:
            self._take_error(event)
            return
        if self.last_id is not None and event.id <= self.last_id:
            raise BrokenStreamError(f"event id {event.id} after {self.last_id}")
        self.last_id = event.id
        if event.data == "[DONE]":
            if not self._finished:
                raise BrokenStreamError("[DONE] without a finish reason")
            self._expect(event, 3)
            self.end = "done"
            return
        chunk = json.loads(event.data)
        if "error" in chunk:
            raise BrokenStreamError(f"an error with an id: {event.data[:200]}")
        if not chunk["choices"]:
            self._expect(event, 2)
        elif chunk["choices"][0]["finish_reason"]:
            self._expect(event, 1)
            self._finished = True
        else:
            self._take(event, chunk["choices"][0]["delta"]["content"])

    def feed_whole(self, completion: dict[str, Any]) -> None:
        """Takes the answer of a request without ``stream``.

        Raises:
            BrokenStreamError: it is not whole.
        """
        self.take_text(completion["choices"][0]["message"]["content"])
        used = completion["usage"]["completion_tokens"]
        if used != self.seen:
            raise BrokenStreamError(f"usage says {used} tokens, the answer has {self.seen}")
        self.end = "done"

    def take_text(self, text: str) -> None:
        """More tokens.

        Raises:
            BrokenStreamError: not the next ones.
        """
        for token in text.split():
            match = TOKEN.fullmatch(token)
            if match is None or int(match[1]) != self.seen + 1:
                raise BrokenStreamError(f"token {token!r} after {self.seen} tokens")
            self.seen += 1
        self._text.write(text)

    def _take(self, event: Event, text: str) -> None:
        self.take_text(text)
        if event.id != self.seen:
            raise BrokenStreamError(f"event id {event.id} on token {self.seen}")

    def _take_error(self, event: Event) -> None:
        chunk = {} if event.data == "[DONE]" else json.loads(event.data)
        if "error" not in chunk:
            raise BrokenStreamError(f"an event without an id after {self.last_id}: {event.data[:200]}")
        self.end = str(chunk["error"]["code"])

    def _expect(self, event: Event, behind: int) -> None:
        if event.id != self.seen + behind:
            raise BrokenStreamError(f"event id {event.id} on the end of {self.seen} tokens: {event.data[:200]}")
