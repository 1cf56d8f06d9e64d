"""Keeps child processes running: starts, restarts with backoff, and stops them; none outlives its parent."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
STABLE_S = 30.0
"""A child that ran this long starts over at the shortest backoff."""
PR_SET_PDEATHSIG = 1
REMEMBERED_BYTES = 4096
PIPE_BYTES = 65536


class Output(Protocol):
    """Where a child's output goes, stdout and stderr as one."""

    def attached(self) -> AbstractContextManager[int]:
        """The file descriptor to give to one run of the child, open as long as that run."""

    def last_words(self) -> str:
        """The last line that was printed; empty: none."""


class LogFile:
    """Appends to a file, which may be made with its folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def attached(self) -> Iterator[int]:
        """See `Output`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            yield file.fileno()

    def last_words(self) -> str:
        """See `Output`."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - REMEMBERED_BYTES))
                return _last_line(file.read())
        except OSError:
            return ""


class PassedOn:
    """Passes everything on to this process's own stderr (`docker logs` reads that), and remembers the end of it.

    It is read from a pipe: a child that prints blocks when this process is frozen and the pipe is full.

    Args:
        heard: called when something was printed.
    """

    def __init__(self, heard: Callable[[], None] = lambda: None) -> None:
        self._heard = heard
        self._end = b""

    @contextlib.contextmanager
    def attached(self) -> Iterator[int]:
        """See `Output`. Needs the running event loop."""
        self._end = b""
        loop = asyncio.get_running_loop()
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        loop.add_reader(reader, self._pass_on, reader)
        try:
            yield writer
        finally:
            loop.remove_reader(reader)
            while self._pass_on(reader):  # what it said last; a grandchild may keep the other end open
                pass
            os.close(reader)
            os.close(writer)

    def last_words(self) -> str:
        """See `Output`."""
        return _last_line(self._end)

    def _pass_on(self, reader: int) -> bool:
        try:
            data = os.read(reader, PIPE_BYTES)
        except BlockingIOError:
            return False
        self._end = (self._end + data)[-REMEMBERED_BYTES:]
        if data:
            self._heard()
        with contextlib.suppress(OSError):  # nobody reads our stderr any more; that is no reason to stop
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()
        return bool(data)


@dataclass(slots=True)
class Child:
    """One supervised process.

    Args:
        name: shown to people.
        command: gives the argv; asked before each run.
        output: gets what it prints.
        environment: added to this process's own.
        on_exit: called with (exit code, seconds until it starts again) after a run that nobody asked to end.
        again: False: one run is all.
        pass_fds: descriptors that it inherits.
    """

    name: str
    command: Callable[[], Sequence[str]]
    output: Output
    environment: Mapping[str, str]
    on_exit: Callable[["Child", int, float], None]
    again: bool = True
    pass_fds: Sequence[int] = ()
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
            self.signal(signal.SIGTERM)
        _, late = await asyncio.wait([self._task], timeout=timeout_s)
        if late:
            self.signal(signal.SIGKILL)
            await asyncio.wait([self._task])

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the running process, if there is one."""
        if self.pid is not None and self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                self.process.send_signal(number)

    def last_words(self) -> str:
        """The last line that it printed."""
        return self.output.last_words()

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
            if not self.again:
                return
            await asyncio.sleep(delay)

    async def _run_once(self) -> int:
        with self.output.attached() as output:
            self.process = await asyncio.create_subprocess_exec(
                *self.command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.environment},
                pass_fds=self.pass_fds,
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


def how_it_ended(code: int) -> str:
    """An exit code in words; of a shell's 128 + n as well."""
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    return f"killed by {name}" + (" (out of memory?)" if number == signal.SIGKILL else "")


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


def _last_line(data: bytes) -> str:
    lines = data.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
