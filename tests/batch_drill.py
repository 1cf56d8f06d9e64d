"""One batch while API server, orchestrator and workers are killed in turn: ``make batch-drill``.

SIGKILL meets them as the batch gets on, again and again; each is started anew at once. All the time what is done is
downloaded: every look must be whole lines, each custom_id once, and what an earlier look had, in front. In the end each
line has one answer, and it is the right one.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import openai

from .batches import create, ids, jsonl, line, parsed
from .http_client import get
from .servers import wait_until
from .stack import API_KEY, Process, Stack, running_stack

WORKERS = 2
WORKER = ("--model", "echo", "--engine", "echo", "--token-delay-ms", "5")
AWAY = (OSError, openai.APIConnectionError, openai.InternalServerError, ValueError)
"""What a client sees of a server that is killed: no connection, half an answer, a 503."""
LONGEST_S = 600.0
LAST_KILL = 0.8
"""Kills are spread over this part of the batch."""


@dataclass
class Drill:
    """One run. The stack has no worker and no orchestrator of its own."""

    stack: Stack
    lines: int
    num_kills: int
    slots: int
    """Of each worker: what sets the pace."""
    killed: "Counter[str]" = field(default_factory=Counter)
    looks: int = 0
    sizes: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def run(self) -> None:
        """Raises AssertionError if anything is lost, doubled, torn or wrong."""
        self._workers = [self.stack.start_worker(*WORKER, "--slots", str(self.slots)) for _ in range(WORKERS)]
        self._orchestrator = self._start_orchestrator()
        client = self.stack.client()
        began = time.monotonic()
        batch = create(client, jsonl(line(n, question(n)) for n in range(self.lines)))
        victims = itertools.cycle(("orchestrator", "worker", "api"))
        kills = [int(LAST_KILL * self.lines) * (n + 1) // self.num_kills for n in range(self.num_kills)]
        last = b""
        while True:
            if time.monotonic() - began > LONGEST_S:
                raise AssertionError(f"not done within {LONGEST_S:g} s: {self.sizes[-1:]} lines")
            try:
                state = client.batches.retrieve(batch.id)
                reply = get(self.stack.port, f"/v1/batches/{batch.id}/output", authorization=f"Bearer {API_KEY}")
            except AWAY:
                time.sleep(0.05)
                continue
            if reply.status != 200:
                continue
            found = ids(parsed(reply.body))
            assert reply.body.startswith(last), "what was there has changed"
            last, self.looks = reply.body, self.looks + 1
            self.sizes.append(len(found))
            if state.status == "completed":
                break
            assert state.status in ("validating", "in_progress", "finalizing"), state
            if kills and len(found) >= kills[0]:
                kills.pop(0)
                self._kill(next(victims))
            time.sleep(0.1)
        self.seconds = time.monotonic() - began
        counts = state.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (self.lines, self.lines, 0), state
        assert state.output_file_id is not None
        content = client.files.content(state.output_file_id).read()
        assert content == last
        rows = parsed(content)
        assert sorted(ids(rows)) == sorted(f"line-{n}" for n in range(self.lines))
        for row in rows:
            said = row["response"]["body"]["choices"][0]["message"]["content"]
            assert said == question(int(row["custom_id"].removeprefix("line-"))), row
        assert not kills, "the batch was over before all kills"
        wait_until(lambda: self.stack.live("echo") == 0, "no job of it goes on")

    def _kill(self, victim: str) -> None:
        self.killed[victim] += 1
        if victim == "orchestrator":
            self._orchestrator.kill()
            self._orchestrator = self._start_orchestrator()
        elif victim == "worker":
            self._workers.pop(0).kill()
            flags = ("--no-supervise", *WORKER, "--slots", str(self.slots))
            name = f"worker-{len(self.stack.processes)}"
            self._workers.append(self.stack.start(name, "worker", *flags))
        else:
            self.stack.api.kill()
            self.stack.api = self.stack.start_api(self.stack.port)

    def _start_orchestrator(self) -> Process:
        return self.stack.start(f"orchestrator-{len(self.stack.processes)}", "orchestrator")


def question(number: int) -> str:
    """What a line asks, and so what is answered."""
    return f"this is line {number} of {number % 7} and more"


def main() -> None:
    """Prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=21)
    parser.add_argument("--slots", type=int, default=8)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fq"))
    try:
        with running_stack(folder) as stack:
            drill = Drill(stack, options.lines, options.kills, options.slots)
            drill.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{drill.lines} lines in {drill.seconds:.0f} s, killed {dict(drill.killed)}; {drill.looks} looks at the "
        "output, each well-formed; every custom_id once"
    )


if __name__ == "__main__":
    sys.exit(main())
