"""One answer on its way through an engine: its tokens, what they mean as text, and when it is over."""

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import NamedTuple

from fastchat_q.workers.parsing import Parser, Parts

from fastchat_q.errors import InvalidRequestError, JobFailedError
from fastchat_q.events import FinishReason, Piece, TokenLogprob, ToolCallDelta, Usage
from fastchat_q.jobs import Sampling

from ..base import Ended, Output
from .penalties import Edits
from .rules import ModelRules, Rules
from .structured import Guided, Guides
from .text import Detokenizer, StopMatcher

NO_NUMBER = -2
"""Stands for the token of a row whose logits were not finite."""


class Picked(NamedTuple):
    """A row's next token."""

    token: int
    logprobs: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Language:
    """What a model and its tokenizer say to each of its rows."""

    vocabulary: int
    """The width of the logits."""
    eos_ids: frozenset[int]
    decode: Callable[[list[int]], str]
    guides: Guides | None
    """None: guides are followed elsewhere."""
    rules: ModelRules | None = None
    stop: tuple[str, ...] = ()
    """Texts that end an answer as its end token does."""


@dataclass(slots=True)
class Sequence:
    """Deterministic in its tokens: feeding the same ids again gives the same text, which is what resuming rests on."""

    ticket: str
    prompt: list[int]
    limit: int
    sampling: Sampling
    language: Language
    choice: int = 0
    """Which of the answers that its request asks for."""
    parser: Parser | None = None
    variant: int = -1
    """Which of the answers to its prompt: what is drawn hangs on it. By default the choice."""
    before: Ids[int] = ()
    """The tokens of the prompt on whose text it goes on; none: its text begins anew."""
    ids: list[int] = field(default_factory=list)
    eos_ids: frozenset[int] = field(init=False)
    detokenizer: Detokenizer = field(init=False)
    stop: StopMatcher = field(init=False)
    edits: Edits | None = field(init=False)
    guide: Guided | None = field(init=False)
    rules: Rules | None = field(init=False)
    edited: bool = field(init=False)
    """Whether its logits change before the draw in any way but temperature."""
    called: bool = field(init=False, default=False)
    """It has called a tool."""

    def __post_init__(self) -> None:
        """Raises InvalidRequestError: a parameter that this model cannot follow."""
        sampling, language = self.sampling, self.language
        if self.variant < 0:
            self.variant = self.choice
        self.eos_ids = frozenset() if sampling.ignore_eos else language.eos_ids
        self.eos_ids |= set(sampling.stop_token_ids)
        for param in ("stop_token_ids", "logit_bias"):
            for token in getattr(sampling, param):
                if not 0 <= token < language.vocabulary:
                    raise InvalidRequestError(
                        f"{param} names token {token}, but this model's tokens go from 0 to {language.vocabulary - 1}.",
                        param=param,
                    )
        self.detokenizer = Detokenizer(language.decode, self.before)
        self.stop = StopMatcher(sampling.stop if sampling.ignore_eos else (*sampling.stop, *language.stop))
        self.edits = Edits.of(sampling, self.prompt)
        self.guide = language.guides.guided(sampling.guide, self.limit) if sampling.guide and language.guides else None
        self.rules = language.rules.row(self.prompt, self.limit) if language.rules and not self.guide else None
        self.edited = bool(self.edits or self.guide or self.rules or (sampling.min_tokens and self.eos_ids))

    @property
    def last_id(self) -> int:
        """The token that the next decode step feeds."""
        return self.ids[-1]

    @property
    def ready(self) -> bool:
        """Whether its next token can be picked; not while its grammar is being compiled.

        Raises:
            InvalidRequestError: its grammar is none.
        """
        return self.guide is None or self.guide.ready

    @property
    def forbidden(self) -> Ids[int]:
        """Tokens that must not come yet."""
        return tuple(self.eos_ids) if len(self.ids) < self.sampling.min_tokens else ()

    def accept(self, picked: Picked) -> Output:
        """Takes the next token in; the output says if it was the last one.

        Raises:
            InvalidRequestError: its guide cannot be followed any further.
            JobFailedError: there is no next token.
        """
        if self.guide is not None and self.guide.failure is not None:
            raise self.guide.failure
        token = picked.token
        if token == NO_NUMBER:
            raise JobFailedError("The model computed numbers that are not finite.", code="engine_error")
        self.ids.append(token)
        if self.edits is not None:
            self.edits.add(token)
        if token in self.eos_ids or (self.guide is not None and token in self.guide.eos_ids):
            return self._end(picked, self._parse(self._flush("")), "stop")
        text, stopped = self.detokenizer.feed(token), False
        if len(self.ids) >= self.sampling.min_tokens:
            text, stopped = self.stop.feed(text)
        if stopped:
            return self._end(picked, self._parse(text), "stop")
        if len(self.ids) >= self.limit:
            return self._end(picked, self._parse(self._flush(text)), "length")
        parts = self._parse(text)
        return self._end(picked, parts, "stop") if parts.over else self._output(picked, parts)

    def nothing(self) -> Ended:
        """The end of one that may have no token."""
        return Ended(Usage(len(self.prompt), 0), "length")

    def close(self) -> Output:
        """Ends it behind its last token, where what made the tokens has no more."""
        return self._end(None, self._parse(self._flush("")), "stop")

    def _flush(self, text: str) -> str:
        rest, stopped = self.stop.feed(self.detokenizer.flush())
        return text + rest + ("" if stopped else self.stop.flush())

    def _parse(self, text: str) -> Parts:
        parts = Parts(text) if self.parser is None else self.parser.feed(text)
        self.called |= bool(parts.tool_calls)
        return parts

    def _end(self, picked: Picked | None, parts: Parts, reason: FinishReason) -> Output:
        if self.parser is not None and not parts.over:
            rest = self.parser.flush()
            calls = _joined(parts.tool_calls, rest.tool_calls)
            parts = Parts(parts.text + rest.text, parts.reasoning + rest.reasoning, calls, rest.over)
            self.called |= bool(rest.tool_calls)
        if self.called and (reason == "stop" or parts.over):
            reason = "tool_calls"
        found = self.stop.found if self.stop.found in self.sampling.stop else None  # not one of the model's own
        return self._output(picked, parts, Ended(Usage(len(self.prompt), len(self.ids)), reason, stop=found))

    def _output(self, picked: Picked | None, parts: Parts, ended: Ended | None = None) -> Output:
        ids = () if picked is None else (picked.token,)
        logprobs = () if picked is None or picked.logprobs is None else (picked.logprobs,)
        piece = Piece(ids, parts.text, self.choice, parts.reasoning, parts.tool_calls, logprobs)
        return Output(self.ticket, (piece,), ended)


def _joined(calls: tuple[ToolCallDelta, ...], more: tuple[ToolCallDelta, ...]) -> tuple[ToolCallDelta, ...]:
    """Parts of calls, with one part for each call."""
    if calls and more and calls[-1].call == more[0].call:
        joined = calls[-1]._replace(arguments=calls[-1].arguments + more[0].arguments)
        return (*calls[:-1], joined, *more[1:])
    return (*calls, *more)
