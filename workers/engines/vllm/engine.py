"""The engine that is vLLM, in this process: its front end here, its scheduler and its model in processes of its own.

Between `vllm serve` and this lies what it is without: no HTTP, no JSON a token. vLLM's outputs of one step go straight
into one call of the sink. Every choice of a job is a request of its own to vLLM, which shares their prompt.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
import uvloop
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from fastchat_q.errors import FastchatQError, JobFailedError, RetryableError
from fastchat_q.events import FinishReason, Piece, TokenLogprob, Usage
from fastchat_q.jobs import Job
from fastchat_q.registry import ModelCard

from ..base import STOP_S, CannotResumeError, Ended, Engine, Output, Request, Sink
from ..processing.rendering import Renderer, give_template, stop_ids, token_limit
from .params import FINISH, ResumedText, continues, job_error, sampling_params, token_logprobs

log = structlog.get_logger()

FEATURES = ("n", "sampling", "penalties", "logprobs", "structured_outputs")
PULSE_S = 1.0
"""While nothing comes for so long, the engine's process is asked for a sign of life: a long prefill is no hang."""
LONG_PROMPT = 20_000
"""Characters; longer prompts are rendered off the event loop."""


class VllmDiedError(Exception):
    """vLLM's own processes are gone; this one has to end as well."""


@dataclass(slots=True)
class _Choice:
    """One answer to a job: a request to vLLM."""

    row: "_Row"
    index: int
    request_id: str
    prior: tuple[int, ...]
    """What an earlier attempt made of it."""
    again: int
    """Tokens of ``prior`` that vLLM makes once more; they must come out the same."""
    sent: int
    """Characters that were sent of their text."""
    text: ResumedText | None = None
    """None: vLLM's text."""
    tokens: int = 0
    """Tokens that it has, those of ``prior`` included."""
    finish: FinishReason | None = None


@dataclass(slots=True)
class _Row:
    """A job."""

    ticket: str
    job: Job
    prompt: list[int] = field(default_factory=list)
    choices: list[_Choice] = field(default_factory=list)


class VllmEngine(Engine):
    """Serves one model, and adapters of it, through an `AsyncLLM`.

    It has no step loop: everything but `start`, `submit`, `cancel` and `stop` runs on the event loop that `start` was
    called on, or if there was none, on one of its own.

    Args:
        llm: made outside of an event loop.
        chat_template: ``--chat-template``; None: as the model has it.
        adapters: the name of a model -> the LoRA adapter that it is.
    """

    def __init__(
        self, name: str, llm: AsyncLLM, chat_template: str | None, adapters: Mapping[str, LoRARequest]
    ) -> None:
        config = llm.vllm_config
        self._context: int = config.model_config.max_model_len
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        device = config.device_config.device_type
        created = int(time.time())
        card = ModelCard(name, "vllm", self._context, created, device, dtype, features=FEATURES)
        super().__init__(card, config.scheduler_config.max_num_seqs)
        self._llm = llm
        self._tokenizer: Any = llm.renderer.get_tokenizer()
        about, source = config.model_config.hf_config.to_dict(), config.model_config.model
        revision = config.model_config.revision
        choice = give_template(self._tokenizer, source, source, about, chat_template, revision)
        self._renderer = Renderer(self._tokenizer, config.model_config.get_vocab_size(), choice)
        self._stop_ids = stop_ids(self._tokenizer, choice)
        self._eos_ids = _eos_ids(llm.input_processor.generation_config_fields, self._tokenizer)
        self._adapters = dict(adapters)
        self._rows: dict[str, _Row] = {}
        self._outputs: list[Output] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop
        self._own_loop = False

    @property
    def cards(self) -> Sequence[ModelCard]:
        return (self.card, *(replace(self.card, name=name, base=self.card.name) for name in self._adapters))

    def start(self, sink: Sink, on_death: Callable[[], None]) -> None:
        self._sink, self._on_death = sink, on_death
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop, self._own_loop = uvloop.new_event_loop(), True
            self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
            self._thread.start()
        self._tell(self._spawn, self._pulse())

    def submit(self, request: Request) -> None:
        self._tell(self._begin, request)

    def cancel(self, ticket: str) -> None:
        self._tell(self._cancel, ticket)

    def stop(self) -> None:
        self._tell(self._end_tasks)
        self._llm.shutdown(timeout=STOP_S / 2)
        if self._own_loop:
            self._tell(self._loop.stop)
            self._thread.join(STOP_S)

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _begin(self, request: Request) -> None:
        self._rows[request.ticket] = _Row(request.ticket, self._with_stops(request.job))
        self.resting = False
        self.alive()
        self._spawn(self._take_in(request))

    async def _take_in(self, request: Request) -> None:
        row = self._rows[request.ticket]
        job = row.job
        try:
            row.prompt = await self._prompt(job)
            limit = token_limit(self._context, len(row.prompt), job.sampling.max_tokens)
            row.choices = [self._choice(row, request, index) for index in range(job.sampling.n)]
            for choice in row.choices:
                if self._is_over(choice, limit):
                    continue
                if self._rows.get(row.ticket) is not row:
                    return  # cancelled, and what was begun of it aborted
                await self._ask(choice, limit)
            if all(choice.finish for choice in row.choices):
                self._end(row, ())
        except EngineDeadError as error:
            self._die(error)
        except Exception as error:  # one bad request fails alone
            problem = job_error(error, job)
            if not isinstance(error, FastchatQError):
                log.info("refused by vLLM", job=job.id, error=str(error))
            self._fail(row, problem)

    def _with_stops(self, job: Job) -> Job:
        """With what ends a turn of the model's family, if its template is not the model's own."""
        sampling = job.sampling
        if sampling.ignore_eos or not (self._renderer.stop or self._stop_ids):
            return job
        stops = {
            "stop": (*sampling.stop, *self._renderer.stop),
            "stop_token_ids": (*sampling.stop_token_ids, *self._stop_ids),
        }
        return job.model_copy(update={"sampling": sampling.model_copy(update=stops)})

    async def _prompt(self, job: Job) -> list[int]:
        if sum(len(message.text) for message in job.messages) < LONG_PROMPT:
            return self._renderer.prompt(job)
        return await asyncio.to_thread(self._renderer.prompt, job)

    def _choice(self, row: _Row, request: Request, index: int) -> _Choice:
        prior, sampling = request.prior_ids(index), row.job.sampling
        said = [piece for piece in request.prior if piece.choice == index]
        choice = _Choice(
            row,
            index,
            f"{row.ticket} {index}",
            prior,
            again=0 if continues(sampling) else len(prior),
            sent=sum(len(piece.text) for piece in said),
            tokens=len(prior) if continues(sampling) else 0,
            finish=next((piece.finish for piece in said if piece.finish), None),
        )
        if choice.finish is not None:
            choice.tokens = len(prior)
        elif choice.tokens:
            choice.text = ResumedText(self._tokenizer, sampling, row.prompt, prior)
        return choice

    def _is_over(self, choice: _Choice, limit: int) -> bool:
        """Whether an earlier attempt made all of it, and could not say so; notes how it ended."""
        sampling = choice.row.job.sampling
        if choice.finish is None and choice.text is not None:
            ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos_ids)}
            if choice.text.stopped or (choice.prior[-1] in ends and choice.tokens > sampling.min_tokens):
                choice.finish = "stop"
            elif choice.tokens >= limit:
                choice.finish = "length"
        return choice.finish is not None

    async def _ask(self, choice: _Choice, limit: int) -> None:
        row = choice.row
        params = sampling_params(row.job.sampling, choice.index, limit, choice.tokens)
        prompt = row.prompt
        if choice.text is not None:
            prompt = [*row.prompt, *choice.prior]
            params.detokenize, params.stop, params.output_text_buffer_length = False, [], 0
        answer = await self._llm.add_request(
            choice.request_id, tokens_input(prompt), params, lora_request=self._adapters.get(row.job.model)
        )
        # vLLM's output loop calls this for every output. A task that waits for each request, as AsyncLLM.generate has
        # it, would cost a wake-up a token.
        answer.put = lambda output: self._take(choice, output)
        if answer.output is not None:  # it came before
            self._take(choice, answer.output)
        if self._rows.get(row.ticket) is not row:
            await self._llm.abort(choice.request_id)

    def _take(self, choice: _Choice, output: Any) -> None:
        row = choice.row
        if self._rows.get(row.ticket) is not row or choice.finish is not None:
            return
        if isinstance(output, Exception):
            if isinstance(output, EngineDeadError) or self._llm.errored:
                self._die(output)
            else:
                self._fail(row, JobFailedError(f"The engine failed: {output}", code="engine_error"))
            return
        try:
            piece = self._piece(choice, output.outputs[0])
        except FastchatQError as error:
            self._fail(row, error)
        except Exception as error:  # what cannot be read of it is this request's alone
            log.exception("output not understood", job=row.job.id)
            self._fail(row, JobFailedError(f"The engine failed: {error!r}", code="engine_error"))
        else:
            pieces = (piece,) if piece.ids or piece.text or piece.finish else ()
            if choice.finish is not None and all(other.finish for other in row.choices):
                self._end(row, pieces)
            elif pieces:
                self._give(Output(row.ticket, pieces))

    def _piece(self, choice: _Choice, completion: Any) -> Piece:
        """What one step gave a choice.

        Raises:
            FastchatQError: the job fails with it.
        """
        ids, text, reason = tuple(completion.token_ids), completion.text, completion.finish_reason
        if reason is not None and reason not in FINISH:
            raise RetryableError(f"vLLM ended the request: {reason}.", code="engine_error")
        finish = None if reason is None else FINISH[reason]
        if choice.text is not None:
            kept, text = choice.text.feed(ids, finish is not None, by_token=finish == "stop")
            ids = ids[:kept]
            if choice.text.stopped and finish is None:
                finish = "stop"
                self._spawn(self._llm.abort(choice.request_id))
        positions = completion.logprobs
        sampling = choice.row.job.sampling
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampling.logprobs is not None and positions:
            logprobs = token_logprobs(ids, positions[: len(ids)], sampling.logprobs, self._tokenizer.decode)
        before, choice.tokens = choice.tokens, choice.tokens + len(ids)
        if before < choice.again:
            again = self._compare(choice, ids, before, finish)
            ids, logprobs = ids[again:], logprobs[again:]
        if choice.again and choice.sent:
            choice.sent, text = choice.sent - min(choice.sent, len(text)), text[choice.sent :]
        choice.finish = finish
        return Piece(ids, text, choice.index, logprobs=logprobs, finish=finish if sampling.n > 1 else None)

    def _compare(self, choice: _Choice, ids: Sequence[int], at: int, finish: FinishReason | None) -> int:
        """How many of these tokens the client has already.

        Raises:
            CannotResumeError: others came out this time.
        """
        again = min(choice.again - at, len(ids))
        if tuple(ids[:again]) != choice.prior[at : at + again] or (finish is not None and choice.tokens < choice.again):
            raise CannotResumeError("it came out differently")
        return again

    def _end(self, row: _Row, pieces: tuple[Piece, ...]) -> None:
        usage = Usage(len(row.prompt), sum(choice.tokens for choice in row.choices))
        self._forget(row.ticket)
        self._give(Output(row.ticket, pieces, Ended(usage, row.choices[0].finish)))

    def _fail(self, row: _Row, error: FastchatQError) -> None:
        if self._rows.get(row.ticket) is row:
            self._abort(row)
            self._give(Output(row.ticket, ended=Ended(error=error)))

    def _cancel(self, ticket: str) -> None:
        row = self._rows.get(ticket)
        if row is not None:
            self._abort(row)
        self._outputs = [output for output in self._outputs if output.ticket != ticket]

    def _abort(self, row: _Row) -> None:
        self._forget(row.ticket)
        running = [choice.request_id for choice in row.choices if choice.finish is None]
        if running:
            self._spawn(self._llm.abort(running))

    def _forget(self, ticket: str) -> None:
        del self._rows[ticket]
        self.resting = not self._rows

    def _give(self, output: Output) -> None:
        if not self._outputs:
            self._loop.call_soon(self._hand_over)
        self._outputs.append(output)

    def _hand_over(self) -> None:
        """All that this turn of the loop brought: as a rule, one step of vLLM's."""
        outputs, self._outputs = self._outputs, []
        self.steps += 1
        self.alive()
        if outputs:
            assert self._sink is not None
            self._sink(outputs)

    async def _pulse(self) -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            if self._llm.errored:
                self._die(self._llm.dead_error)
                return
            if self._rows and time.monotonic() - self.progress() > PULSE_S:
                try:
                    await self._llm.is_sleeping()  # answered between two steps
                except EngineDeadError as error:
                    self._die(error)
                    return
                self.alive()

    def _die(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = VllmDiedError(
                "its engine process ended, and said why in the lines above. If that was memory: lower "
                "--slots, --max-model-len or --engine-arg gpu-memory-utilization."
            )
            self.failure.__cause__ = error
            assert self._on_death is not None
            self._on_death()

    def admit(self, request: Request) -> None:
        raise NotImplementedError("vLLM has the step loop")

    def drop(self, ticket: str) -> None:
        raise NotImplementedError("vLLM has the step loop")

    def step(self) -> list[Output]:
        raise NotImplementedError("vLLM has the step loop")

    def wait_s(self) -> float | None:
        raise NotImplementedError("vLLM has the step loop")


def _eos_ids(generation: Mapping[str, Any], tokenizer: Any) -> frozenset[int]:
    """What ends an answer for vLLM: the tokenizer's end, and those of the model's generation config."""
    named = generation.get("eos_token_id") or []
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*own, *([named] if isinstance(named, int) else named)])
