"""The engine for embeddings and rankings: the inputs of all jobs that wait, in batches of about the same length.

The jobs take turns in leading a batch, so a small one does not wait for a large one to end. Padding is masked, and
models.py has tried that it leaves the results as they are, up to rounding.
"""

import base64
import time
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from fastchat_q.choices import KIND_OF_ENGINE, WorkerOptions
from fastchat_q.errors import JobFailedError
from fastchat_q.events import Piece, Usage
from fastchat_q.jobs import Job
from fastchat_q.registry import ModelCard

from ..base import OUT_OF_MEMORY, Ended, Engine, Output, Request
from ..batching.passes import watch_layers
from ..loading.model import load_encoder
from ..loading.progress import OnProgress
from ..trouble import job_error
from .models import Computer, Embedder, Encoded, Ranker

BATCH_TOKENS, BATCH_TOKENS_ON_CPU = 16384, 1024
SLACK = 8
"""Tokens by which inputs of a batch may differ anyway; long ones by a quarter of the longest."""


def build(options: WorkerOptions, name: str, slots: int, on_progress: OnProgress) -> Engine:
    """The engine for embeddings or rankings, loaded.

    Raises:
        ConfigurationError: the model cannot be loaded, or makes no vectors or scores.
    """
    source, kind = options.model, KIND_OF_ENGINE[options.engine]
    loaded = load_encoder(source, kind, options.device, options.dtype, options.load, on_progress)
    computer = (
        Ranker(source, loaded)
        if kind == "rerank"
        else Embedder(source, loaded, options.encoder, options.load.allow_pickle)
    )
    return EncoderEngine(name, slots, computer, options.encoder.batch_tokens)


@dataclass(eq=False, slots=True)
class Waiting:
    """A job that is not done."""

    ticket: str
    job: Job
    tokens: int
    left: int
    """Inputs that have no result."""
    inputs: "list[Input]" = field(default_factory=list)
    """Sorted, the longest last; those that were taken may still be there."""


@dataclass(eq=False, slots=True)
class Input:
    """A text, or a query with a document, that waits."""

    owner: Waiting
    index: int
    encoded: Encoded
    key: tuple[int, int]
    """Its length, and what makes it unique."""
    taken: bool = False


class EncoderEngine(Engine):
    """Serves one model. See `Engine` for the contract.

    Args:
        batch_tokens: of a forward pass, padding included; an input that is longer goes alone. None: by device.
    """

    def __init__(self, name: str, slots: int, computer: Computer, batch_tokens: int | None = None) -> None:
        dtype = str(computer.model.dtype).removeprefix("torch.")
        engine = {"embed": "embeddings"}.get(computer.kind, computer.kind)
        card = ModelCard(
            name, engine, computer.limit, int(time.time()), computer.device.type, dtype, kind=computer.kind
        )
        super().__init__(card, slots)
        self._computer = computer
        self._most = batch_tokens or (BATCH_TOKENS_ON_CPU if computer.device.type == "cpu" else BATCH_TOKENS)
        self._budget = self._most
        """Less than that for a while after memory was out."""
        self._waiting: OrderedDict[str, Waiting] = OrderedDict()
        self._line: list[tuple[tuple[int, int], Input]] = []
        """The inputs of all jobs, the shortest first."""
        self._count = 0
        self._done: list[Output] = []  # ends that no forward pass is needed for
        watch_layers(computer.model, self.alive)

    def admit(self, request: Request) -> None:
        job = request.job
        encoded = self._computer.encode(job, self.alive)
        logged = {piece.choice for piece in request.prior if piece.vector}
        waiting = Waiting(request.ticket, job, sum(len(one.ids) for one in encoded), len(encoded) - len(logged))
        for index, one in enumerate(encoded):
            if index not in logged:
                self._count += 1
                waiting.inputs.append(Input(waiting, index, one, (len(one.ids), self._count)))
        if not waiting.left:
            self._done.append(_output(waiting, ()))
            return
        waiting.inputs.sort(key=lambda one: one.key)
        self._waiting[request.ticket] = waiting
        self._line += [(one.key, one) for one in waiting.inputs]
        self._line.sort(key=lambda entry: entry[0])

    def drop(self, ticket: str) -> None:
        self._done = [output for output in self._done if output.ticket != ticket]
        waiting = self._waiting.pop(ticket, None)
        if waiting is not None:
            self._line = [entry for entry in self._line if entry[1].owner is not waiting]

    def wait_s(self) -> float | None:
        return 0.0 if self._waiting or self._done else None

    def step(self) -> list[Output]:
        outputs, self._done = self._done, []
        if self._waiting:
            self._run_batch(self._next_batch(), outputs)
            self._budget = min(self._most, self._budget + self._budget // 16 + 1)
        return outputs

    def _next_batch(self) -> list[Input]:
        """The longest input of the job whose turn it is, and what is about as long."""
        ticket, leader = next(iter(self._waiting.items()))
        self._waiting.move_to_end(ticket)
        while leader.inputs[-1].taken:
            leader.inputs.pop()
        longest = leader.inputs[-1].key
        rows = max(1, self._budget // longest[0])
        shortest = longest[0] - max(SLACK, longest[0] // 4) if self._computer.pads else longest[0]
        low = bisect_left(self._line, longest, key=lambda entry: entry[0])
        high = low + 1
        while low > 0 and high - low < rows and self._line[low - 1][0][0] >= shortest:
            low -= 1
        while high < len(self._line) and high - low < rows and self._line[high][0][0] == longest[0]:
            high += 1
        batch = [one for _, one in self._line[low:high]]
        del self._line[low:high]
        for one in batch:
            one.taken = True
        return batch

    def _run_batch(self, batch: list[Input], outputs: list[Output]) -> None:
        """Computes a batch; if that fails, its halves, until what is at fault fails alone."""
        try:
            results = self._computer.compute([one.encoded for one in batch])
            self.alive()
        except Exception as error:
            failed = job_error(error)
        else:
            self._tell(batch, results, outputs)
            return
        if len(batch) == 1:
            if batch[0].owner.ticket in self._waiting:
                self._end(batch[0].owner, Ended(error=failed), outputs)
            return
        if failed.code == OUT_OF_MEMORY:
            self._budget = max(1, self._budget // 2)
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            if going := [one for one in half if one.owner.ticket in self._waiting]:
                self._run_batch(going, outputs)

    def _tell(self, batch: list[Input], results: torch.Tensor, outputs: list[Output]) -> None:
        finite = results.isfinite().all(dim=1).tolist()
        pieces: dict[Waiting, list[Piece]] = {}
        for one, result, good in zip(batch, results, finite, strict=True):
            owner = one.owner
            if owner.ticket not in self._waiting:
                continue  # another input of its job failed
            if not good:
                pieces.pop(owner, None)
                error = JobFailedError(f"The model made no number of input {one.index}.", code="not_finite")
                self._end(owner, Ended(error=error), outputs)
                continue
            vector = self._computer.finish(result, owner.job)
            pieces.setdefault(owner, []).append(Piece(vector=_base64(vector), choice=one.index, units=1))
        for owner, some in pieces.items():
            owner.left -= len(some)
            outputs.append(_output(owner, tuple(some)))
            if not owner.left:
                del self._waiting[owner.ticket]

    def _end(self, waiting: Waiting, ended: Ended, outputs: list[Output]) -> None:
        self.drop(waiting.ticket)
        outputs.append(Output(waiting.ticket, ended=ended))


def _output(waiting: Waiting, pieces: tuple[Piece, ...]) -> Output:
    ended = None if waiting.left else Ended(Usage(waiting.tokens, 0), "stop")
    return Output(waiting.ticket, pieces, ended)


def _base64(numbers: torch.Tensor) -> str:
    return base64.b64encode(numbers.numpy().astype("<f4").tobytes()).decode()
