"""What a long prompt costs the streams that run beside it: ``python bench/engine_stalls.py``, JSON on stdout.

One process, the transformers engine without a queue, the tiny Llama of tiny_llama.py with random weights. Streams run;
then prompts of 4,000 tokens come one after another, and each asks for one token. An inter-token time of a stream counts
as "beside" if a long prompt was being taken in when it ended, else as "without": both are of the same run. The same is
measured with prompts taken in whole, which is what the splitting saves the streams from.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
from fastchat_q.workers.engines.base import Output, Request
from fastchat_q.workers.engines.batching import scheduler
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.loading.model import Loaded, load
from loadgen.report import quantiles_ms
from processes import machine
from tiny_llama import make

from fastchat_q.jobs import Job, Message, Sampling

PROMPT_TOKENS = 4000
CONTEXT = 6000
"""More than the checkpoint says: rotary positions go on, and its text means nothing anyway."""
PATIENCE_S = 120.0


class Meter:
    """Takes an engine's outputs, and the time between the tokens of each stream."""

    def __init__(self, loaded: Loaded, slots: int) -> None:
        self.engine = TransformersEngine("m", slots, loaded)
        self.gaps: dict[bool, list[float]] = defaultdict(list)
        self.prefilling = False
        self._last: dict[str, float] = {}
        self._ended: dict[str, threading.Event] = defaultdict(threading.Event)
        self._begun: dict[str, threading.Event] = defaultdict(threading.Event)
        self.engine.start(self._take, lambda: os._exit(1))

    def submit(self, name: str, tokens: int, max_tokens: int) -> None:
        """A prompt of about so many tokens."""
        first = sum(map(ord, name))  # prompts differ, or the second one's prefix would be known
        words = " ".join(f"word{(first + n) % 100}" for n in range(tokens // 2))  # two tokens each
        job = Job(
            id=name,
            model="m",
            messages=(Message(role="user", content=words),),
            sampling=Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True),
        )
        self.engine.submit(Request(job, name))

    def wait_begun(self, name: str) -> None:
        """Returns when its first token is there."""
        if not self._begun[name].wait(PATIENCE_S):
            raise TimeoutError(name)

    def wait_ended(self, name: str) -> None:
        """Returns when it has ended."""
        if not self._ended[name].wait(PATIENCE_S):
            raise TimeoutError(name)

    def _take(self, outputs: list[Output]) -> None:
        now = time.perf_counter()
        for output in outputs:
            if output.ended is not None and output.ended.error is not None:
                raise output.ended.error
            if output.pieces and output.ticket.startswith("stream"):
                before = self._last.get(output.ticket)
                if before is not None:
                    self.gaps[self.prefilling].append(now - before)
                self._last[output.ticket] = now
            self._begun[output.ticket].set()
            if output.ended is not None:
                self._ended[output.ticket].set()


def measure(loaded: Loaded, streams: int, prompts: int) -> dict[str, object]:
    """Inter-token times of running streams, without and beside long prompts."""
    meter = Meter(loaded, streams + 1)
    try:
        for i in range(streams):
            meter.submit(f"stream{i}", 20, 2000)
        for i in range(streams):
            meter.wait_begun(f"stream{i}")
        waits = []
        for i in range(prompts):
            time.sleep(1.0)
            meter.prefilling = True
            began = time.perf_counter()
            meter.submit(f"long{i}", PROMPT_TOKENS - 20, 1)
            meter.wait_ended(f"long{i}")
            waits.append(time.perf_counter() - began)
            meter.prefilling = False
        for i in range(streams):
            meter.engine.cancel(f"stream{i}")
    finally:
        meter.engine.stop()
    found: dict[str, object] = {
        name: {"tokens": len(meter.gaps[beside]), "ms": _quantiles(meter.gaps[beside])}
        for name, beside in (("without", False), ("beside", True))
    }
    return {**found, "long_prompt_first_token_s": [round(wait, 2) for wait in waits]}


def _quantiles(gaps_s: list[float]) -> dict[str, float]:
    found = quantiles_ms(gaps_s)
    return {name: round(value, 1) for name, value in asdict(found).items()} if found else {}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        loaded = replace(load(str(make(Path(folder) / "llama")), device="cpu"), context_length=CONTEXT)
        split = measure(loaded, options.streams, options.prompts)
        with mock.patch.object(scheduler.Pace, "tokens", return_value=10**6):
            whole = measure(loaded, options.streams, options.prompts)
    report = {
        "machine": machine(),
        "threads": options.threads,
        "streams": options.streams,
        "prompt_tokens": PROMPT_TOKENS,
        "load_1m": os.getloadavg()[0],
        "in_pieces": split,
        "whole": whole,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
