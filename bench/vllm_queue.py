"""What the queue leaves of vLLM: the same loads on `vllm serve` and on the vllm worker behind the queue, in turn.

    .venv-vllm/bin/python bench/vllm_queue.py [--rounds 3] [--concurrency 1 8 32 64] [--json-out FILE]

Needs an environment with vLLM and this package (`make setup-vllm`). Starts vLLM's own server on the tiny Llama, and
beside it an embedded Redis, an API server and a worker with the same vLLM in its process; while one is asked, the other
rests. Streams of 64 tokens, greedy; medians of the rounds are printed. Compare the columns with one another, not with
another machine's. Both vLLMs get the same options; where their compute thread runs is vLLM's choice
(VLLM_CPU_OMP_THREADS_BIND).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop
from loadgen import Config, Report, run
from processes import CLI, answers, free_port, front, machine, models, started, wait
from tiny_llama import make

TOKENS = 64
PROMPT = " ".join(f"word{n}" for n in range(20))
MODEL = Path(tempfile.gettempdir()) / "fastchat-q-bench" / "tiny-llama"
"""Where it stays: vLLM keeps what it compiled for a path."""
START_S = 400.0
"""vLLM compiles the model when it first meets it."""
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
SIDES = ("vllm serve", "queue")


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two."""

    port: int
    pids: dict[str, int]

    async def measure(self, concurrency: int, requests: int) -> Report:
        """One load, once."""
        config = Config(
            base_url=f"http://127.0.0.1:{self.port}",
            model="tiny",
            concurrency=concurrency,
            requests=requests,
            max_tokens=TOKENS,
            prompt=PROMPT,
            extra={"ignore_eos": True, "temperature": 0},
            pids=self.pids,
        )
        report = await run(config)
        if not report.clean:
            raise SystemExit(f"{concurrency} at a time: {dict(report.errors)}")
        return report


async def compare(sides: dict[str, Side], levels: list[int], rounds: int) -> list[dict[str, object]]:
    """A row for each level and side."""
    rows = []
    for concurrency in levels:
        requests = max(24, 6 * concurrency)
        reports: dict[str, list[Report]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name in list(sides) if number % 2 else reversed(sides):  # neither always goes first
                report = await sides[name].measure(concurrency, requests if number else 2 * concurrency)
                if number:  # the first round only warms up
                    reports[name].append(report)
        for name, made in reports.items():
            rows.append(_row(concurrency, name, made))
            print(_line(rows[-1]), flush=True)
        ratios = [queue.tokens_per_s / serve.tokens_per_s for serve, queue in zip(*reports.values(), strict=True)]
        print(f"{'':>4}  queue / vllm serve: {statistics.median(ratios):.3f}  (rounds: {_list(ratios)})", flush=True)
    return rows


def _row(concurrency: int, name: str, reports: list[Report]) -> dict[str, object]:
    def median(values: list[float | None]) -> float:
        return statistics.median([value for value in values if value is not None])

    cpu = {
        use.name: round(median([u.us_per_token for r in reports for u in r.cpu if u.name == use.name]), 1)
        for use in reports[0].cpu
    }
    return {
        "concurrency": concurrency,
        "side": name,
        "tokens/s": round(median([r.tokens_per_s for r in reports]), 1),
        "each": [round(r.tokens_per_s, 1) for r in reports],
        "ttft p50 ms": round(median([r.ttft_ms and r.ttft_ms.p50 for r in reports]), 1),
        "ttft p99 ms": round(median([r.ttft_ms and r.ttft_ms.p99 for r in reports]), 1),
        "events/token": round(median([r.content_events_per_s / r.tokens_per_s for r in reports]), 2),
        "cpu us/token": cpu,
    }


def _line(row: dict[str, object]) -> str:
    cpu = ", ".join(f"{name} {us:g}" for name, us in row["cpu us/token"].items())  # type: ignore[attr-defined]
    return (
        f"{row['concurrency']:>4}  {row['side']:<10} {row['tokens/s']:>8} tokens/s   ttft p50 {row['ttft p50 ms']} p99 "
        f"{row['ttft p99 ms']} ms   events/token {row['events/token']}   cpu us/token: {cpu}"
    )


def _list(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


@contextmanager
def both(folder: Path, model: Path, dtype: str) -> Iterator[dict[str, Side]]:
    """The two, ready."""
    with ExitStack() as stack:
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--port",
            str(port),
        ]
        command += ["--served-model-name", "tiny", "--dtype", dtype, "--max-model-len", "2048"]
        command += ["--disable-uvicorn-access-log"]
        serve = stack.enter_context(started(*command, log=folder / "vllm-serve.log", **ENVIRONMENT))
        wait(lambda: answers(f"http://127.0.0.1:{port}/health"), "vllm serve", START_S)
        system = stack.enter_context(front(folder))
        flags = ["--engine", "vllm", "--model", str(model), "--name", "tiny", "--dtype", dtype, "--no-supervise"]
        flags += ["--max-model-len", "2048", "--redis-url", system.url]
        worker = stack.enter_context(started(*CLI, "worker", *flags, log=folder / "worker.log", **ENVIRONMENT))
        wait(lambda: models(system.port) == ["tiny"], "the worker", START_S)
        queue = {"api": system.api_pid, "worker": worker.pid, "redis": system.redis_pid}
        yield {
            "vllm serve": Side(port, {"vllm api": serve.pid, **_children(serve.pid)}),
            "queue": Side(system.port, {**queue, **_children(worker.pid)}),
        }


def _children(pid: int) -> dict[str, int]:
    """vLLM's processes below this one, by what they call themselves."""
    import psutil

    below = psutil.Process(pid).children(recursive=True)
    return {
        words[0].replace("VLLM::", "vllm ").lower(): p.pid
        for p in below
        if (words := p.cmdline())[:1] and "VLLM::" in words[0]
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json-out", type=Path)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    import vllm

    setting = {
        **machine(),
        "vllm": vllm.__version__,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "tokens": TOKENS,
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    with (
        tempfile.TemporaryDirectory(prefix="fq") as name,
        both(Path(name), make(MODEL), options.dtype) as sides,
    ):
        rows = uvloop.run(compare(sides, options.concurrency, options.rounds))
    if options.json_out is not None:
        options.json_out.write_text(json.dumps({"machine": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
