"""Workers whose engine says what the request tells it to: ``python -m tests.scripted_worker URL MODEL KIND``.

For what the API makes of pieces, whatever engine they come from. KIND ``chat``: the last user message is a `Script`, or
``job``, which is answered with the job as it reached the worker. ``embed`` and ``rerank`` compute small vectors from
the inputs alone.
"""

import base64
import hashlib
import struct
import sys
import time
from typing import Any, get_args

import orjson
from fastchat_q.workers.engines.base import Ended, Engine, Output, Request
from fastchat_q.workers.main import serve
from fastchat_q.workers.worker import Limits

from fastchat_q import logs
from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import Piece, Usage, decode_delta, encode_payload
from fastchat_q.jobs import Feature, Job
from fastchat_q.registry import ModelCard

NOT_PLAYED = {"completions", "prompt_logprobs", "tokenize"}
"""Features of models: a script is of a chat."""
SIZE = 8
"""Numbers in a vector."""


def script(*steps: Any, finish: str = "stop", delay_ms: float = 0.0) -> str:
    """A message that has the engine say these pieces (a piece or a list of them a step) and end so."""
    payloads = [encode_payload(step if isinstance(step, list) else [step]).decode() for step in steps]
    return orjson.dumps({"steps": payloads, "finish": finish, "delay_ms": delay_ms}).decode()


def vector(one: str | tuple[int, ...]) -> list[float]:
    """What an input is embedded as: numbers that float32 holds exactly, the same for equal inputs only."""
    digest = hashlib.sha256(repr(one).encode()).digest()
    return [byte / 256 for byte in digest[:SIZE]]


def score(query: str, document: str) -> float:
    """How relevant a document is: the part of the query's words that it has."""
    words = set(query.lower().split())
    return len(words & set(document.lower().split())) / len(words)


def encoded(numbers: list[float]) -> str:
    """As a piece has it."""
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


class ScriptedEngine(Engine):
    """Plays scripts, one step of each at a time."""

    def __init__(self, name: str, kind: Any) -> None:
        features = tuple(set(get_args(Feature)) - NOT_PLAYED) if kind == "chat" else ()
        super().__init__(ModelCard(name, "scripted", 4096, int(time.time()), kind=kind, features=features), 64)
        self._rows: dict[str, list[tuple[float, Output]]] = {}

    def admit(self, request: Request) -> None:
        steps, finish, delay_s, prompt = _steps(request.job)
        before = sum(piece.k for piece in request.prior)
        rows, n, when = [], 0, time.monotonic()
        for pieces in steps:
            n += sum(piece.k for piece in pieces)
            if n > before:
                when += delay_s
                rows.append((when, Output(request.ticket, pieces)))
        rows.append((when, Output(request.ticket, (), Ended(Usage(prompt, n), finish))))
        self._rows[request.ticket] = rows

    def drop(self, ticket: str) -> None:
        self._rows.pop(ticket, None)

    def wait_s(self) -> float | None:
        due = [rows[0][0] for rows in self._rows.values()]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def step(self) -> list[Output]:
        outputs = [rows.pop(0)[1] for rows in self._rows.values() if rows[0][0] <= time.monotonic()]
        self._rows = {ticket: rows for ticket, rows in self._rows.items() if rows}
        return outputs


def _steps(job: Job) -> tuple[list[tuple[Piece, ...]], Any, float, int]:
    if job.kind == "embed":
        vectors = [encoded(vector(one)[: job.dimensions]) for one in job.inputs]
    elif job.kind == "rerank":
        vectors = [encoded([score(job.query or "", str(one))]) for one in job.inputs]
    elif job.messages[-1].text == "job":
        return [(Piece((1,), job.to_spec()),)], "stop", 0.0, 1
    else:
        try:
            raw = orjson.loads(job.messages[-1].text)
            steps = [decode_delta(0, 0, step.encode()).pieces for step in raw["steps"]]
            return steps, raw["finish"], raw["delay_ms"] / 1000, 7
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError("The last message is no script.", param="messages") from error
    return [(Piece(vector=one, choice=n, units=1),) for n, one in enumerate(vectors)], "stop", 0.0, len(vectors)


def main() -> None:
    """Serves until SIGTERM."""
    url, model, kind = sys.argv[1:]
    logs.configure()
    serve(ScriptedEngine(model, kind), Limits(drain_s=5), url, None)


if __name__ == "__main__":
    main()
