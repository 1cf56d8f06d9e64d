"""Keeps child processes running: starts, restarts with backoff, and stops them; none outlives its parent."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
STABLE_S = 30.0
"""A child that ran this long starts over at the shortest backoff."""
PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class Child:
    """One supervised process.

    Args:
        name: shown to people.
        command: argv.
        log_file: gets what it prints; appended to.
        environment: added to this process's own.
        on_exit: called with (exit code, seconds until it starts again).
    """

    name: str
    command: Sequence[str]
    log_file: Path
    environment: Mapping[str, str]
    on_exit: Callable[["Child", int, float], None]
    process: asyncio.subprocess.Process | None = None
    stopping: bool = False
    _task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int | None:
        """The pid of the running process; None between two runs."""
        process = self.process
        return process.pid if process is not None and process.returncode is None else None

    def start(self, group: asyncio.TaskGroup) -> None:
        """Runs it, and again whenever it ends, as a task of ``group``."""
        self._task = group.create_task(self._keep_running(), name=self.name)

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL after ``timeout_s``; returns when it is gone for good."""
        self.stopping = True
        if self._task is None:
            return
        if self.pid is None:
            self._task.cancel()  # it was waiting to be started again
        else:
            self._signal(signal.SIGTERM)
        _, late = await asyncio.wait([self._task], timeout=timeout_s)
        if late:
            self._signal(signal.SIGKILL)
            await asyncio.wait([self._task])

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                self.process.send_signal(number)

    def last_words(self) -> str:
        """The last line that it printed."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].strip() if lines else ""

    async def _keep_running(self) -> None:
        failures = 0
        while not self.stopping:
            began = time.monotonic()
            code = await self._run_once()
            if self.stopping:
                return
            failures = 0 if time.monotonic() - began > STABLE_S else failures
            delay = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
            failures += 1
            self.on_exit(self, code, delay)
            await asyncio.sleep(delay)

    async def _run_once(self) -> int:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.environment},
                start_new_session=True,  # a Ctrl-C in the terminal is ours to pass on, in our order
                preexec_fn=die_with_parent(os.getpid()),
            )
        try:
            return await self.process.wait()
        except asyncio.CancelledError:
            if self.process.returncode is None:
                self.process.kill()
                await self.process.wait()
            raise


def die_with_parent(parent: int) -> Callable[[], None] | None:
    """What a child runs before exec, so that SIGKILL of its parent takes it along. Linux only; elsewhere None."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: after the fork nothing may be imported

    def set_death_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return set_death_signal
