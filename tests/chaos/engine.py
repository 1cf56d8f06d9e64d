"""The engine of the chaos run: no model, and every token's text names its writer. Not for anything else."""

import heapq
import os
import random
import re
import signal
import time
from dataclasses import dataclass

from fastchat_q.workers.engines.base import Ended, Engine, Output, Request
from pydantic import BaseModel, ConfigDict

from fastchat_q.errors import JobFailedError
from fastchat_q.events import Piece, Usage
from fastchat_q.registry import ModelCard

TOKEN = re.compile(r"(\d+)/(\d+):(\d+)-(\w+):(\d+)")
"""A token: its place, the job's length, the attempt and nonce of the claim that wrote it, the pid."""
PACE = (0.4, 1.6)
"""Claims run at different speeds, so that a late writer can catch up with the one who took over."""


class Orders(BaseModel):
    """What a client asks of the engine, as JSON in the user's message. The length is the request's ``max_tokens``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    delay_ms: float
    """Mean time of a token."""
    poison_at: int | None = None
    """The process kills itself when it has this many tokens."""


@dataclass(slots=True)
class _Row:
    ticket: str
    orders: Orders
    length: int
    delay_s: float
    attempt: int
    writer: str
    done: int

    def ended(self) -> Ended | None:
        """The end, once all tokens are there; its prompt tokens name the attempt that wrote it."""
        return Ended(Usage(self.attempt, self.done), "length") if self.done >= self.length else None


class ChaosEngine(Engine):
    """Says ``<place>/<length>:<fence>:<pid>`` for each token; takes the arguments of the echo engine."""

    def __init__(self, name: str, slots: int, token_delay_s: float) -> None:
        super().__init__(ModelCard(name, "chaos", None, int(time.time())), slots)
        self._default_delay_s = token_delay_s
        self._rows: dict[str, _Row] = {}
        self._due: list[tuple[float, int, _Row]] = []  # heap: when, tie-break, row
        self._count = 0

    def admit(self, request: Request) -> None:
        before = len(request.prior_ids())
        if request.prior_ids() != tuple(range(1, before + 1)):
            raise JobFailedError(f"A resumed job came with the tokens {request.prior_ids()}.", code="wrong_prior")
        orders = Orders.model_validate_json(request.job.messages[-1].text)
        fence = request.ticket.split()[1]
        pace = random.Random(fence).uniform(*PACE)
        row = _Row(
            request.ticket,
            orders,
            request.job.sampling.max_tokens or 1,
            (orders.delay_ms / 1000 or self._default_delay_s) * pace,
            int(fence.partition("-")[0]),
            f"{fence}:{os.getpid()}",
            before,
        )
        self._rows[row.ticket] = row
        self._schedule(row, 0.0)

    def drop(self, ticket: str) -> None:
        self._rows.pop(ticket, None)  # its place in the heap is skipped when it comes up

    def wait_s(self) -> float | None:
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def step(self) -> list[Output]:
        outputs = []
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            row = heapq.heappop(self._due)[2]
            if self._rows.get(row.ticket) is row:
                outputs.append(self._advance(row))
        return outputs

    def _advance(self, row: _Row) -> Output:
        if row.orders.poison_at is not None and row.done >= row.orders.poison_at:
            os.kill(os.getpid(), signal.SIGKILL)
        ids: tuple[int, ...] = ()
        text = ""
        if row.done < row.length:  # else an earlier attempt wrote the last token, and not the end
            row.done += 1
            ids, text = (row.done,), f"{row.done}/{row.length}:{row.writer} "
        ended = row.ended()
        if ended is None:
            self._schedule(row, row.delay_s)
        else:
            del self._rows[row.ticket]
        return Output(row.ticket, (Piece(ids, text),) if ids else (), ended)

    def _schedule(self, row: _Row, delay_s: float) -> None:
        self._count += 1  # from now, not from when it was due: a frozen process goes on at its pace, without a burst
        heapq.heappush(self._due, (time.monotonic() + delay_s, self._count, row))
