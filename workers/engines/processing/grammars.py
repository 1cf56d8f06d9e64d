"""Whether a grammar compiles, found out in a process that can be ended: llguidance's limits do not bound its time.

An integer with a large ``multipleOf`` compiles for minutes, on a thread that nothing can stop. So what users write
compiles here first, over single bytes, within `COMPILE_S` of processor time: the load of a machine changes nothing.
Run as a module, this is that process, which needs llguidance only: a grammar a line in, what is wrong with it out.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

COMPILE_S = 3
"""Processor time that a grammar may take to compile."""
MEMORY = 2 * 2**30
"""Bytes of address space of the process, where the system has such a limit."""
LIMITS = LLParserLimits(step_lexer_fuel=50_000, step_max_items=10_000, max_lexer_states=50_000)
"""Less than llguidance's own: a step of the engine waits for a mask, and a row keeps 1 or 2 kB for each state."""


OVER_ITS_LIMITS = (-signal.SIGXCPU, -signal.SIGABRT, -signal.SIGSEGV)
"""How the process ends over time or memory: Rust aborts when it gets none."""


class Checker:
    """Asks the process, which is started when it is needed. Not for several threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._ended: weakref.finalize[..., Checker] | None = None

    def error(self, grammar: str) -> str:
        """What is wrong with a grammar, or empty.

        Raises:
            OSError: the process cannot be started, or was ended by somebody else.
        """
        if self._process is None:
            self._process = _started()
            self._ended = weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(grammar) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if answer:
            return str(json.loads(answer))
        process, self._process = self._process, None
        code = process.wait()
        assert self._ended is not None
        self._ended()
        if code not in OVER_ITS_LIMITS:
            raise ChildProcessError(f"the process that checks grammars ended with code {code}")
        return f"it takes more than {COMPILE_S} seconds or {MEMORY // 2**20} MiB to compile"


def first_masked(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher whose first mask is computed, or with an error."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # builds the first states of the lexer here, not within a step
    return matcher


def _started() -> "subprocess.Popen[str]":
    pipe, silence = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", __name__], stdin=pipe, stdout=pipe, stderr=silence, text=True)


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.communicate()


def _serve() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    with contextlib.suppress(OSError):  # if memory runs out, this process goes, and not the worker
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    of_bytes = LLTokenizer("byte")
    for line in sys.stdin:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(usage.ru_utime + usage.ru_stime)
        limit = spent + 1 + COMPILE_S
        resource.setrlimit(resource.RLIMIT_CPU, (limit if most < 0 else min(limit, most), most))
        try:
            matcher = first_masked(of_bytes, json.loads(line))
            error = matcher.get_error() if matcher.is_error() else ""
        except BaseException as panic:  # of llguidance: no Exception
            error = f"{type(panic).__name__}: {panic}"
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    _serve()
