"""The engine for models whose adapter makes the tokens itself: requests take turns, a token each."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from fastchat_q.workers.adapters import Generates

from fastchat_q.errors import InvalidRequestError

from .base import Ended, Engine, Output, Request
from .batching.intake import Choice, Intake
from .loading.model import Loaded
from .processing.sequence import Picked
from .processing.tokens import KINDS
from .trouble import job_error


@dataclass(slots=True)
class _Row:
    choice: Choice
    tokens: Iterator[int]

    def next(self) -> Output:
        """One more token; the adapter ends the answer by ending its iterator."""
        token = next(self.tokens, None)
        return self.choice.sequence.close() if token is None else self.choice.accept(Picked(int(token)))

    def close(self) -> None:
        """Lets a generator release what it holds."""
        if isinstance(self.tokens, Generator):
            self.tokens.close()


class AdaptedEngine(Engine):
    """Serves a model by its adapter's `generate`. See `Engine` for the contract.

    The adapter draws the tokens, so nothing is offered that would have to change the draw.
    """

    def __init__(self, name: str, slots: int, loaded: Loaded, adapter: Generates) -> None:
        super().__init__(loaded.card(name, "adapter", (*loaded.format.features, "tokenize"), "generate"), slots)
        self._loaded = loaded
        self._adapter = adapter
        self._intake = Intake(loaded)
        self._rows: dict[str, _Row] = {}
        self._replayed: list[Output] = []

    def admit(self, request: Request) -> None:
        job = request.job
        if job.kind in KINDS:
            self._replayed.append(self._intake.tokens(request))
            return
        if job.tools and job.tool_choice not in ("auto", "none"):
            raise InvalidRequestError(
                f"Model {job.model!r} cannot be made to call a tool: tool_choice may be 'auto' or 'none'.",
                param="tool_choice",
            )
        answers, ended = self._intake.answers(request)
        if ended is not None:
            self._replayed.append(Output(request.ticket, ended=ended))
            return
        [choice] = answers.choices
        sequence = choice.sequence
        tokens = self._adapter.generate(
            self._loaded.model, self._loaded.tokenizer, list(sequence.prompt), list(sequence.ids), job.sampling
        )
        self._rows[request.ticket] = _Row(choice, tokens)

    def drop(self, ticket: str) -> None:
        self._replayed = [output for output in self._replayed if output.ticket != ticket]
        if (row := self._rows.pop(ticket, None)) is not None:
            row.close()

    def wait_s(self) -> float | None:
        return 0.0 if self._rows or self._replayed else None

    def step(self) -> list[Output]:
        outputs, self._replayed = self._replayed, []
        for ticket, row in list(self._rows.items()):
            try:
                output = row.next()
            except Exception as error:  # this request fails, its neighbours do not
                output = Output(ticket, ended=Ended(error=job_error(error)))
            self.alive()
            outputs.append(output)
            if output.ended is not None:
                self.drop(ticket)
        return outputs
