"""Which rows have their next token drawn together: as many at a time as there is memory for their logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..tensors import to_device
from .intake import Choice
from .passes import Result
from .scheduler import Run, Scheduler

NUMBERS = 2**25
"""Logits of one draw, if it is of several rows: the sampler has a few copies of them at a time, of 128 MiB each."""


@dataclass(eq=False, slots=True)
class Draw:
    """A token to be drawn for a choice, from a line of the logits of a pass."""

    run: Run
    choice: Choice
    result: Result
    line: int

    @property
    def forks(self) -> bool:
        """The choice goes on from the prompt of a run that is another's."""
        return self.choice is not self.run.owner


def draws_of(results: Sequence[Result], scheduler: Scheduler) -> list[Draw]:
    """All that are to be drawn, forks first; rows that left meanwhile have none."""
    own = [
        Draw(run := scheduler.run_of(row), run.owner, result, line)
        for result in results
        for line, row in enumerate(result.rows)
        if row in scheduler
    ]
    forks = []
    for draw in own:
        if draw.choice.waiting:
            forks += [Draw(draw.run, other, draw.result, draw.line) for other in draw.choice.waiting]
            draw.choice.waiting = []
    return forks + own


def batches(draws: Sequence[Draw]) -> Iterator[list[Draw]]:
    """Draws that go together, in their order; one of a suspect choice goes by itself."""
    batch: list[Draw] = []
    for draw in draws:
        full = (len(batch) + 1) * draw.result.logits.shape[-1] > NUMBERS
        if batch and (full or draw.choice.suspect or batch[-1].choice.suspect):
            yield batch
            batch = []
        batch.append(draw)
    if batch:
        yield batch


def logits_of(batch: Sequence[Draw]) -> torch.Tensor:
    """Logits (draws, vocabulary) float32 that may be overwritten: a copy for forks, as others draw from the same."""
    found = []
    for _, same in groupby(batch, key=lambda draw: id(draw.result)):
        draws = list(same)
        logits, lines = draws[0].result.logits, [draw.line for draw in draws]
        if any(draw.forks for draw in draws) or lines != list(range(lines[0], lines[-1] + 1)):
            found.append(logits[to_device(torch.tensor(lines), logits.device)])
        else:
            found.append(logits[lines[0] : lines[-1] + 1])
    return (found[0] if len(found) == 1 else torch.cat(found)).float()
