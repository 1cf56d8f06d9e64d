"""An engine whose thread runs an event loop: one task a request. For what is asynchronous by itself, such as a client
of another server; a model of our own wants the step loop of `Engine`.
"""

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog
import uvloop

from fastchat_q.errors import FastchatQError, JobFailedError
from fastchat_q.events import Piece
from fastchat_q.registry import ModelCard

from .base import STOP_S, Ended, Engine, Output, Request, Sink

log = structlog.get_logger()

PULSE_S = 0.5
"""A loop that turns says so this often: it is not hung, and a request that gets nothing meanwhile has stalled."""

Give = Callable[[Piece], None]


class LoopEngine(Engine):
    """An engine without a step loop: what the requests got in one turn of an event loop is handed over together."""

    _loop: asyncio.AbstractEventLoop

    def __init__(self, card: ModelCard, slots: int) -> None:
        super().__init__(card, slots)
        self._outputs: list[Output] = []

    def _give(self, output: Output) -> None:
        if not self._outputs:
            self._loop.call_soon(self._hand_over)
        self._outputs.append(output)

    def _hand_over(self) -> None:
        outputs, self._outputs = self._outputs, []
        self._got_on()
        if outputs:
            assert self._sink is not None
            self._sink(outputs)

    def _got_on(self) -> None:
        self.steps += 1
        self.alive()

    def _take_back(self, ticket: str) -> None:
        """Hands nothing over that a request got in this turn."""
        self._outputs = [output for output in self._outputs if output.ticket != ticket]

    def admit(self, request: Request) -> None:
        raise NotImplementedError("it has no step loop")

    def drop(self, ticket: str) -> None:
        raise NotImplementedError("it has no step loop")

    def step(self) -> list[Output]:
        raise NotImplementedError("it has no step loop")

    def wait_s(self) -> float | None:
        raise NotImplementedError("it has no step loop")


class AsyncEngine(LoopEngine):
    """One task a request.

    A subclass implements `serve`. What must live on the loop (a client, a connection) is made in `opened` and ended in
    `closing`; what runs beside the requests is a coroutine of `duties`. A request that is cancelled has its task
    cancelled, and `serve` releases in ``finally`` what it holds.
    """

    def __init__(self, card: ModelCard, slots: int) -> None:
        super().__init__(card, slots)
        self._loop = uvloop.new_event_loop()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()

    @abstractmethod
    async def serve(self, request: Request, give: Give) -> Ended:
        """Serves one request; each piece goes to ``give`` as it comes.

        Raises:
            FastchatQError: the request ends with it.
        """

    async def opened(self) -> None:
        """Called on the loop before the first request."""

    async def closing(self) -> None:
        """Called on the loop behind the last request."""

    def duties(self) -> list[Coroutine[Any, Any, None]]:
        """What runs beside the requests until the engine stops. If one fails, the engine dies."""
        return []

    def start(self, sink: Sink, on_death: Callable[[], None]) -> None:
        self.resting = False  # from here on the pulse tells
        super().start(sink, on_death)

    def submit(self, request: Request) -> None:
        self._tell(self._begin, request)

    def cancel(self, ticket: str) -> None:
        self._tell(self._drop, ticket)

    def stop(self) -> None:
        self._tell(self._stopping.set)
        self._thread.join(STOP_S)

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        """From any thread; nobody is left to be told once the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _run(self) -> None:
        assert self._on_death is not None
        try:
            self._loop.run_until_complete(self._live())
        except BaseException as error:  # the edge of the thread: the worker ends the process and says why
            self.failure = error
            self._on_death()
        finally:
            self._loop.close()

    async def _live(self) -> None:
        await self.opened()
        try:
            async with asyncio.TaskGroup() as group:
                duties = [group.create_task(duty) for duty in (self._pulse(), *self.duties())]
                await self._stopping.wait()
                for duty in duties:
                    duty.cancel()
        finally:
            await self._end_all()
            await self.closing()

    async def _end_all(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pulse(self) -> None:
        while True:
            self._got_on()
            await asyncio.sleep(PULSE_S)

    def _begin(self, request: Request) -> None:
        self._tasks[request.ticket] = self._loop.create_task(self._serve(request))

    def _drop(self, ticket: str) -> None:
        task = self._tasks.pop(ticket, None)
        if task is not None:
            task.cancel()
            self._take_back(ticket)

    async def _serve(self, request: Request) -> None:
        ticket = request.ticket
        ended = await _ended(self.serve(request, lambda piece: self._give(Output(ticket, (piece,)))), request.job.id)
        if self._tasks.pop(ticket, None) is not None:
            self._give(Output(ticket, ended=ended))


async def _ended(serving: Awaitable[Ended], job_id: str) -> Ended:
    """How a request ends, whatever happens to it but a cancellation."""
    try:
        return await serving
    except FastchatQError as error:
        return Ended(error=error)
    except Exception as error:  # one bad request fails alone
        log.exception("request failed", job=job_id)
        return Ended(error=JobFailedError(f"The engine failed: {type(error).__name__}.", code="engine_error"))
