"""Whether any process grows over many requests: ``python bench/memory.py [--json-out FILE]``.

The whole stack with the built-in model, asked over HTTP for short streams of every kind in turn: prompts that others
had and new ones, drawn and greedy, penalties, several choices, log probabilities, JSON schemas, regular expressions,
tools. Resident memory of each process is read every thousand requests, after a first thousand that fills what is kept
on purpose (the prefix cache, compiled grammars, the allocator's pools).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import uvloop
from loadgen import Config, run
from loadgen.config import SERIAL
from processes import CLI, Front, front, machine, models, started, wait

AT_ONCE = 32
EVERY = 1000
BOOT_S = 120.0
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("What is the capital of France?", {"temperature": 0}),
    (f"{SERIAL} What is the capital of France?", {"temperature": 1, "top_p": 0.9}),
    (f"Tell me a story. {SERIAL}", {"presence_penalty": 0.5, "logit_bias": {"5": 2}, "n": 2}),
    (f"{SERIAL}", {"logprobs": True, "top_logprobs": 3}),
    (f"Where? {SERIAL}", {"response_format": JSON_SCHEMA}),
    ("A number.", {"structured_outputs": {"regex": "[0-9]{3}"}}),
    (f"How is the weather in Paris? {SERIAL}", {"tools": [TOOL]}),
    ("How is the weather in Oslo?", {"tools": [TOOL], "tool_choice": "required", "seed": 7}),
)


async def _thousand(port: int) -> None:
    """Raises SystemExit if a request fails."""
    for number, (prompt, extra) in enumerate(KINDS):
        config = Config(
            base_url=f"http://127.0.0.1:{port}",
            model="tiny",
            concurrency=AT_ONCE,
            requests=EVERY // len(KINDS),
            max_tokens=8,
            prompt=prompt,
            extra=extra,
            peer=True,
        )
        report = await run(config)
        if not report.clean:
            raise SystemExit(f"kind {number}: {report.failed} requests failed: {report.errors}")


def measure(stand: Front, worker: int, thousands: int) -> dict[str, list[float]]:
    """Resident memory (MiB) of each process after each thousand requests."""
    engine = max(psutil.Process(worker).children(recursive=True), key=lambda child: child.memory_info().rss)
    processes: Mapping[str, psutil.Process] = {
        "api": psutil.Process(stand.api_pid),
        "worker": engine,
        "supervisor": psutil.Process(worker),
        "redis": psutil.Process(stand.redis_pid),
    }
    readings: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(thousands):
        uvloop.run(_thousand(stand.port))
        for name, process in processes.items():
            readings[name].append(round(process.memory_info().rss / 2**20, 1))
    return readings


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="a multiple of 1,000")
    parser.add_argument("--json-out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fq") as name, ExitStack() as stack:
        stand = stack.enter_context(front(Path(name)))
        flags = ("--model", "tiny", "--slots", str(AT_ONCE), "--kv-memory", "64MiB", "--threads", "1")
        command = (*CLI, "worker", *flags, "--redis-url", stand.url)
        worker = stack.enter_context(started(*command, log=Path(name) / "worker.log", OMP_NUM_THREADS="1"))
        wait(lambda: models(stand.port) == ["tiny"], "the worker", BOOT_S)
        began = time.perf_counter()
        readings = measure(stand, worker.pid, options.requests // EVERY)
        report = {
            "machine": machine(),
            "requests": options.requests,
            "seconds": round(time.perf_counter() - began, 1),
            "resident_mib_every_thousand": readings,
            "growth_mib_after_the_first_thousand": {k: round(v[-1] - v[0], 1) for k, v in readings.items()},
        }
    print(json.dumps(report, indent=1))
    if options.json_out is not None:
        options.json_out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
