"""A stack for clients that people have: the built-in model, a repeater, and an encoder, behind real HTTP."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..engines.random_encoders import checkpoint
from ..stack import Stack, running_stack

collect_ignore = ["node", "python"]
"""Run by their own programs, from `test_others`."""


@pytest.fixture(scope="package")
def clients_stack() -> Iterator[Stack]:
    """Models ``tiny``, ``echo`` and ``embedder``; tests leave it running and idle."""
    folder = Path(tempfile.mkdtemp(prefix="fq"))
    checkpoint(folder / "bert", "bert", pooling="mean_tokens")
    with running_stack(folder) as stack:
        stack.start_worker("--model", "tiny", "--slots", "32", "--threads", "1")
        stack.start_worker("--model", "echo", "--engine", "echo", "--token-delay-ms", "2")
        stack.start_worker("--model", str(folder / "bert"), "--name", "embedder", "--engine", "embeddings")
        stack.start("orchestrator", "orchestrator")  # batches need it
        yield stack
    shutil.rmtree(folder, ignore_errors=True)


def needed(there: bool, what: str) -> None:
    """Skips the test where a program is not installed, but not in CI."""
    if not there:
        reason = f"{what}: make setup-clients"
        if os.environ.get("FASTCHAT_Q_REQUIRE_CLIENTS"):
            pytest.fail(reason)
        pytest.skip(reason)
