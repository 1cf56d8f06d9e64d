"""Which rows go through the model in the next step: those that decode, and as much of prompts as time allows.

First come, first served. When KV memory is full, requests wait, and the youngest row gives its memory up and is
computed again later; no request fails for want of memory that others hold. That the device has less of it than was
reckoned is no different. Knows rows and times, no text.
"""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import structlog

from ..trouble import is_out_of_memory
from .passes import Chunk, Row, Way

log = structlog.get_logger()

STALL_S = 0.05
"""Prompts may make a step so much longer while others wait for their next token, or twice as long if it is longer."""
IDLE_STALL_S = 0.25
"""The same while nobody does: what comes meanwhile waits so long."""
SMALLEST_PIECE, SMALLEST_IDLE_PIECE = 64, 512
"""Prompt tokens of a step that go in any case; a forward pass for less would not be worth it."""
LARGEST_PIECE = 8192
SMOOTHING = 0.3
"""The weight of the newest measurement."""


@dataclass(eq=False, slots=True)
class Run:
    """A row with the tokens that it begins with; ``owner`` is whoever submitted it."""

    row: Row
    ids: list[int]
    owner: Any
    starved: bool = False
    """It gave its memory up, and waits for some."""


class NoRoomError(MemoryError):
    """There is no memory for this run though no other has any."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"no room for {len(run.ids)} tokens")
        self.run = run


class Pace:
    """Learns how long decoding takes and how many prompt tokens go through in a second."""

    def __init__(self) -> None:
        self._decode_s = 0.0
        self._tokens_per_s = 0.0

    def tokens(self, *, decoding: bool) -> int:
        """Prompt tokens that the next step should take."""
        stall_s = max(STALL_S, self._decode_s) if decoding else IDLE_STALL_S
        smallest = SMALLEST_PIECE if decoding else SMALLEST_IDLE_PIECE
        return min(max(smallest, int(self._tokens_per_s * stall_s)), LARGEST_PIECE)

    def note(self, decoding: bool, prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        if not prompt_tokens:
            if decoding:  # a step that only looked whether something is ready says nothing
                self._decode_s = _smooth(self._decode_s, seconds)
        elif prompt_tokens >= SMALLEST_PIECE // 2:  # fewer say more about what a pass costs than what a token costs
            spent = max(seconds - (self._decode_s if decoding else 0.0), seconds / 4)
            self._tokens_per_s = _smooth(self._tokens_per_s, prompt_tokens / spent)


def _smooth(before: float, now: float) -> float:
    return now if before == 0 else before + SMOOTHING * (now - before)


class Scheduler:
    """Holds all runs of an engine: those that wait, those whose prompt is being taken in, and those that decode."""

    def __init__(self, way: Way, most_scored: int = LARGEST_PIECE) -> None:
        """
        Args:
            most_scored: prompt tokens of a step of which the logits are kept, where a way splits prompts.
        """
        self._way = way
        self._most_scored = self._scored_left = most_scored
        self._waiting: deque[Run] = deque()
        self._prefilling: list[Run] = []
        self._running: list[Run] = []
        self._pace = Pace()
        self._full = False
        self._runs: dict[Row, Run] = {}
        self._began = 0.0
        self._planned = (False, 0)
        self.preempted = 0
        """How often a row gave its memory up."""

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, row: Row) -> bool:
        return row in self._runs

    @property
    def starved(self) -> list[Run]:
        """Those that gave their memory up and wait for some."""
        return [run for run in self._waiting if run.starved]

    def submit(self, run: Run, *, next_in_line: bool = False) -> None:
        """Takes a run in that has no memory yet."""
        self._runs[run.row] = run
        if next_in_line:
            self._waiting.appendleft(run)
        else:
            self._waiting.append(run)

    def run_of(self, row: Row) -> Run:
        return self._runs[row]

    def join(self, run: Run) -> None:
        """Takes a run in whose prompt is computed, as a fork of another."""
        self._runs[run.row] = run
        self._running.append(run)

    def leave(self, runs: Iterable[Run]) -> None:
        """Forgets runs and frees what they have."""
        gone = {run.row for run in runs if self._runs.pop(run.row, None) is not None}
        if not gone:
            return
        self._full = False
        for row in gone:
            self._way.release(row)
        self._waiting = deque(run for run in self._waiting if run.row not in gone)
        self._prefilling = [run for run in self._prefilling if run.row not in gone]
        self._running = [run for run in self._running if run.row not in gone]

    def restart(self, run: Run, *, starved: bool) -> None:
        """Has a run give its memory up and be computed again.

        Args:
            starved: for want of memory: not before others have given some back.
        """
        self._way.release(run.row)
        (self._prefilling if run in self._prefilling else self._running).remove(run)
        run.ids = run.owner.tokens()
        run.starved = starved
        self._waiting.appendleft(run)
        self._full = self._full or starved

    def plan(self) -> tuple[list[Row], list[Chunk]]:
        """Rows that decode, each with room for a token more, and chunks of prompts.

        Raises:
            NoRoomError: a run can never be served. Nothing is planned then.
        """
        self._make_room()
        decode = [run.row for run in self._running]
        chunks: list[Chunk] = []
        tokens = self._pace.tokens(decoding=bool(decode))
        left, self._scored_left = tokens, self._most_scored
        for run in self._prefilling:
            if left > 0:
                left -= self._take(run, left, chunks)
        while self._waiting and left > 0 and not (self._full and self._running):
            run = self._waiting[0]
            most, at_once = left, tokens
            if run.row.scored:
                most, at_once = min(left, self._scored_left), min(tokens, self._most_scored)
            whole = len(run.ids) <= most or not self._way.splits_prompts or bool(run.row.inputs)
            if not whole and chunks and (len(run.ids) <= at_once or not most):
                break  # whole in the next step is sooner and cheaper than in two chunks
            if not self._reserve(run.row, len(run.ids) + 1, prompt=not whole):
                if not self._running and not self._prefilling:
                    raise NoRoomError(run)
                break
            self._waiting.popleft()
            run.starved = False
            if not run.row.inputs and not run.row.scored:
                self._way.load_prefix(run.row, run.ids)
            self._prefilling.append(run)
            left -= self._take(run, left, chunks)
        self._full = self._full and bool(self._running)
        self._began = time.monotonic()
        self._planned = bool(decode), sum(len(chunk.ids) for chunk in chunks)
        return decode, chunks

    def done(self, rows: Iterable[Row]) -> None:
        """Rows that logits came for: those whose prompt ended decode from now on."""
        self._pace.note(*self._planned, time.monotonic() - self._began)
        if self._prefilling:
            new = {row for row in rows if row in self and row.length >= len(self._runs[row].ids)}
            for run in [run for run in self._prefilling if run.row in new]:
                if not run.row.inputs:
                    self._way.save_prefix(run.row, run.ids)
                self._prefilling.remove(run)
                self._running.append(run)

    def _take(self, run: Run, left: int, chunks: list[Chunk]) -> int:
        row = run.row
        rest = len(run.ids) - row.length
        if row.scored:
            left = min(left, self._scored_left)
            if not left:
                return 0
        taken = min(rest, left) if self._way.splits_prompts and not row.inputs else rest
        if row.scored:
            self._scored_left -= min(taken, left)
        ids = run.ids if taken == len(run.ids) else run.ids[row.length : row.length + taken]
        chunks.append(Chunk(row, ids, last=taken == rest))
        return taken

    def _make_room(self) -> None:
        """Room for the next token of all that decode; the youngest give their memory up if there is none."""
        for run in list(self._running):
            while run.row.memory is not None and not self._reserve(run.row, run.row.length + 1):
                self._preempt((self._prefilling or self._running)[-1])

    def _preempt(self, run: Run) -> None:
        self.restart(run, starved=True)
        self.preempted += 1

    def _reserve(self, row: Row, columns: int, *, prompt: bool = False) -> bool:
        """Room for a row, if what nobody needs has to be given back for it."""
        for _ in range(2):
            try:
                return self._way.reserve(row, columns, prompt=prompt)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self._way.reset()
        log.warning("no memory for a row", columns=columns, decoding=len(self._running), waiting=len(self._waiting))
        self._full = True
        return False
