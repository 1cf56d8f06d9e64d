"""What an engine is to a worker, and the thread that every engine of ours runs on. Knows no Redis and no torch."""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import structlog

from fastchat_q.errors import FastchatQError, JobFailedError
from fastchat_q.events import FinishReason, Piece, Usage
from fastchat_q.jobs import Job
from fastchat_q.registry import ModelCard

log = structlog.get_logger()


class CannotResumeError(JobFailedError):
    """The rest of an answer cannot be had here: what is made now would not begin with what was sent."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"The worker died in the middle of the answer, and it cannot be continued: {why}. Send the request again.",
            status=502,
            code="cannot_resume",
        )


@dataclass(frozen=True, slots=True)
class Request:
    """A claimed job for the engine. ``prior`` is what earlier attempts left in the log, oldest first.

    ``ticket`` names this claim in all that the engine says: a worker that lost a job and claimed it again must not take
    what a step in between still made for the first claim as output of the second.
    """

    job: Job
    ticket: str
    prior: tuple[Piece, ...] = ()
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    """The images of the job, by name."""

    def prior_ids(self, choice: int = 0) -> tuple[int, ...]:
        """The tokens that a choice has already.

        Raises:
            CannotResumeError: they came from a server that tells no ids.
        """
        if any(piece.units and not piece.echo for piece in self.prior):
            raise CannotResumeError("another server began it, which told no token ids")
        return tuple([i for piece in self.prior if piece.choice == choice for i in piece.ids])

    def has_echoed(self, choice: int) -> bool:
        """Whether a choice has told its prompt already."""
        return any(piece.echo and piece.choice == choice for piece in self.prior)


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine is done with a job: a finish reason with usage, or an error."""

    usage: Usage | None = None
    finish_reason: FinishReason | None = None
    error: FastchatQError | None = None
    stop: str | None = None
    """The stop string of the job that ended the answer, where the engine knows it."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one step gave one job: its new tokens with what became safe to show, and the end if it came."""

    ticket: str
    pieces: tuple[Piece, ...] = ()
    ended: Ended | None = None


STOP_S = 5.0

OUT_OF_MEMORY = "out_of_memory"
"""Code of the error of a job that did not fit beside the others into memory."""
UPSTREAM_BUSY = "upstream_busy"
"""Code of the error of a job that another server, to which it was forwarded, does not take now."""
FEWER_AT_A_TIME = {OUT_OF_MEMORY: 60.0, UPSTREAM_BUSY: 5.0}
"""Errors after which the worker takes fewer jobs at a time -> seconds after which it takes one more again."""

Sink = Callable[[list[Output]], None]
"""Gets all outputs of a step in one call, on the engine's thread."""


class Engine(ABC):
    """A step loop on its own thread: requests join and leave between steps. All public methods are thread-safe.

    A subclass implements `admit`, `drop`, `step` and `wait_s`, which run on the engine's thread only. Within a step
    that may take long it says `alive` whenever it gets on, or `busy_for` before work that cannot say so.
    """

    def __init__(self, card: ModelCard, slots: int) -> None:
        self.card = card
        self.slots = slots
        self.failure: BaseException | None = None
        self.trouble = ""
        """Why it takes no requests at the moment; what it has goes on."""
        self.steps = 0
        """Steps that are done."""
        self.starved: Set[str] = frozenset()
        """Tickets of requests that wait for memory which others have: for no fault of their own they get no tokens."""
        self.resting = True
        """It waits for a request, or until its next step is due."""
        self._progress = time.monotonic()
        self._inbox: queue.SimpleQueue[Request | str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._sink: Sink | None = None
        self._on_death: Callable[[], None] | None = None

    @property
    def cards(self) -> Sequence[ModelCard]:
        """What it serves: its model, and adapters of it, each asked for by its own name."""
        return (self.card,)

    def start(self, sink: Sink, on_death: Callable[[], None]) -> None:
        """Starts the thread. ``on_death`` is called on it if the loop itself fails; see ``failure`` then."""
        self._sink, self._on_death = sink, on_death
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Hands a request over; its outputs go to the sink until one carries ``ended``."""
        self._inbox.put(request)

    def cancel(self, ticket: str) -> None:
        """Drops a request before the next step; no ``ended`` follows from then on."""
        self._inbox.put(ticket)

    def stop(self) -> None:
        """Ends the thread after the current step; returns before that if it takes too long."""
        self._inbox.put(None)
        self._thread.join(STOP_S)

    def progress(self) -> float:
        """When it last got on (time.monotonic); in the future while it is known to be busy for longer."""
        return self._progress

    def alive(self) -> None:
        """It gets on. Cheap enough for every layer of a forward pass."""
        self._progress = max(self._progress, time.monotonic())

    def busy_for(self, seconds: float) -> None:
        """What comes next may take so long without a sign of life, such as the compilation of kernels."""
        self._progress = time.monotonic() + seconds

    @abstractmethod
    def admit(self, request: Request) -> None:
        """Takes a request in.

        Raises:
            FastchatQError: the request cannot be served; it ends with that error.
        """

    @abstractmethod
    def drop(self, ticket: str) -> None:
        """Forgets a request, if it is there."""

    @abstractmethod
    def step(self) -> list[Output]:
        """One step for all admitted requests."""

    @abstractmethod
    def wait_s(self) -> float | None:
        """Seconds until the next step is due; None: nothing to do until a request comes."""

    def _run(self) -> None:
        assert self._sink is not None, "start() was not called"
        assert self._on_death is not None
        try:
            while True:
                outputs: list[Output] = []
                if not self._receive(outputs):
                    return
                outputs += self.step()
                self.steps += 1
                self._progress = time.monotonic()  # also the end of what it was busy for
                if outputs:
                    self._sink(outputs)
        except BaseException as error:  # the edge of the thread: the worker ends the process and says why
            self.failure = error
            self._on_death()

    def _receive(self, outputs: list[Output]) -> bool:
        """Takes in all that waits, at the most until the next step is due; False: stop."""
        while True:
            try:
                timeout = 0.0 if outputs else self.wait_s()
                self.resting = timeout != 0
                item = self._inbox.get(block=timeout != 0, timeout=timeout)
            except queue.Empty:
                return True
            finally:
                self.alive()
                self.resting = False
            if item is None:
                return False
            if isinstance(item, str):
                self.drop(item)
            else:
                self._admit(item, outputs)

    def _admit(self, request: Request, outputs: list[Output]) -> None:
        try:
            self.admit(request)
        except FastchatQError as error:
            outputs.append(Output(request.ticket, ended=Ended(error=error)))
        except BaseException as error:  # one bad request fails alone; a panic of a Rust library is no Exception
            log.exception("admit failed", job=request.job.id)
            failure = JobFailedError(f"The engine failed to take the request in: {error}", code="engine_error")
            outputs.append(Output(request.ticket, ended=Ended(error=failure)))
