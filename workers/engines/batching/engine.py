"""The engine for Hugging Face causal LMs: one compact step loop, requests join and leave between steps.

A step plans (scheduler.py), computes logits (passes.py and the ways behind it), draws tokens (draws.py, sampling.py),
and tells what they say (sequence.py). Nothing of a request is computed anywhere else. What fails in a step is tried
again in smaller parts, until the job at fault fails alone; where memory runs out, what can do without it gives it back.
"""

from collections.abc import Sequence

import structlog
import torch

from fastchat_q.errors import FastchatQError, InvalidRequestError, RetryableError
from fastchat_q.registry import ModelCard

from ..base import Ended, Engine, Output, Request
from ..loading.model import Loaded
from ..processing.sequence import Picked
from ..processing.tokens import KINDS
from ..trouble import is_out_of_memory, job_error
from .choose import NoWayError, choose_way, default_kv_bytes
from .draws import NUMBERS, Draw, batches, draws_of, logits_of
from .generate import GenerateEngine
from .intake import COMPILING_S, Choice, Intake, features
from .lora import Adapters
from .passes import Model, Part, Result, Row
from .sampling import Sampler, score
from .scheduler import NoRoomError, Run, Scheduler

log = structlog.get_logger()

FIRST_FORWARD_S = 120.0
"""An accelerator loads and compiles its kernels during the first forward pass."""

MOST_SCORED = 2**28
"""Logits of a prompt that a way keeps which takes it in whole, if they are wanted."""
MOST_RESTARTS = 3
"""So often an answer is computed again after steps that failed, with tokens in between: then its job has failed."""


class TransformersEngine(Engine):
    """Serves one loaded model. See `Engine` for the contract.

    Args:
        kv_bytes: memory for keys, values and states of all requests; None: a part of what is free.
        adapters: further models: LoRA adapters on this one.
    """

    def __init__(
        self, name: str, slots: int, loaded: Loaded, kv_bytes: int | None = None, adapters: Adapters | None = None
    ) -> None:
        super().__init__(loaded.card(name, "transformers", (*features(loaded), "prompt_logprobs")), slots)
        model = Model(loaded.model, self.alive, adapters)
        seen = loaded.sight.example() if loaded.sight is not None else None
        self.way = choose_way(model, kv_bytes or default_kv_bytes(loaded.device), seen)
        self._adapters = model.adapters
        self._adapters.check_called()
        vocabulary = loaded.model.config.get_text_config().vocab_size
        self.scheduler = Scheduler(self.way, max(1, NUMBERS // vocabulary))
        self._most_scored = MOST_SCORED // vocabulary
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
        if request.job.kind in KINDS:
            self._replayed.append(self._intake.tokens(request))
            return
        answers, ended = self._intake.answers(request)
        if ended is not None:
            self._replayed.append(Output(request.ticket, ended=ended))
            return
        for going in answers.by_prompt():
            self._check_scored(going)
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
        try:
            decode, chunks = self.scheduler.plan()
        except NoRoomError as error:
            self._end(error.run.owner.answers.ticket, Ended(error=job_error(error)), outputs)
            return outputs
        self.starved = frozenset([run.owner.answers.ticket for run in self.scheduler.starved])
        results: list[Result] = []
        for part in self.way.parts(decode, chunks):
            self._run_part(part, results, outputs)
        self.scheduler.done(row for result in results for row in result.rows)
        self._score(results, outputs)
        self._draw(results, outputs)
        return outputs

    def _run_part(self, part: Part, results: list[Result], outputs: list[Output]) -> None:
        """Computes a part; if that fails, smaller ones, until what is at fault fails alone."""
        part = self._rest(part)
        if not part.rows:
            return
        try:
            results.append(self.way.run(part))
            return
        except Exception as error:
            failure, no_memory = job_error(error), is_out_of_memory(error)
        smaller = _halves(part) if self.way.repeatable else []
        if not smaller:  # the cache of these rows is undefined now, or the fault is in the one row
            runs = [self.scheduler.run_of(row) for row in part.rows]
            self._fail([(run.owner, run) for run in runs], failure, outputs, again=no_memory, no_memory=no_memory)
            return
        self.way.reset()
        for one in smaller:
            self._run_part(one, results, outputs)

    def _rest(self, part: Part) -> Part:
        """What is left of a part when jobs have failed in others of the same step."""
        there = self.scheduler
        return Part([row for row in part.decode if row in there], [c for c in part.chunks if c.row in there])

    def _check_scored(self, choices: list[Choice]) -> None:
        """Raises InvalidRequestError for a prompt whose logits would need too much memory at once."""
        waiting = [choice.echo for choice in choices if choice.echo is not None and choice.echo.waits]
        if waiting and not self.way.splits_prompts and len(waiting[0].ids) > self._most_scored:
            raise InvalidRequestError(
                f"The log probabilities of a prompt of {len(waiting[0].ids)} tokens need more memory than there is: "
                f"this model takes a prompt in whole, and tells them for up to {self._most_scored} tokens.",
                param="echo",
                code="prompt_too_long",
            )

    def _score(self, results: list[Result], outputs: list[Output]) -> None:
        """Takes in what the model thinks of prompts that are told back with that."""
        for scored in [scored for result in results for scored in result.scored if scored.row in self.scheduler]:
            choice: Choice = self.scheduler.run_of(scored.row).owner
            echo, count = choice.echo, choice.sequence.sampling.logprobs
            if echo is None or count is None:
                continue
            behind = echo.ids[scored.start + 1 : scored.start + 1 + len(scored.logits)]
            try:
                echo.take(scored.start, score(scored.logits[: len(behind)], behind, count, self._intake.texts))
            except Exception as error:
                self._end(choice.answers.ticket, Ended(error=job_error(error)), outputs)
            scored.row.scored = echo.waits

    def _draw(self, results: list[Result], outputs: list[Output]) -> None:
        """Chooses the next token of each row, and says what it means."""
        drawn: list[tuple[Draw, Picked]] = []
        failed: list[tuple[list[Draw], FastchatQError, bool]] = []
        for batch in batches(draws_of(results, self.scheduler)):
            try:
                picks = self._sampler.pick(logits_of(batch), [draw.choice.sequence for draw in batch])
            except Exception as error:
                failed.append((batch, job_error(error), is_out_of_memory(error)))
            else:
                drawn += zip(batch, picks, strict=True)
        gone = []
        for draw, picked in drawn:
            accepted = self._accept(draw.choice, picked, outputs)
            if not draw.forks:
                draw.run.row.last_id = picked.token
                if not accepted:
                    gone.append(draw.run)
            elif accepted:
                self._fork(draw.run, draw.choice)
        if gone:
            self.scheduler.leave(gone)
        for batch, failure, no_memory in failed:  # their logits are overwritten, so they are computed once more
            chosen = [(draw.choice, None if draw.forks else draw.run) for draw in batch]
            self._fail(chosen, failure, outputs, again=no_memory or len(batch) > 1, no_memory=no_memory)

    def _fail(
        self,
        chosen: list[tuple[Choice, Run | None]],
        failure: FastchatQError,
        outputs: list[Output],
        *,
        again: bool,
        no_memory: bool,
    ) -> None:
        """Ends the jobs of these choices, each of which may have a run, or computes them again if that may help.

        Args:
            again: it is not known whose fault it is, or nobody's.
        """
        for choice, run in reversed(chosen):
            ticket = choice.answers.ticket
            if ticket not in self._tickets:
                continue
            if not again or choice.suspect:
                self._end(ticket, Ended(error=failure), outputs)
                continue
            if choice.restarts == MOST_RESTARTS:  # it may have sat beside others that failed: another try may do
                self._end(ticket, Ended(error=RetryableError(str(failure), code=failure.code)), outputs)
                continue
            choice.suspect = True
            choice.restarts += 1
            if run is None:
                self._start(choice)
            else:
                self.scheduler.restart(run, starved=no_memory)
        if no_memory:
            self.way.reset()

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
        choice.suspect = False
        if output.ended is not None:
            del self._tickets[answers.ticket]
            return False
        return not answers.has_ended(choice)

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
            except FastchatQError as error:
                self._end(choice.answers.ticket, Ended(error=error), outputs)

    def _start(self, choice: Choice) -> None:
        row = Row(self._adapters.of(choice.answers.model), choice.inputs)
        row.scored = choice.echo is not None and choice.echo.waits
        run = Run(row, choice.tokens(), choice)
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
