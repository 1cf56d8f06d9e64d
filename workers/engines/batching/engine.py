"""The engine for Hugging Face causal LMs: one compact step loop, requests join and leave between steps.

A step plans (scheduler.py), computes logits (passes.py and the ways behind it), draws tokens (sampling.py), and tells
what they say (sequence.py). Nothing of a request is computed anywhere else.
"""

import time
from collections.abc import Sequence

import structlog
import torch

from fastchat_q.errors import InvalidRequestError
from fastchat_q.registry import ModelCard

from ..base import Ended, Engine, Output, Request
from ..loading.model import Loaded
from ..trouble import job_error
from .choose import NoWayError, choose_way, default_kv_bytes
from .generate import GenerateEngine
from .intake import COMPILING_S, Choice, Intake, features
from .lora import Adapters
from .passes import Model, Part, Row
from .sampling import Sampler
from .scheduler import Run, Scheduler
from .sequence import Picked

log = structlog.get_logger()

FIRST_FORWARD_S = 120.0
"""An accelerator loads and compiles its kernels during the first forward pass."""


class TransformersEngine(Engine):
    """Serves one loaded model. See `Engine` for the contract.

    Args:
        kv_bytes: memory for keys, values and states of all requests; None: a part of what is free.
        adapters: further models: LoRA adapters on this one.
    """

    def __init__(
        self, name: str, slots: int, loaded: Loaded, kv_bytes: int | None = None, adapters: Adapters | None = None
    ) -> None:
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        made, device = int(time.time()), loaded.device.type
        card = ModelCard(name, "transformers", loaded.context_length, made, device, dtype, features=features(loaded))
        super().__init__(card, slots)
        model = Model(loaded.model, self.alive, adapters)
        seen = loaded.sight.example() if loaded.sight is not None else None
        self.way = choose_way(model, kv_bytes or default_kv_bytes(loaded.device), seen)
        self._adapters = model.adapters
        self._adapters.check_called()
        self.scheduler = Scheduler(self.way)
        self._intake = Intake(loaded, self.way.room.columns - 1)
        self._sampler = Sampler(self._intake.texts)
        self._compiling: list[Choice] = []
        self._tickets: dict[str, list[Run]] = {}
        self._replayed: list[Output] = []  # ends that no forward pass is needed for
        self._warm = loaded.device.type == "cpu"

    @property
    def cards(self) -> Sequence[ModelCard]:
        return (self.card, *self._adapters.cards(self.card))

    def admit(self, request: Request) -> None:
        if self._intake.render_aside(request):
            return
        answers, ended = self._intake.answers(request)
        if ended is not None:
            self._replayed.append(Output(request.ticket, ended=ended))
            return
        going = [choice for choice in answers.choices if answers.count == 1 or not answers.has_ended(choice)]
        new = [choice for choice in going if not choice.sequence.ids]
        if new:
            new[0].waiting = new[1:]
        for choice in going:
            if choice.sequence.ids or choice is new[0]:
                self._compiling.append(choice)
        self._start_ready(self._replayed)

    @torch.inference_mode()
    def drop(self, ticket: str) -> None:
        self._replayed = [output for output in self._replayed if output.ticket != ticket]
        self._forget(ticket)

    def wait_s(self) -> float | None:
        if len(self.scheduler) or self._replayed:
            return 0.0
        return COMPILING_S if self._compiling or self._intake.is_rendering else None

    @torch.inference_mode()
    def step(self) -> list[Output]:
        outputs, self._replayed = self._replayed, []
        if not self._warm:
            self.busy_for(FIRST_FORWARD_S)
            self._warm = True
        for request in self._intake.rendered():
            self._admit(request, outputs)
        if self._compiling:
            self._start_ready(outputs)
        decode, chunks = self.scheduler.plan()
        rows: list[Row] = []
        logits: list[torch.Tensor] = []
        for part in self.way.parts(decode, chunks):
            self._run_part(part, rows, logits, outputs)
        self.scheduler.done(rows)
        if rows:
            self._draw(rows, torch.cat(logits) if len(logits) > 1 else logits[0], outputs)
        return outputs

    def _run_part(self, part: Part, rows: list[Row], logits: list[torch.Tensor], outputs: list[Output]) -> None:
        """Computes a part; if that fails, smaller ones, until what is at fault fails alone."""
        try:
            result = self.way.run(part)
        except Exception as error:
            smaller = _halves(part) if self.way.repeatable else []
            failed = Ended(error=job_error(error))
        else:
            rows += result.rows
            if result.rows:
                logits.append(result.logits)
            return
        if not smaller:  # the cache of these rows is undefined now, or the fault is in the one row
            for ticket in {self.scheduler.run_of(row).owner.answers.ticket for row in part.rows}:
                self._end(ticket, failed, outputs)
            return
        self.way.reset()
        for one in smaller:
            self._run_part(one, rows, logits, outputs)

    def _draw(self, rows: list[Row], logits: torch.Tensor, outputs: list[Output]) -> None:
        """Chooses the next token of each row, and says what it means."""
        runs = [self.scheduler.run_of(row) for row in rows]
        choices: list[Choice] = [run.owner for run in runs]
        forks: list[tuple[Run, Choice]] = []
        if any(choice.waiting for choice in choices):
            lines = list(range(len(rows)))
            for line, (run, choice) in enumerate(zip(runs, choices, strict=True)):
                forks += [(run, other) for other in choice.waiting]
                lines += [line] * len(choice.waiting)
                choice.waiting = []
            logits = logits[torch.tensor(lines, device=logits.device)]
        everyone = choices + [other for _, other in forks]
        try:
            picks = self._sampler.pick(logits, [choice.sequence for choice in everyone])
        except Exception as error:
            failed = Ended(error=job_error(error))
            for ticket in {choice.answers.ticket for choice in everyone}:
                self._end(ticket, failed, outputs)
            return
        for (run, choice), picked in zip(forks, picks[len(runs) :], strict=True):
            if self._accept(choice, picked, outputs):
                self._fork(run, choice)
        gone = []
        for run, picked in zip(runs, picks, strict=False):
            if self._accept(run.owner, picked, outputs):
                run.row.last_id = picked.token
            else:
                gone.append(run)
        if gone:
            self.scheduler.leave(gone)

    def _accept(self, choice: Choice, picked: Picked, outputs: list[Output]) -> bool:
        """Takes a token in and tells what it says; False: this choice goes no further."""
        answers = choice.answers
        if answers.ticket not in self._tickets:
            return False  # another choice of the same job failed in this step
        try:
            output = choice.accept(picked)
        except Exception as error:  # tokens that this tokenizer cannot decode: its neighbours go on
            self._end(answers.ticket, Ended(error=job_error(error)), outputs)
            return False
        outputs.append(output)
        if output.ended is not None:
            del self._tickets[answers.ticket]
            return False
        return answers.count == 1 or not answers.has_ended(choice)

    def _fork(self, run: Run, choice: Choice) -> None:
        """Lets another choice go on from where the prompt of a run ended."""
        ids = choice.tokens()
        new = Run(Row(run.row.namespace, run.row.inputs), ids, choice)
        self._tickets[choice.answers.ticket].append(new)
        try:
            shares = self.way.fork(run.row, new.row)
        except (RuntimeError, MemoryError) as error:
            job_error(error)  # raises if it is the end of the device
            shares = False
        if shares:
            new.row.last_id = ids[-1]
            self.scheduler.join(new)
        else:
            self.scheduler.submit(new, next_in_line=True)

    def _start_ready(self, outputs: list[Output]) -> None:
        """Starts what need not wait for its grammar any more."""
        for choice in list(self._compiling):
            if choice not in self._compiling:
                continue  # another choice of its job failed
            try:
                if choice.sequence.ready:
                    self._compiling.remove(choice)
                    self._start(choice)
            except InvalidRequestError as error:
                self._end(choice.answers.ticket, Ended(error=error), outputs)

    def _start(self, choice: Choice) -> None:
        run = Run(Row(self._adapters.of(choice.answers.model), choice.inputs), choice.tokens(), choice)
        self._tickets.setdefault(choice.answers.ticket, []).append(run)
        self.scheduler.submit(run)

    def _forget(self, ticket: str) -> None:
        self._intake.forget(ticket)
        self.scheduler.leave(self._tickets.pop(ticket, ()))
        self._compiling = [choice for choice in self._compiling if choice.answers.ticket != ticket]

    def _end(self, ticket: str, ended: Ended, outputs: list[Output]) -> None:
        self._forget(ticket)
        outputs.append(Output(ticket, ended=ended))


def _halves(part: Part) -> list[Part]:
    """Smaller parts of a part that failed; none if it has one row."""
    if len(part.rows) == 1:
        return []
    if part.chunks:
        alone = [Part([], [chunk]) for chunk in part.chunks]
        return [Part(part.decode, []), *alone] if part.decode else alone
    middle = len(part.decode) // 2
    return [Part(part.decode[:middle], []), Part(part.decode[middle:], [])]


def build(
    name: str, slots: int, loaded: Loaded, kv_bytes: int | None = None, adapters: Adapters | None = None
) -> Engine:
    """The engine for a loaded model: the step loop, or `generate` for what that cannot run."""
    if loaded.model.config.is_encoder_decoder:
        return GenerateEngine(name, slots, loaded, adapters)
    try:
        return TransformersEngine(name, slots, loaded, kv_bytes, adapters)
    except NoWayError as error:
        log.warning("the step loop cannot run this model", model=name, why=str(error))
        return GenerateEngine(name, slots, loaded, adapters)
