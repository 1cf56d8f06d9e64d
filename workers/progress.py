"""How far the loading of a model is, from the engine's process to its supervisor: lines of JSON through a pipe."""

import contextlib
import json
import os
import time

PROGRESS_FD = "FCQ_PROGRESS_FD"
"""Environment variable: the descriptor that a supervisor reads. No setting: nobody else sets it."""
AT_MOST_EVERY_S = 0.1


class Progress:
    """Tells the supervisor, if there is one. Call it as often as you like."""

    def __init__(self) -> None:
        fd = os.environ.pop(PROGRESS_FD, "")  # not for grandchildren
        self._fd = int(fd) if fd.isdecimal() else None
        self._phase, self._told_at = "", 0.0

    def __call__(self, fraction: float, phase: str) -> None:
        """``fraction`` of the whole, 0 to 1, is done; ``phase`` in a word or two is under way."""
        now = time.monotonic()
        if self._fd is None or (phase == self._phase and now - self._told_at < AT_MOST_EVERY_S and fraction < 1):
            return
        self._phase, self._told_at = phase, now
        with contextlib.suppress(OSError):  # the supervisor is gone, or does not read: loading goes on
            os.write(self._fd, json.dumps([round(fraction, 3), phase]).encode() + b"\n")
