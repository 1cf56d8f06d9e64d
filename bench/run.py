"""What the queue costs: the same loads on the whole path and on an API server without a queue, in turn, in one run.

    python bench/run.py [--rounds 3] [--json-out FILE]

Starts an embedded Redis, an API server and two echo workers (tokens at once, and one every 20 ms), and beside them
bench/direct.py, the same API application fed from its own memory. Each load goes to both, `--rounds` times in turn;
medians are printed. Compare the two columns with one another, not with another machine's.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
from loadgen import Config, Report, run
from processes import answers, free_port, front, machine, models, started, wait

WORDS = " ".join(f"word{n}" for n in range(20))
DIRECT = Path(__file__).with_name("direct.py")


@dataclass(frozen=True, slots=True)
class Load:
    """One load: what it is for, its size, and which figures of it matter."""

    name: str
    model: str
    concurrency: int
    requests: int
    max_tokens: int
    stream: bool
    figures: tuple[str, ...]


TIMES = ("tokens/s", "events/s", "ttft p50 ms", "ttft p99 ms", "gap p50 ms", "gap p99 ms")
CPU = ("api us/token", "worker us/token", "redis us/token")
LOADS = (
    Load("first token, one client", "echo", 1, 400, 1, True, ("ttft p50 ms", "ttft p99 ms")),
    Load("one-token answers, 64 clients", "echo", 64, 3000, 1, False, ("requests/s", "api us/request")),
    Load("64 streams of 512 tokens, as fast as it goes", "echo", 64, 192, 512, True, ("tokens/s", "events/s", *CPU)),
    Load("64 streams at 50 tokens/s each", "paced", 64, 128, 150, True, (*TIMES, *CPU)),
    Load("400 streams at 50 tokens/s each", "paced", 400, 800, 150, True, (*TIMES, *CPU)),
)

FIGURES: dict[str, Callable[[Report], float | None]] = {
    "ttft p50 ms": lambda r: r.ttft_ms and r.ttft_ms.p50,
    "ttft p99 ms": lambda r: r.ttft_ms and r.ttft_ms.p99,
    "gap p50 ms": lambda r: r.gap_ms and r.gap_ms.p50,
    "gap p99 ms": lambda r: r.gap_ms and r.gap_ms.p99,
    "requests/s": lambda r: r.requests_per_s,
    "tokens/s": lambda r: r.tokens_per_s,
    "events/s": lambda r: r.content_events_per_s,
    "api us/request": lambda r: _cpu(r, "api", per_request=True),
    "api us/token": lambda r: _cpu(r, "api"),
    "worker us/token": lambda r: _cpu(r, "worker"),
    "redis us/token": lambda r: _cpu(r, "redis"),
}


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two systems compared."""

    ports: dict[str, int]
    """Model -> port of the API server that serves it."""
    pids: dict[str, dict[str, int]]
    """Model -> processes whose CPU time counts."""

    async def measure(self, load: Load) -> Report:
        """Runs a load once."""
        config = Config(
            base_url=f"http://127.0.0.1:{self.ports[load.model]}",
            model=load.model,
            concurrency=load.concurrency,
            requests=load.requests,
            max_tokens=load.max_tokens,
            prompt=WORDS,
            stream=load.stream,
            extra={"ignore_eos": True},
            pids=self.pids[load.model],
        )
        report = await run(config)
        if not report.clean:
            raise SystemExit(f"{load.name}: {dict(report.errors)}")
        return report


async def compare(queue: Side, direct: Side, rounds: int) -> dict[str, dict[str, dict[str, float | None]]]:
    """Load -> figure -> {queue, direct}: medians over the rounds."""
    results = {}
    for load in LOADS:
        reports: dict[str, list[Report]] = {"queue": [], "direct": []}
        for number in range(rounds + 1):
            for name, side in (("queue", queue), ("direct", direct)):
                report = await side.measure(load)
                if number:  # the first round only warms up
                    reports[name].append(report)
        results[load.name] = {
            figure: {name: _median([FIGURES[figure](r) for r in made]) for name, made in reports.items()}
            for figure in load.figures
        }
        print(_table(load.name, results[load.name]), flush=True)
    return results


def _table(name: str, figures: dict[str, dict[str, float | None]]) -> str:
    rows = [f"\n{name}", f"  {'':<18}{'queue':>12}{'no queue':>12}{'ratio':>8}"]
    for figure, values in figures.items():
        queue, direct = values["queue"], values["direct"]
        ratio = f"{queue / direct:8.2f}" if queue and direct else ""
        rows.append(f"  {figure:<18}{_number(queue):>12}{_number(direct):>12}{ratio}")
    return "\n".join(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _cpu(report: Report, name: str, *, per_request: bool = False) -> float | None:
    for use in report.cpu:
        if use.name == name:
            return use.us_per_request if per_request else use.us_per_token
    return None


@contextmanager
def both(folder: Path) -> Iterator[tuple[Side, Side]]:
    """The two systems, ready."""
    with ExitStack() as stack:
        system = stack.enter_context(front(folder))
        pids, ports, direct_pids = {}, {}, {}
        for model, delay in (("echo", "0"), ("paced", "20")):
            flags = ("--no-supervise", "--slots", "512", "--token-delay-ms", delay)
            worker = stack.enter_context(system.worker(model, *flags))
            pids[model] = {"api": system.api_pid, "worker": worker.pid, "redis": system.redis_pid}
            ports[model] = free_port()
            flags = ("--port", str(ports[model]), "--model", model, "--token-delay-ms", delay)
            direct = stack.enter_context(started(sys.executable, str(DIRECT), *flags, log=folder / "direct.log"))
            direct_pids[model] = {"api": direct.pid}
            wait(lambda at=ports[model]: answers(f"http://127.0.0.1:{at}/healthz"), "the direct server")
        wait(lambda: len(models(system.port)) == 2, "both workers")
        yield Side(dict.fromkeys(pids, system.port), pids), Side(ports, direct_pids)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json-out", type=Path)
    options = parser.parse_args()
    setting = {**machine(), "rounds": options.rounds, "loads": [asdict(load) for load in LOADS]}
    print(", ".join(f"{name} {value}" for name, value in setting.items() if name != "loads"))
    with tempfile.TemporaryDirectory(prefix="fq") as folder, both(Path(folder)) as (queue, direct):
        results = uvloop.run(compare(queue, direct, options.rounds))
    if options.json_out is not None:
        options.json_out.write_text(json.dumps({"machine": setting, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
