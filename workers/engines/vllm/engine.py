"""The engine that is vLLM, in this process: its front end here, its scheduler and its model in processes of its own.

Between `vllm serve` and this lies what it is without: no HTTP, no JSON a token. vLLM's outputs of one step go straight
into one call of the sink. Every choice of a job is a request of its own to vLLM, which shares their prompt.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog
import uvloop
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from fastchat_q.choices import LoadOptions
from fastchat_q.errors import FastchatQError, InvalidRequestError, JobFailedError
from fastchat_q.events import Piece, Usage
from fastchat_q.registry import ModelCard

from ..async_engine import LoopEngine
from ..base import STOP_S, Ended, Output, Request, Sink
from ..processing.tokens import KINDS
from .choice import Choice, Row
from .intake import Intake
from .params import job_error, sampling_params

log = structlog.get_logger()

PULSE_S = 1.0
"""While nothing comes for so long, the engine's process is asked for a sign of life: a long prefill is no hang."""
PROCESS_DIED = (
    "its engine process ended, and said why in the lines above. If that was memory: lower --slots, --max-model-len or "
    "--engine-arg gpu-memory-utilization."
)


class VllmDiedError(Exception):
    """vLLM's own processes are gone, or it cannot serve; this process has to end as well."""


class VllmEngine(LoopEngine):
    """Serves one model, and adapters of it, through an `AsyncLLM`.

    It has no step loop: everything but `start`, `submit`, `cancel` and `stop` runs on the event loop that `start` was
    called on, or if there was none, on one of its own.

    Args:
        llm: made outside of an event loop.
        options: chat template and parsers.
        adapters: the name of a model -> the LoRA adapter that it is.
    """

    def __init__(self, name: str, llm: AsyncLLM, options: LoadOptions, adapters: Mapping[str, LoRARequest]) -> None:
        config = llm.vllm_config
        context: int = config.model_config.max_model_len
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        device, made = config.device_config.device_type, int(time.time())
        self._llm = llm
        self._tokenizer: Any = llm.renderer.get_tokenizer()
        self._intake = Intake(llm, options)
        intake = self._intake
        card = ModelCard(name, "vllm", context, made, device, dtype, intake.kind, features=intake.features)
        super().__init__(card, config.scheduler_config.max_num_seqs)
        self._adapters = dict(adapters)
        self._rows: dict[str, Row] = {}
        self._tasks: set[asyncio.Task[None]] = set()
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
        self._tell(self._spawn, self._load_adapters())
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
        self._rows[request.ticket] = Row(request.ticket, request.job)
        self.resting = False
        self.alive()
        self._spawn(self._take_in(request))

    async def _take_in(self, request: Request) -> None:
        row = self._rows[request.ticket]
        try:
            if row.job.model not in (self.card.name, *self._adapters):
                raise InvalidRequestError(f"This worker has no model {row.job.model!r}.", param="model")
            if row.job.kind in KINDS:
                told = await self._intake.tokens(request)
                if self._rows.get(row.ticket) is row:
                    self._forget(row.ticket)
                    self._give(told)
                return
            await self._intake.take_in(row, request)
            for choice in row.choices:
                if self._rows.get(row.ticket) is not row:
                    return  # cancelled, and what was begun of it aborted
                if choice.finish is None:
                    await self._ask(choice)
            if self._rows.get(row.ticket) is row:
                self._pass_on(row, tuple([piece for choice in row.choices for piece in choice.rest()]))
        except EngineDeadError as error:
            self._die(PROCESS_DIED, error)
        except Exception as error:  # one bad request fails alone
            if not isinstance(error, FastchatQError):
                log.info("refused by vLLM", job=row.job.id, error=str(error))
            self._fail(row, job_error(error))

    async def _ask(self, choice: Choice) -> None:
        row, place = choice.row, choice.place
        params = sampling_params(
            row.sampling,
            place.variant,
            place.limit,
            len(choice.in_prompt),
            row.grammar,
            text=choice.reading is None,
            scored=choice.scored,
        )
        ids = [*place.prompt, *choice.in_prompt]
        inputs = tokens_input(ids) if row.inputs is None else {**row.inputs, "prompt_token_ids": ids}
        adapter = self._adapters.get(row.job.model)
        answer = await self._llm.add_request(choice.request_id, inputs, params, lora_request=adapter)
        # vLLM's output loop calls this for every output. A task that waits for each request, as AsyncLLM.generate has
        # it, would cost a wake-up a token.
        answer.put = lambda output: self._take(choice, output)
        if answer.output is not None:  # it came before
            self._take(choice, answer.output)
        if self._rows.get(row.ticket) is not row:
            await self._llm.abort(choice.request_id)

    def _take(self, choice: Choice, output: Any) -> None:
        row = choice.row
        if self._rows.get(row.ticket) is not row or choice.finish is not None:
            return
        if isinstance(output, Exception):
            if isinstance(output, EngineDeadError) or self._llm.errored:
                self._die(PROCESS_DIED, output)
            else:
                self._fail(row, JobFailedError(f"The engine failed: {output}", code="engine_error"))
            return
        [completion] = output.outputs
        try:
            pieces = choice.take(completion, self._tokenizer.decode, output.prompt_logprobs)
        except FastchatQError as error:
            self._fail(row, error)
        except Exception as error:  # what cannot be read of it is this request's alone
            log.exception("output not understood", job=row.job.id)
            self._fail(row, JobFailedError(f"The engine failed: {error!r}", code="engine_error"))
        else:
            if choice.finish is not None and completion.finish_reason is None:
                self._spawn(self._llm.abort(choice.request_id))
            self._pass_on(row, pieces)

    def _pass_on(self, row: Row, pieces: tuple[Piece, ...]) -> None:
        if all(choice.finish for choice in row.choices):
            self._end(row, pieces)
        elif pieces:
            self._give(Output(row.ticket, pieces))

    def _end(self, row: Row, pieces: tuple[Piece, ...]) -> None:
        usage = Usage(sum(map(len, row.prompts)), sum(choice.tokens for choice in row.choices))
        self._forget(row.ticket)
        first = row.choices[0]
        stop = first.stop if first.stop in row.job.sampling.stop else None  # not one of the model's family
        self._give(Output(row.ticket, pieces, Ended(usage, first.finish, stop=stop)))

    def _fail(self, row: Row, error: FastchatQError) -> None:
        if self._rows.get(row.ticket) is row:
            self._abort(row)
            self._give(Output(row.ticket, ended=Ended(error=error)))

    def _cancel(self, ticket: str) -> None:
        row = self._rows.get(ticket)
        if row is not None:
            self._abort(row)
        self._take_back(ticket)

    def _abort(self, row: Row) -> None:
        self._forget(row.ticket)
        running = [choice.request_id for choice in row.choices if choice.finish is None]
        if running:
            self._spawn(self._llm.abort(running))

    def _forget(self, ticket: str) -> None:
        del self._rows[ticket]
        self.resting = not self._rows

    async def _load_adapters(self) -> None:
        """At once, and not with the first request: vLLM's process would die of one that does not fit."""
        for name, adapter in self._adapters.items():
            try:
                await self._llm.add_lora(adapter)
            except EngineDeadError as error:
                self._die(PROCESS_DIED, error)
            except Exception as error:
                self._die(f"LoRA adapter {name!r} ({adapter.lora_path}) cannot be served: {error}", error)

    async def _pulse(self) -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            if self._llm.errored:
                self._die(PROCESS_DIED, self._llm.dead_error)
                return
            if self._rows and time.monotonic() - self.progress() > PULSE_S:
                try:
                    await self._llm.is_sleeping()  # answered between two steps
                except EngineDeadError as error:
                    self._die(PROCESS_DIED, error)
                    return
                self.alive()

    def _die(self, why: str, cause: BaseException) -> None:
        if self.failure is None:
            self.failure = VllmDiedError(why)
            self.failure.__cause__ = cause
            assert self._on_death is not None
            self._on_death()
