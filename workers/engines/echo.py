"""The engine without a model: repeats the last user message, a token a word. For load tests, and without torch."""

import heapq
import re
import time
from dataclasses import dataclass

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import FinishReason, Piece, Usage
from fastchat_q.registry import ModelCard

from .base import Ended, Engine, Output, Request
from .processing.text import StopMatcher

WORD = re.compile(r"\s*\S+|\s+$")


@dataclass(slots=True)
class _Row:
    ticket: str
    words: list[str]
    """The answer; a token's id is its index."""
    limit: int
    prompt_tokens: int
    stop: StopMatcher
    endless: bool
    """ignore_eos: starts over until the limit."""
    done: int = 0

    def advance(self) -> Output:
        """The next word."""
        shown, stopped = self.stop.feed(self.words[self.done % len(self.words)])
        self.done += 1
        reason: FinishReason | None = None
        if stopped or (self.done == len(self.words) and not self.endless):
            reason = "stop"
        elif self.done >= self.limit:
            reason = "length"
        if reason is None:
            return Output(self.ticket, (Piece((self.done - 1,), shown),))
        if not stopped:
            shown += self.stop.flush()
        ended = Ended(Usage(self.prompt_tokens, self.done), reason, stop=self.stop.found)
        return Output(self.ticket, (Piece((self.done - 1,), shown),), ended)


class EchoEngine(Engine):
    """Every row gets its first word at once, then one every ``token_delay_s``."""

    def __init__(self, name: str, slots: int, token_delay_s: float) -> None:
        super().__init__(ModelCard(name, "echo", None, int(time.time())), slots)
        self._delay_s = token_delay_s
        self._rows: dict[str, _Row] = {}
        self._due: list[tuple[float, int, _Row]] = []  # heap: when, tie-break, row
        self._count = 0
        self._replayed: list[Output] = []

    def admit(self, request: Request) -> None:
        row = _row(request)
        for _ in request.prior_ids():  # a resumed job goes on where its log ends
            last = row.advance()
            if last.ended is not None:
                self._replayed.append(Output(row.ticket, ended=last.ended))
                return
        self._rows[row.ticket] = row
        self._schedule(row, time.monotonic())

    def drop(self, ticket: str) -> None:
        self._replayed = [output for output in self._replayed if output.ticket != ticket]
        self._rows.pop(ticket, None)  # its place in the heap is skipped when it comes up

    def wait_s(self) -> float | None:
        if self._replayed:
            return 0.0
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def step(self) -> list[Output]:
        outputs, self._replayed = self._replayed, []
        now = time.monotonic()
        due: list[tuple[float, _Row]] = []
        while self._due and self._due[0][0] <= now:
            when, _, row = heapq.heappop(self._due)
            due.append((when, row))
        for when, row in due:
            if self._rows.get(row.ticket) is not row:
                continue
            output = row.advance()
            outputs.append(output)
            if output.ended is None:
                self._schedule(row, when + self._delay_s)  # from the due time, so that the pace does not drift
            else:
                del self._rows[row.ticket]
        return outputs

    def _schedule(self, row: _Row, when: float) -> None:
        self._count += 1
        heapq.heappush(self._due, (when, self._count, row))


def _row(request: Request) -> _Row:
    job = request.job
    question = next((m.text for m in reversed(job.messages) if m.role == "user"), "")
    words = WORD.findall(question)
    if not words:
        raise InvalidRequestError("The echo engine repeats the last user message, and there is none.", param="messages")
    sampling = job.sampling
    limit = sampling.max_tokens or len(words)
    prompt_tokens = sum(len(m.text.split()) for m in job.messages)
    return _Row(request.ticket, words, limit, prompt_tokens, StopMatcher(sampling.stop), sampling.ignore_eos)
