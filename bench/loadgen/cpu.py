"""CPU time of processes over a run: user + system, all threads, children excluded."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from .config import ConfigError


class CpuClock:
    """Runs from when it is made. Raises ConfigError for a process that cannot be read."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._before_s: dict[str, float] = {}
        for name, pid in pids.items():
            try:
                self._before_s[name] = _read_s(pid)
            except OSError as error:
                raise ConfigError(f"CPU time of {name}={pid} cannot be read: {error}") from error
        self._own_before_s = time.process_time()

    def used_s(self) -> list[tuple[str, float | None]]:
        """Seconds by name, "loadgen" (the generator itself) last; None for a process that is gone."""
        own_s = time.process_time() - self._own_before_s
        used: list[tuple[str, float | None]] = []
        for name, pid in self._pids.items():
            try:
                used.append((name, _read_s(pid) - self._before_s[name]))
            except OSError:
                used.append((name, None))
        return [*used, ("loadgen", own_s)]


def _read_s(pid: int) -> float:
    """CPU seconds so far, in clock ticks of usually 10 ms (proc_pid_stat(5), fields 14 and 15). Raises OSError."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")
