"""The engine for models whose adapter makes the tokens itself: requests take turns, a token each."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from fastchat_q.workers.adapters import Generates

from fastchat_q.events import FinishReason, Piece, Usage
from fastchat_q.jobs import Job
from fastchat_q.registry import ModelCard

from .base import Ended, Engine, Output, Request
from .loading import Loaded
from .rendering import Renderer, token_limit
from .text import Detokenizer, StopMatcher
from .trouble import job_error


@dataclass(slots=True)
class _Row:
    prompt: list[int]
    limit: int
    eos_ids: frozenset[int]
    detokenizer: Detokenizer
    stop: StopMatcher
    ids: list[int] = field(default_factory=list)
    tokens: Iterator[int] = field(default_factory=lambda: iter(()))

    def accept(self, token: int) -> tuple[Piece, FinishReason | None]:
        """Takes the next token in; the reason says that it was the last one."""
        self.ids.append(token)
        if token in self.eos_ids:
            return Piece((token,), self._flush("")), "stop"
        text, stopped = self.stop.feed(self.detokenizer.feed(token))
        if stopped:
            return Piece((token,), text), "stop"
        if len(self.ids) >= self.limit:
            return Piece((token,), self._flush(text)), "length"
        return Piece((token,), text), None

    def next(self) -> tuple[Piece, FinishReason | None]:
        """One more token; the adapter ends the answer by ending its iterator."""
        token = next(self.tokens, None)
        return self.accept(int(token)) if token is not None else (Piece(text=self._flush("")), "stop")

    def ended(self, reason: FinishReason) -> Ended:
        return Ended(Usage(len(self.prompt), len(self.ids)), reason)

    def close(self) -> None:
        """Lets a generator release what it holds."""
        if isinstance(self.tokens, Generator):
            self.tokens.close()

    def _flush(self, text: str) -> str:
        rest, stopped = self.stop.feed(self.detokenizer.flush())
        return text + rest + ("" if stopped else self.stop.flush())


class AdaptedEngine(Engine):
    """Serves a model by its adapter's `generate`. See `Engine` for the contract."""

    def __init__(self, name: str, slots: int, loaded: Loaded, adapter: Generates) -> None:
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        card = ModelCard(
            name, "adapter", loaded.context_length, int(time.time()), loaded.device.type, dtype, batching="generate"
        )
        super().__init__(card, slots)
        self._loaded = loaded
        self._adapter = adapter
        vocabulary = loaded.model.config.get_text_config().vocab_size
        self._renderer = Renderer(loaded.tokenizer, vocabulary, loaded.chat, loaded.adapter)
        self._rows: dict[str, _Row] = {}
        self._replayed: list[Output] = []

    def admit(self, request: Request) -> None:
        row = self._row(request.job)
        for token in request.prior_ids():  # replays text and stop state of an earlier attempt
            _, reason = row.accept(token)
            if reason is not None:
                self._replayed.append(Output(request.ticket, ended=row.ended(reason)))
                return
        row.tokens = iter(
            self._adapter.generate(
                self._loaded.model, self._loaded.tokenizer, list(row.prompt), list(row.ids), request.job.sampling
            )
        )
        self._rows[request.ticket] = row

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
                piece, reason = row.next()
            except Exception as error:  # this request fails, its neighbours do not
                output = Output(ticket, ended=Ended(error=job_error(error)))
            else:
                output = Output(ticket, (piece,), row.ended(reason) if reason is not None else None)
            self.alive()
            outputs.append(output)
            if output.ended is not None:
                self.drop(ticket)
        return outputs

    def _row(self, job: Job) -> _Row:
        sampling = job.sampling
        prompt = self._renderer.prompt(job)
        return _Row(
            prompt=prompt,
            limit=token_limit(self._loaded.context_length, len(prompt), sampling.max_tokens),
            eos_ids=frozenset() if sampling.ignore_eos else self._loaded.eos_ids,
            detokenizer=Detokenizer(self._decode),
            stop=StopMatcher(sampling.stop if sampling.ignore_eos else (*sampling.stop, *self._renderer.stop)),
        )

    def _decode(self, ids: list[int]) -> str:
        text = self._loaded.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text
