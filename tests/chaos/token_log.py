"""What must hold of a job's token log by itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .engine import TOKEN


@dataclass(slots=True)
class Entry:
    """One entry of a token log."""

    n: int
    k: int
    ids: list[int]
    text: str


def flaws(entries: Sequence[Entry], n: int, attempt: int) -> Iterator[tuple[str, str]]:
    """What is wrong with the log of a job that has ended, and the evidence.

    Args:
        n: tokens, as the record has it.
        attempt: its last attempt, as the record has it.
    """
    at, length = 0, 0
    writers: list[tuple[int, str, str]] = []
    for entry in entries:
        tokens = [TOKEN.fullmatch(token) for token in entry.text.split()]
        places = [int(token[1]) for token in tokens if token]
        expected = list(range(at + 1, at + entry.k + 1))
        if entry.n != at + entry.k or places != expected or entry.ids != expected or None in tokens:
            yield "a log has a gap, or a wrong token", f"{entry} behind {at} tokens"
            return
        at = entry.n
        for token in tokens:
            if token is None:
                continue
            length = int(token[2])
            writer = (int(token[3]), token[4], token[5])
            if not writers or writers[-1] != writer:
                writers.append(writer)
    attempts = [attempt for attempt, _, _ in writers]
    if attempts != sorted(set(attempts)):
        yield "writers interleave in a log", str(writers)
    if at != n:
        yield "the record's count is not that of the log", f"{at} tokens in the log"
    if at > length:
        yield "a log is longer than its job", f"{at} of {length} tokens"
    if attempts and attempts[-1] > attempt:
        yield "a writer has an attempt that the record does not know", str(writers)
