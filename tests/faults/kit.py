"""What fault tests share: recorders of streams, frozen processes, skewed clocks, and what must hold afterwards."""

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastchat_q import keys, scripts
from tests.servers import TOOLS
from tests.stack import Stack, wait_until
from tests.streams import LONG, block_text, resume, start_stream

CLOCK = """
import time
from time import time as now, time_ns as now_ns
time.time = lambda: now() + {offset_s}
time.time_ns = lambda: now_ns() + {offset_s} * 10**9
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a stream: when it came, and the id of its event."""

    at: float
    """Seconds, monotonic."""
    text: str
    id: int


class Recorder:
    """A client that reads a stream on a thread of its own and notes what came when."""

    def __init__(self, port: int, body: dict[str, Any] = LONG, *, behind: tuple[str, int] | None = None) -> None:
        """Sends ``body``; or goes on reading a job by its public id, behind an event."""
        self.pieces: list[Piece] = []
        self.job_id: str | None = None
        """As in Redis, without the model's slug."""
        self.public_id: str | None = None
        self._failure: BaseException | None = None
        self._connection = resume(port, *behind) if behind else start_stream(port, body)
        self._thread = threading.Thread(target=self._record, name="recorder")
        self._thread.start()

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(piece.text for piece in self.pieces)

    def wait_words(self, count: int, timeout_s: float = 30.0) -> None:
        """Returns when so many words are there."""
        wait_until(lambda: self._failure or len(self.text.split()) >= count, f"{count} words", timeout_s)
        if self._failure is not None:
            raise self._failure

    def finish(self, timeout_s: float = 30.0) -> str:
        """The whole text, once the stream has ended as it should; raises what went wrong."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still open after {timeout_s:g} s: …{self.text[-80:]!r}"
        if self._failure is not None:
            raise self._failure
        return self.text

    @property
    def last_id(self) -> int:
        """The id of the last event with text."""
        return self.pieces[-1].id if self.pieces else 0

    def longest_pause_s(self) -> float:
        """Between two pieces."""
        times = [piece.at for piece in self.pieces]
        return max(after - before for before, after in itertools.pairwise(times))

    def close(self) -> None:
        """Hangs up."""
        self._connection.hang_up()
        self._thread.join(10)

    def _record(self) -> None:
        try:
            status, headers = self._connection.head()
            assert status == 200, (status, self._connection.rest())
            self.public_id = headers["x-job-id"]
            self.job_id = self.public_id.rpartition(".")[2]
            last = ""
            for block in self._connection.events():
                if not block.startswith("data: "):
                    continue  # a comment
                last = block.removeprefix("data: ")
                if last.startswith("{"):
                    self.pieces.append(Piece(time.monotonic(), block_text(block), self._connection.ids[-1]))
            assert last == "[DONE]", last
        except BaseException as error:
            self._failure = error


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """SIGSTOP, and SIGCONT afterwards."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def skewed(folder: Path, offset_s: int) -> dict[str, str]:
    """The environment of a Python process whose wall clock is off by ``offset_s``; monotonic clocks are not."""
    place = folder / f"clock{offset_s}"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(CLOCK.format(offset_s=offset_s))
    return {"PYTHONPATH": str(place)}


def faketime_library() -> Path:
    """libfaketime, installed or as ``.ci/libfaketime`` unpacks it."""
    name = "faketime/libfaketime.so.1"
    places = (Path("/usr/lib"), TOOLS / "libfaketime/usr/lib")
    for path in (found for place in places for found in (*place.glob(name), *place.glob(f"*/{name}"))):
        return path
    raise FileNotFoundError("libfaketime is not installed; .ci/libfaketime fetches Debian's")


def runs(script: str) -> "_Runs":
    """Matches the request that runs a script, for `FaultProxy.lose_reply`."""
    return _Runs(scripts.script(script).sha.encode())


@dataclass(frozen=True, slots=True)
class _Runs:
    sha: bytes

    def __call__(self, frame: bytes) -> bool:
        return self.sha in frame[:100]


def assert_log_is(stack: Stack, model: str, recorder: Recorder) -> None:
    """The token log of the recorder's job is complete, in order, and says what its client read."""
    assert recorder.job_id is not None
    entries = stack.redis.xrange(keys.model_keys(model).log(recorder.job_id))
    n = 0
    for entry_id, fields in entries:
        n += int(fields["k"])
        assert entry_id == f"0-{n}"
    assert "".join(json.loads(fields["d"])["s"] for _, fields in entries) == recorder.text


def assert_queue_is_clean(stack: Stack, model: str) -> None:
    """Nothing waits or runs, no delivery entry is left, and whatever is left of ended jobs has a TTL."""
    names = keys.model_keys(model)
    wait_until(lambda: stack.live(model) == 0, "no job is left")
    assert stack.running(model) == 0
    for lane in keys.LANES:
        assert stack.redis.zcard(names.waiting(lane)) == 0
        wait_until(
            lambda lane=lane: stack.redis.xlen(names.stream(lane)) == 0, f"no entry is left in {names.stream(lane)}"
        )
    for key in stack.job_keys(model):
        assert stack.redis.ttl(key) > 0, key
