"""1,000 streams on one API process, and 200 streams that were cut and come back at once: ``make bench-streams``.

Real processes: an embedded Redis, one API server, two echo workers whose pace two cores can bear. Every transcript is
compared. The first load uses the load generator; its requests all arrive in the same instant, so that the time to the
first token is that of the crowd. For the second one all streams are cut together, and each reads on behind its last
event with ``GET /v1/jobs/{id}/events``; what counts is the time from connecting to the first event that comes.
"""

import argparse
import asyncio
import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import uvloop
from loadgen import Config, Report, run
from loadgen.report import QuantilesMs, quantiles_ms
from processes import Front, front, machine, models, wait
from sse import Stream

MODEL = "echo"
WORKERS = 2
GOAL_RESUME_P99_S = 1.0
TOKENS_BEFORE_CUT = 5


async def crowd(system: Front, pids: dict[str, int], streams: int, tokens: int) -> Report:
    """Opens that many streams at once and reads them to the end."""
    text = " ".join(f"w{number}" for number in range(tokens))
    config = Config(
        base_url=f"http://127.0.0.1:{system.port}",
        model=MODEL,
        concurrency=streams,
        requests=streams,
        max_tokens=tokens,
        prompt=text,
        expected=text,
        pids=pids,
        timeout_s=120.0,
    )
    report = await run(config)
    if not report.clean:
        raise SystemExit(f"{report.failed} of {streams} streams failed: {report.errors}")
    return report


async def resumes(system: Front, streams: int, tokens: int) -> list[float]:
    """Seconds from connecting again to the first event that came, of each stream."""
    text = " ".join(f"w{number}" for number in range(tokens))
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    opened = [Stream(system.port) for _ in range(streams)]

    def enough() -> bool:
        return min(len(stream.arrivals_s) for stream in opened) >= TOKENS_BEFORE_CUT

    await asyncio.gather(*(stream.ask(body, enough) for stream in opened))
    before = [len(stream.arrivals_s) for stream in opened]
    began_s = time.perf_counter()
    await asyncio.gather(*(stream.resume() for stream in opened))
    wrong = [stream.job_id for stream in opened if stream.text != text]
    if wrong:
        raise SystemExit(f"{len(wrong)} transcripts are not exact after the cut: {wrong[:3]}")
    return [stream.arrivals_s[seen] - began_s for stream, seen in zip(opened, before, strict=True)]


def peak_mib(pid: int) -> float:
    """The most memory that the process has had (resident, Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return round(int(peak) / 1024, 1)


def _rounded(quantiles: QuantilesMs) -> dict[str, float]:
    return {name: round(value, 1) for name, value in asdict(quantiles).items()}


def main() -> None:
    """The command line. Exit status 1 if a stream fails or the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=50, help="of each stream (default: %(default)s)")
    parser.add_argument("--token-delay-ms", type=float, default=300.0, help="default: %(default)s")
    parser.add_argument("--resumes", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "many-streams.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fq") as folder, ExitStack() as stack:
        system = stack.enter_context(front(Path(folder)))
        slots = -(-options.streams // WORKERS)
        flags = ("--no-supervise", "--slots", str(slots), "--token-delay-ms", str(options.token_delay_ms))
        workers = {}
        for number in range(WORKERS):
            workers[f"worker {number + 1}"] = stack.enter_context(system.worker(MODEL, *flags)).pid
        wait(lambda: MODEL in models(system.port), "a worker")
        pids = {"api": system.api_pid, **workers, "redis": system.redis_pid}
        idle = {name: peak_mib(pid) for name, pid in pids.items()}
        report = uvloop.run(crowd(system, pids, options.streams, options.tokens))
        peak = {name: peak_mib(pid) for name, pid in pids.items()}
        resumed = quantiles_ms(uvloop.run(resumes(system, options.resumes, options.tokens)))
    assert report.ttft_ms is not None
    assert report.gap_ms is not None
    assert resumed is not None
    results = {
        "streams": {
            "count": options.streams,
            "tokens_each": options.tokens,
            "token_delay_ms": options.token_delay_ms,
            "exact": report.ok,
            "failed": report.failed,
            "wall_s": round(report.wall_s, 2),
            "tokens_per_s": round(report.tokens_per_s),
            "first_token_ms": _rounded(report.ttft_ms),
            "gap_ms": _rounded(report.gap_ms),
            "cpu_s": {use.name: use.cpu_s and round(use.cpu_s, 2) for use in report.cpu},
            "peak_rss_mib": peak,
            "peak_rss_before_mib": idle,
        },
        "resumes": {"count": options.resumes, "first_event_ms": _rounded(resumed)},
    }
    print(json.dumps(results, indent=1))
    options.output.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    if resumed.p99 > GOAL_RESUME_P99_S * 1000:
        raise SystemExit(f"p99 of the first event after a cut: {resumed.p99:.0f} ms")


if __name__ == "__main__":
    main()
