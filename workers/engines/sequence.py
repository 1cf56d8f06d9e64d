"""One request on its way through an engine: its tokens, what they mean as text, and when it is over."""

from dataclasses import dataclass, field

from fastchat_q.events import FinishReason, Piece, Usage
from fastchat_q.jobs import Sampling

from .base import Ended, Output
from .sampling import Draw
from .text import Detokenizer, StopMatcher


@dataclass(slots=True)
class Sequence:
    """Deterministic in its tokens: feeding the same ids again gives the same text, which is what resuming rests on."""

    ticket: str
    prompt: list[int]
    limit: int
    sampling: Sampling
    eos_ids: frozenset[int]
    detokenizer: Detokenizer
    stop: StopMatcher
    ids: list[int] = field(default_factory=list)

    @property
    def last_id(self) -> int:
        """The token that the next decode step feeds."""
        return self.ids[-1]

    def draw(self) -> Draw:
        """The parameters of the next token."""
        return Draw(self.sampling.temperature, self.sampling.top_p, self.sampling.seed, len(self.ids))

    def accept(self, token: int) -> Output:
        """Takes the next token in; the output says if it was the last one."""
        self.ids.append(token)
        if token in self.eos_ids:
            return self._end(token, self._flush(""), "stop")
        text, stopped = self.stop.feed(self.detokenizer.feed(token))
        if stopped:
            return self._end(token, text, "stop")
        if len(self.ids) >= self.limit:
            return self._end(token, self._flush(text), "length")
        return Output(self.ticket, (Piece((token,), text),))

    def _flush(self, text: str) -> str:
        rest, stopped = self.stop.feed(self.detokenizer.flush())
        return text + rest + ("" if stopped else self.stop.flush())

    def _end(self, token: int, text: str, reason: FinishReason) -> Output:
        usage = Usage(len(self.prompt), len(self.ids))
        return Output(self.ticket, (Piece((token,), text),), Ended(usage, reason))
