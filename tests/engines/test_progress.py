"""What is told while a model loads: to whoever asked, and as log lines where there is no terminal."""

import os
import pty
import subprocess
import sys
import termios

import pytest
from fastchat_q.workers.engines.loading.model import load
from fastchat_q.workers.engines.loading.progress import Progress
from transformers.utils import logging as transformers_logging


def test_fractions_rise_to_one_and_are_told_once_per_percent() -> None:
    told: list[tuple[float, str]] = []
    progress = Progress("m", lambda fraction, phase: told.append((fraction, phase)), terminal=False)
    for done in range(10_001):
        progress.report("download", done, 10_000)
    assert len(told) == 101
    assert told == sorted(told)
    assert told[-1] == (1.0, "download")
    progress.report("load", 5, 0)
    assert told[-1] == (1.0, "load")


def test_a_slow_percent_is_told_as_it_gets_on_and_not_when_it_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastchat_q.workers.engines.loading.progress.LOG_EVERY_S", 0.0)
    told: list[tuple[float, str]] = []
    progress = Progress("m", lambda fraction, phase: told.append((fraction, phase)), terminal=False)
    for done in (1, 1, 2, 2, 3):
        progress.report("download", done, 10_000)
    assert [fraction for fraction, _ in told] == [0.0001, 0.0002, 0.0003]


def test_a_load_is_told_tensor_by_tensor_and_leaves_nothing_behind() -> None:
    told: list[tuple[float, str]] = []
    load("tiny", "cpu", on_progress=lambda fraction, phase: told.append((fraction, phase)))
    fractions = [fraction for fraction, phase in told if phase == "load"]
    assert len(fractions) > 10
    assert fractions == sorted(set(fractions))
    assert fractions[-1] == 1.0
    assert transformers_logging.set_tqdm_hook(None) is None


def test_a_listener_that_fails_ends_the_load(capsys: pytest.CaptureFixture[str]) -> None:
    """It is how a worker that was told to stop gets out of a long load."""

    def stop(fraction: float, phase: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load("tiny", "cpu", on_progress=stop)
    assert transformers_logging.set_tqdm_hook(None) is None


CODE = "from fastchat_q.workers.engines.loading.model import load; load('tiny', 'cpu')"


def test_log_lines_go_where_there_is_no_terminal_and_no_bars() -> None:
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=200)
    assert "percent=100" in ran.stdout
    assert "it/s" not in ran.stderr


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))  # a bar is as wide as its terminal
    with subprocess.Popen([sys.executable, "-c", CODE], stderr=theirs, stdout=subprocess.PIPE) as process:
        os.close(theirs)
        drawn = b""
        try:
            while part := os.read(ours, 65536):
                drawn += part
        except OSError:
            pass  # the other end is closed
        assert process.stdout is not None
        assert b"percent" not in process.stdout.read()
    os.close(ours)
    assert b"Loading weights" in drawn
    assert b"100%" in drawn
