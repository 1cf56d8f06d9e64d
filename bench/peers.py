"""The same tiny Llama behind fastchat-q and behind other servers, one at a time, in turn, in one run.

    python bench/peers.py [--rounds 3] [--fastchat-python PYTHON] [--vllm-python PYTHON]

Always: fastchat-q with its transformers engine, ``transformers serve --continuous-batching``, and transformers'
continuous batching inside of one process, without a server. With a Python that has FastChat: its controller, worker and
API server. With one that has vLLM and fastchat-q: ``vllm serve``, and fastchat-q with its vllm engine. Each answer has
64 tokens and is streamed, greedy, and no two prompts are the same; each level asks twice as many requests as it has
clients. Compare the rows of one table with one another, not with another machine's. docs/performance.md says how to
make those Pythons.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import tiny_llama
import uvloop
from loadgen import Config, run
from loadgen.config import SERIAL
from processes import CLI, answers, free_port, front, machine, models, started, wait

LEVELS = (1, 8, 32, 64)
TOKENS = 64
PROMPT = f"{SERIAL} " + " ".join(f"word{n}" for n in range(20))
NAME = "llama"
BOOT_S = 400.0
TRIES = 3
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Beside a load generator and servers on two cores, a second torch thread makes every engine slower."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers."""

    base_url: str
    model: str
    extra: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Figures:
    """One level of one round."""

    tokens_per_s: float
    ttft_p50_ms: float | None


Peer = Callable[[Path, Path], AbstractContextManager[Served]]
"""Gets the model's folder and one for logs."""


@contextmanager
def fastchat_q(engine: str, python: str, model: Path, logs: Path) -> Iterator[Served]:
    """The whole stack: Redis, API server and a worker of this engine."""
    with ExitStack() as stack:
        stand = stack.enter_context(front(logs))
        flags = ["--engine", engine, "--model", str(model), "--name", NAME, "--redis-url", stand.url]
        flags += ["--slots", str(max(LEVELS)), "--dtype", "float32"]
        command = (python, *CLI[1:], "worker", *flags)
        environment = VLLM if engine == "vllm" else ONE_THREAD
        stack.enter_context(started(*command, log=logs / f"worker-{engine}.log", **environment))
        wait(lambda: NAME in models(stand.port), f"fastchat-q with {engine}", BOOT_S)
        yield Served(f"http://127.0.0.1:{stand.port}", NAME, {"ignore_eos": True, "temperature": 0})


@contextmanager
def transformers_serve(model: Path, logs: Path) -> Iterator[Served]:
    """transformers' own server, batching."""
    port, command = free_port(), Path(sys.executable).with_name("transformers")
    flags = ("--continuous-batching", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "512", "--port", str(port))
    serve = (str(command), "serve", str(model), *flags, "--host", "127.0.0.1", "--device", "cpu")
    with started(*serve, log=logs / "transformers-serve.log", **ONE_THREAD):
        wait(lambda: answers(f"http://127.0.0.1:{port}/health"), "transformers serve", BOOT_S)
        yield Served(f"http://127.0.0.1:{port}", str(model), {"temperature": 0})


@contextmanager
def fastchat(python: str, model: Path, logs: Path) -> Iterator[Served]:
    """FastChat's three processes. ``raw``: its default for an unknown model is an example of 800 tokens."""
    control, work, serve = free_port(), free_port(), free_port()
    at = "http://127.0.0.1"
    local = ("--host", "127.0.0.1")
    commands = {
        "controller": ("controller", *local, "--port", str(control)),
        "model_worker": (
            *("model_worker", *local, "--port", str(work), "--worker-address", f"{at}:{work}"),
            *("--controller-address", f"{at}:{control}", "--model-path", str(model), "--model-names", NAME),
            *("--device", "cpu", "--conv-template", "raw"),
        ),
        "api": ("openai_api_server", *local, "--port", str(serve), "--controller-address", f"{at}:{control}"),
    }
    with ExitStack() as stack:
        for name, (module, *flags) in commands.items():
            whole = (python, "-m", f"fastchat.serve.{module}", *flags)
            log = logs / f"fastchat-{name}.log"
            stack.enter_context(started(*whole, log=log, LOGDIR=str(logs), **ONE_THREAD))
            if name == "controller":
                wait(lambda: answers(f"{at}:{control}/test_connection"), "FastChat's controller", BOOT_S)
        wait(lambda: NAME in models(serve), "FastChat", BOOT_S)
        yield Served(f"{at}:{serve}", NAME, {"temperature": 0})


@contextmanager
def vllm_serve(python: str, model: Path, logs: Path) -> Iterator[Served]:
    """vLLM's own server."""
    port = free_port()
    flags = ("--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME, "--dtype", "float32")
    module = (python, "-m", "vllm.entrypoints.openai.api_server")  # its command asks for a package of another name
    command = (*module, "--model", str(model), *flags, "--max-num-seqs", str(max(LEVELS)))
    with started(*command, log=logs / "vllm.log", **VLLM):
        wait(lambda: answers(f"http://127.0.0.1:{port}/health"), "vllm serve", BOOT_S)
        yield Served(f"http://127.0.0.1:{port}", NAME, {"ignore_eos": True, "temperature": 0})


def load(served: Served, concurrency: int) -> Figures:
    """One level, measured again if a request of it fails, as some of FastChat's do.

    Raises:
        SystemExit: requests fail each time.
    """
    for _ in range(TRIES):
        figures = _load(served, concurrency)
        if figures is not None:
            return figures
    raise SystemExit(f"{served.base_url}: at {concurrency} clients requests failed {TRIES} times")


def _load(served: Served, concurrency: int) -> Figures | None:
    """Behind a few requests that warm up; None: one failed."""
    for requests, clients in ((2, 1), (max(8, 2 * concurrency), concurrency)):
        config = Config(
            served.base_url,
            served.model,
            clients,
            requests,
            TOKENS,
            f"{requests} {clients} {PROMPT}",  # another one each time: nobody is to answer out of a prefix cache
            extra=served.extra,
            peer=True,
            timeout_s=300,
        )
        report = uvloop.run(run(config))
        if not report.clean:
            print(f"{served.base_url}: {report.failed} of {requests} failed: {report.errors}", file=sys.stderr)
            return None
    return Figures(report.tokens_per_s, report.ttft_ms.p50 if report.ttft_ms else None)


def batching_alone(model: Path) -> dict[int, Figures]:
    """transformers' continuous batching in a process of its own: no HTTP, no queue."""
    import subprocess

    command = (sys.executable, str(Path(__file__).with_name("transformers_batching.py")), str(model), str(TOKENS))
    done = subprocess.run([*command, *map(str, LEVELS)], env=os.environ | ONE_THREAD, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return {int(level): Figures(rate, None) for level, rate in json.loads(done.stdout.splitlines()[-1]).items()}


def peers(options: argparse.Namespace) -> dict[str, Peer]:
    """What can be run here."""
    found: dict[str, Peer] = {
        "fastchat-q, transformers engine": partial(fastchat_q, "transformers", sys.executable),
        "transformers serve --continuous-batching": transformers_serve,
    }
    if options.fastchat_python:
        found["FastChat"] = partial(fastchat, options.fastchat_python)
    if options.vllm_python:
        found["vllm serve"] = partial(vllm_serve, options.vllm_python)
        found["fastchat-q, vllm engine"] = partial(fastchat_q, "vllm", options.vllm_python)
    return {name: peer for name, peer in found.items() if options.only is None or options.only in name}


def table(results: Mapping[str, Mapping[int, list[Figures]]]) -> str:
    """Markdown: medians of tokens/s, and of the time to the first token."""
    head = "| | " + " | ".join(f"{level}" for level in LEVELS) + " |"
    lines = [head, "|---|" + "---|" * len(LEVELS)]
    for name, levels in results.items():
        cells = []
        for level in LEVELS:
            rate = statistics.median(figures.tokens_per_s for figures in levels[level])
            firsts = [figures.ttft_p50_ms for figures in levels[level] if figures.ttft_p50_ms is not None]
            cells.append(f"{rate:,.0f}" + (f" ({statistics.median(firsts):,.0f} ms)" if firsts else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fastchat-python", help="with fschat, see above")
    parser.add_argument("--vllm-python", help="with vllm and fastchat-q, see above")
    parser.add_argument("--json-out", type=Path)
    parser.add_argument("--only", help="rows whose name has this in it")
    options = parser.parse_args()
    chosen = peers(options)
    results: dict[str, dict[int, list[Figures]]] = {}
    with tempfile.TemporaryDirectory(prefix="fq-peers-") as folder:
        model = tiny_llama.make(Path(folder) / "llama")
        for round_number in range(options.rounds):
            for name, peer in chosen.items():
                logs = Path(folder) / f"{round_number}-{name.replace(' ', '-')}"
                logs.mkdir()
                with peer(model, logs) as served:
                    for level in LEVELS:
                        results.setdefault(name, {}).setdefault(level, []).append(load(served, level))
                print(table({name: results[name]}).splitlines()[-1], file=sys.stderr, flush=True)
            if options.only is None:
                for level, figures in batching_alone(model).items():
                    name = "transformers' continuous batching, no server"
                    results.setdefault(name, {}).setdefault(level, []).append(figures)
    if options.json_out is not None:
        rows = {
            name: {level: [asdict(figures) for figures in each] for level, each in levels.items()}
            for name, levels in results.items()
        }
        options.json_out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"tokens/s (p50 of the time to the first token) by clients; {machine()}\n\n{table(results)}")


if __name__ == "__main__":
    main()
