"""Drives an engine from a test's own thread: submit, wait for tokens, wait for ends."""

import queue
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fastchat_q.workers.engines.base import Ended, Engine, Output, Request

from fastchat_q.events import FinishReason, Piece, Usage
from fastchat_q.jobs import Job, Message, Sampling

PATIENCE_S = 60.0


@dataclass
class Answer:
    """All that an engine said of one job so far."""

    outputs: list[Output] = field(default_factory=list)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token for piece in self.pieces for token in piece.ids)

    @property
    def pieces(self) -> list[Piece]:
        return [piece for output in self.outputs for piece in output.pieces]

    @property
    def chunks(self) -> list[str]:
        """The text of each output, empty ones included."""
        return ["".join(piece.text for piece in output.pieces) for output in self.outputs]

    @property
    def text(self) -> str:
        return "".join(self.chunks)

    @property
    def ended(self) -> Ended | None:
        return self.outputs[-1].ended if self.outputs else None

    @property
    def finish_reason(self) -> FinishReason | None:
        assert self.ended is not None
        assert self.ended.error is None, self.ended.error
        return self.ended.finish_reason

    @property
    def usage(self) -> Usage | None:
        assert self.ended is not None
        return self.ended.usage


def job(
    job_id: str,
    text: str = "hi",
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    n: int = 1,
) -> Job:
    """A job with one user message; greedy unless told otherwise."""
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop, ignore_eos=ignore_eos, n=n
    )
    return Job(id=job_id, model="m", messages=(Message(role="user", content=text),), sampling=sampling)


class Driver:
    """A started engine and what it said. A job's outputs after its end fail the test."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.order: list[str] = []
        """The job of each output, as they came."""
        self._answers: dict[str, Answer] = {}
        self._steps: queue.Queue[list[Output] | None] = queue.Queue()
        engine.start(self._steps.put, lambda: self._steps.put(None))

    def submit(self, *jobs: Job) -> None:
        for one in jobs:
            self.resume(one, ())

    def resume(self, one: Job, prior_ids: Iterable[int]) -> None:
        prior = tuple(prior_ids)
        self.resume_behind(one, [Piece(prior)] if prior else [])

    def resume_behind(self, one: Job, prior: Iterable[Piece]) -> None:
        self.take(Request(one, one.id, tuple(prior)))

    def take(self, request: Request) -> None:
        self._answers[request.job.id] = Answer()
        self.engine.submit(request)

    def wait_text(self, job_id: str, text: str) -> None:
        """Returns when a job has said this."""
        self._until(lambda: self._answers[job_id].text == text)

    def wait(self, *job_ids: str) -> list[Answer]:
        """Returns when all of these jobs have ended."""
        answers = [self._answers[job_id] for job_id in job_ids]
        self._until(lambda: all(answer.ended for answer in answers))
        return answers

    def wait_tokens(self, job_id: str, count: int) -> None:
        """Returns when a job has at least so many tokens."""
        self._until(lambda: len(self._answers[job_id].ids) >= count)

    def run(self, *jobs: Job) -> list[Answer]:
        """Submits jobs together and waits for their ends."""
        self.submit(*jobs)
        return self.wait(*(one.id for one in jobs))

    def answer(self, job_id: str) -> Answer:
        """What came for a job so far, ended or not."""
        return self._answers[job_id]

    def _until(self, fact: Callable[[], bool]) -> None:
        while not fact():
            outputs = self._steps.get(timeout=PATIENCE_S)
            assert outputs is not None, f"the engine's loop died: {self.engine.failure!r}"
            for output in outputs:
                answer = self._answers[output.ticket]
                assert answer.ended is None, f"{output} after the end"
                answer.outputs.append(output)
                self.order.append(output.ticket)
