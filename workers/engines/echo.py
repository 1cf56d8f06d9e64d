"""The engine without a model: repeats what it is told, a token a word. For load tests, and without torch.

Of a chat it repeats the last user message, of a completion each of the prompts.
"""

import heapq
import re
import time
from dataclasses import dataclass, field

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import FinishReason, Piece, Usage
from fastchat_q.jobs import Feature, Job
from fastchat_q.registry import ModelCard

from .base import Ended, Engine, Output, Request
from .processing.text import StopMatcher
from .processing.tokens import KINDS, counted, said

WORD = re.compile(r"\s*\S+|\s+$")
FEATURES: tuple[Feature, ...] = ("completions", "tokenize")


@dataclass(eq=False, slots=True)
class _Row:
    """An answer: a job's, or to one of its prompts."""

    answers: "_Answers"
    words: list[str]
    """A token's id is its index."""
    limit: int
    prompt_tokens: int
    stop: StopMatcher
    endless: bool
    """ignore_eos: starts over until the limit."""
    choice: int = 0
    echo: str | None = None
    """The prompt, while it is to be told back."""
    done: int = 0

    def advance(self) -> Output:
        """The next word."""
        ticket, echo = self.answers.ticket, self.echo
        if not self.limit:
            output = Output(ticket, (), Ended(Usage(self.prompt_tokens, 0), "length"))
        else:
            output = self._next_word()
        if echo is not None:
            told = Piece(text=echo, choice=self.choice, units=1, echo=True)
            output, self.echo = Output(ticket, (told, *output.pieces), output.ended), None
        return output if self.answers.count == 1 else self.answers.tell(self, output)

    def _next_word(self) -> Output:
        shown, stopped = self.stop.feed(self.words[self.done % len(self.words)])
        self.done += 1
        reason: FinishReason | None = None
        if stopped or (self.done == len(self.words) and not self.endless):
            reason = "stop"
        elif self.done >= self.limit:
            reason = "length"
        if reason is None:
            return Output(self.answers.ticket, (Piece((self.done - 1,), shown, self.choice),))
        if not stopped:
            shown += self.stop.flush()
        ended = Ended(Usage(self.prompt_tokens, self.done), reason, stop=self.stop.found)
        return Output(self.answers.ticket, (Piece((self.done - 1,), shown, self.choice),), ended)


@dataclass(eq=False, slots=True)
class _Answers:
    """All answers of a job; it ends with the last of them."""

    ticket: str
    count: int
    ended: dict[int, Ended] = field(default_factory=dict)

    def tell(self, row: _Row, output: Output) -> Output:
        """What one of several said, as the job's output."""
        if output.ended is None:
            return output
        self.ended[row.choice] = output.ended
        pieces = output.pieces
        if pieces:
            pieces = (*pieces[:-1], pieces[-1]._replace(finish=output.ended.finish_reason))
        if len(self.ended) < self.count:
            return Output(self.ticket, pieces)
        used = [ended.usage for ended in self.ended.values() if ended.usage is not None]
        usage = Usage(sum(one.prompt_tokens for one in used), sum(one.completion_tokens for one in used))
        return Output(self.ticket, pieces, Ended(usage, self.ended[0].finish_reason, stop=self.ended[0].stop))


class EchoEngine(Engine):
    """Every row gets its first word at once, then one every ``token_delay_s``."""

    def __init__(self, name: str, slots: int, token_delay_s: float) -> None:
        super().__init__(ModelCard(name, "echo", None, int(time.time()), features=FEATURES), slots)
        self._delay_s = token_delay_s
        self._jobs: dict[str, _Answers] = {}
        self._due: list[tuple[float, int, _Row]] = []  # heap: when, tie-break, row
        self._count = 0
        self._replayed: list[Output] = []

    def admit(self, request: Request) -> None:
        if request.job.kind in KINDS:
            self._replayed.append(_tokens(request))
            return
        rows = _rows(request)
        answers = rows[0].answers
        going = []
        for row in rows:
            last: Output | None = None
            for _ in request.prior_ids(row.choice):  # a resumed job goes on where its log ends
                last = row.advance()
            if not row.limit and row.echo is None:  # all that it had to say is told
                last = row.advance()
            if last is not None and last.ended is not None:
                self._replayed.append(Output(answers.ticket, ended=last.ended))
                return
            if row.choice not in answers.ended:
                going.append(row)
        self._jobs[answers.ticket] = answers
        now = time.monotonic()
        for row in going:
            self._schedule(row, now)

    def drop(self, ticket: str) -> None:
        self._replayed = [output for output in self._replayed if output.ticket != ticket]
        self._jobs.pop(ticket, None)  # its places in the heap are skipped when they come up

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
            answers = row.answers
            if self._jobs.get(answers.ticket) is not answers:
                continue
            output = row.advance()
            outputs.append(output)
            if output.ended is not None:
                del self._jobs[answers.ticket]
            elif row.choice not in answers.ended:
                self._schedule(row, when + self._delay_s)  # from the due time, so that the pace does not drift
        return outputs

    def _schedule(self, row: _Row, when: float) -> None:
        self._count += 1
        heapq.heappush(self._due, (when, self._count, row))


def _rows(request: Request) -> list[_Row]:
    job, prompts = request.job, _prompts(request.job)
    sampling = job.sampling
    answers = _Answers(request.ticket, len(prompts))
    rows = []
    for choice, prompt in enumerate(prompts):
        words = WORD.findall(prompt)
        if not words:
            of_chat = job.kind == "chat"
            raise InvalidRequestError(
                f"The echo engine repeats {'the last user message' if of_chat else 'each prompt'}, and there is none.",
                param="messages" if of_chat else "prompt",
            )
        limit = len(words) if sampling.max_tokens is None else sampling.max_tokens
        tokens = _prompt_tokens(job) if job.kind == "chat" else len(prompt.split())
        echo = prompt if job.echo and not request.has_echoed(choice) else None
        stop = StopMatcher(sampling.stop)
        rows.append(_Row(answers, words, limit, tokens, stop, sampling.ignore_eos, choice, echo))
    return rows


def _prompts(job: Job) -> list[str]:
    """What is repeated."""
    if job.kind == "chat":
        return [next((m.text for m in reversed(job.messages) if m.role == "user"), "")]
    if not all(isinstance(prompt, str) for prompt in job.inputs):
        raise _no_vocabulary("prompt")
    return [prompt for prompt in job.inputs if isinstance(prompt, str)]


def _prompt_tokens(job: Job) -> int:
    return sum(len(message.text.split()) for message in job.messages)


def _tokens(request: Request) -> Output:
    job = request.job
    if job.kind == "detokenize":
        raise _no_vocabulary("tokens")
    words = _prompts(job)[0].split() if job.inputs else [w for message in job.messages for w in message.text.split()]
    return said(request, counted(request, list(range(len(words))), None, words if job.tells == "strings" else None))


def _no_vocabulary(param: str) -> InvalidRequestError:
    return InvalidRequestError("The echo engine has no vocabulary: it takes text, no token ids.", param=param)
