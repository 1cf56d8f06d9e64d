"""One answer on its way out of vLLM: what its outputs say, and what of that its client does not have yet.

An answer that nobody has to read is passed on as vLLM says it. One with calls or reasoning in it, and one that an
earlier attempt began, is read token by token by the same `Sequence` as in the transformers engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastchat_q.errors import JobFailedError, RetryableError
from fastchat_q.events import FinishReason, Piece, TokenLogprob, merged
from fastchat_q.jobs import Job, Sampling

from ..base import CannotResumeError
from ..processing.replay import Replay
from ..processing.sequence import Picked
from ..processing.sequence import Sequence as Reading
from .params import FINISH, token_logprobs


@dataclass(eq=False, slots=True)
class Row:
    """A job."""

    ticket: str
    job: Job
    sampling: Sampling = field(default_factory=Sampling)
    """The job's, with what the model's family adds."""
    grammar: str | None = None
    """What its answers follow."""
    prompts: list[list[int]] = field(default_factory=list)
    """One, but of completions, which may have several."""
    inputs: Any = None
    """The prompt as vLLM takes it, images included; None: the tokens are all."""
    choices: list["Choice"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an answer stands.

    Args:
        index: among all of its job.
        variant: among those to its prompt: what is drawn hangs on it.
        limit: tokens that it may have.
        echo: its prompt, if it is to tell it before anything else.
    """

    prompt: list[int]
    limit: int
    index: int
    variant: int
    echo: str | None = None


class Choice:
    """One answer to a job: a request to vLLM.

    Args:
        said: what an earlier attempt said of it.
        reading: what reads its tokens; None: vLLM's text is passed on.
        goes_on: vLLM takes the tokens of the earlier attempt as part of the prompt. Else it makes them once more, and
            they must come out the same.

    Raises:
        CannotResumeError: what was said cannot be continued.
    """

    def __init__(self, row: Row, place: Place, said: Sequence[Piece], reading: Reading | None, goes_on: bool) -> None:
        self.row, self.place, self.index = row, place, place.index
        self.request_id = f"{row.ticket} {self.index}"
        self._echo = place.echo
        self.in_prompt: tuple[int, ...] = ()
        """Tokens of it that vLLM takes as part of the prompt."""
        self.reading = reading
        self.finish: FinishReason | None = next((piece.finish for piece in said if piece.finish), None)
        self.stop: str | None = None
        """The stop string that ended it."""
        if not place.limit and place.echo is None:
            self.finish = "length"  # all that it had to say is told
        self.tokens = 0
        """Tokens that it has, those of the earlier attempt included once they are there."""
        self._prior = tuple([token for piece in said for token in piece.ids])
        self._given: list[Piece] = []
        self._replay: Replay | None = None
        self._late: list[Piece] = []
        """What the earlier attempt held back and there is no new token for yet: the log counts tokens."""
        if self.finish is not None:
            self.tokens = len(self._prior)
            return
        if said:
            self._replay = Replay([piece._replace(ids=(), logprobs=()) for piece in said], self._given.append)
        if goes_on:
            self.in_prompt = self._prior
            self._late = [self._read(token, None) for token in self._prior]

    @property
    def scored(self) -> bool:
        """Whether the log probabilities of its prompt are wanted."""
        return self._echo is not None and self.row.sampling.logprobs is not None

    def take(
        self, completion: Any, decode: Callable[[list[int]], str], prompt_logprobs: Any = None
    ) -> tuple[Piece, ...]:
        """What is new in an output of vLLM's; ``finish`` says if the answer ends with it.

        Args:
            prompt_logprobs: those of its prompt, which come with the first output.

        Raises:
            FastchatQError: the job fails with it.
        """
        if self._echo is None:
            return self._taken(completion, decode)
        echo = Piece(text=self._echo, choice=self.index, units=1, echo=True)
        if self.scored:
            ids, count = self.place.prompt, self.row.sampling.logprobs or 0
            first = TokenLogprob(ids[0], decode([ids[0]]), 0.0)
            echo = echo._replace(logprobs=(first, *token_logprobs(ids[1:], prompt_logprobs[1:], count, decode)))
        self._echo = None
        if self.place.limit:
            return (echo, *self._taken(completion, decode))
        self.finish = "length"
        return (echo._replace(finish=self.finish) if len(self.row.choices) > 1 else echo,)

    def _taken(self, completion: Any, decode: Callable[[list[int]], str]) -> tuple[Piece, ...]:
        ids, reason = tuple(completion.token_ids), completion.finish_reason
        if reason is not None and reason not in FINISH:
            raise RetryableError(f"vLLM ended the request: {reason}.", code="engine_error")
        logprobs: tuple[TokenLogprob, ...] = ()
        count = self.row.sampling.logprobs
        if count is not None and completion.logprobs:
            logprobs = token_logprobs(ids, completion.logprobs, count, decode)
        if self.reading is None:
            self.tokens += len(ids)
            self.finish = None if reason is None else FINISH[reason]
            self.stop = completion.stop_reason if isinstance(completion.stop_reason, str) else None
            return self._pieces(Piece(ids, completion.text, self.index, logprobs=logprobs))
        for at, token in enumerate(ids):
            if self.finish is not None:
                break  # behind a stop string, or behind the one call: of no concern to anybody
            self._late.append(self._read(token, logprobs[at] if logprobs else None))
        if reason is not None and self.finish is None:
            raise JobFailedError(f"vLLM ended the answer before it was over: {reason}.", code="engine_error")
        return self.rest()

    def rest(self) -> tuple[Piece, ...]:
        """What is there and has not been passed on."""
        [piece] = merged(self._late)
        if not self._late or not (piece.ids or self.finish):
            return ()
        self._late.clear()
        return self._pieces(piece)

    def _pieces(self, piece: Piece) -> tuple[Piece, ...]:
        if self.finish is not None and len(self.row.choices) > 1:
            piece = piece._replace(finish=self.finish)
        return (piece,) if piece.ids or piece.said or piece.tool_calls or piece.finish else ()

    def _read(self, token: int, logprob: TokenLogprob | None) -> Piece:
        """What the next token says that is new."""
        again = self.tokens < len(self._prior)
        if again and token != self._prior[self.tokens]:
            raise CannotResumeError("it came out differently")
        assert self.reading is not None
        output = self.reading.accept(Picked(token, logprob))
        self.tokens += 1
        if output.ended is not None:
            self.finish, self.stop = output.ended.finish_reason, output.ended.stop
            if self.tokens < len(self._prior):
                raise CannotResumeError("it came out shorter")
        [piece] = output.pieces
        said = self._new_of(piece, again)
        return said._replace(ids=(), logprobs=()) if again else said._replace(ids=piece.ids, logprobs=piece.logprobs)

    def _new_of(self, piece: Piece, again: bool) -> Piece:
        if self._replay is not None:
            self._given.clear()
            try:
                self._replay.give(piece._replace(ids=(), logprobs=()))
            except CannotResumeError:
                if not self._prior:
                    raise
                self._replay = None  # the same tokens, which another engine made into other text
            else:
                return self._given[0] if self._given else Piece(choice=self.index)
        return Piece(choice=self.index) if again and self._prior else piece
