"""How long a stream pauses when its worker is killed with SIGKILL, as its HTTP client sees it: ``make bench-recovery``.

Real processes: an embedded Redis, an API server, echo workers. In each round some streams are opened, one worker's
process is killed while they run, and all of them are read to the end; every transcript must be exact, or the run
fails. A sample is the pause of a stream that ran on the killed worker, from the last piece of text before the kill to
the first one after it. Four ways to die are measured: the engine's process under a supervisor while another worker has
free slots, the same with no other worker, a worker without a supervisor, and a supervisor, which takes its engine's
process along.
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from loadgen.report import quantiles_ms
from processes import Front, front, machine
from redis.asyncio import Redis
from sse import Stream

from fastchat_q.connection import connect
from fastchat_q.records import read_record
from fastchat_q.registry import Registration, Registry

MODEL = "echo"
TOKEN_DELAY_MS = 50
SLOTS = 64
TOKENS = 40
"""Of each stream, which so takes 2 s: it must outlast the kill."""
TOKENS_BEFORE = 5
"""A kill waits until every stream has so many."""
PHASE_S = 1.0
"""A kill comes up to so much later, by chance, so that it meets heartbeats and renewals at any point."""
START_S = 30.0
ROUND_S = 60.0
"""A round that takes longer has failed."""


@dataclass(frozen=True, slots=True)
class Death:
    """A way to die."""

    name: str
    goal_p99_s: float | None
    """None: it is measured, and nothing is promised."""
    supervised: bool
    workers: int
    """That serve when one of them is killed."""
    spare: int
    """Workers beyond those, so that a round need not wait for the restart of the last one's victim."""
    victim: str
    """Whom SIGKILL meets: ``engine`` (the process that serves) or ``supervisor``."""


DEATHS = (
    Death("supervised, another worker has free slots", 1.5, True, 2, 2, "engine"),
    Death("supervised, no other worker", None, True, 1, 0, "engine"),
    Death("no supervisor", 12.0, False, 2, 0, "engine"),
    Death("the supervisor itself, and its engine with it", 12.0, True, 2, 0, "supervisor"),
)


class Fleet:
    """The workers of one way to die."""

    def __init__(self, system: Front, redis: "Redis", death: Death) -> None:
        self._system, self._death, self._registry = system, death, Registry(redis)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ends = ExitStack()

    async def complete(self) -> None:
        """Replaces processes that are gone; returns when enough of them serve."""
        self._processes = [process for process in self._processes if process.poll() is None]
        flags = ["--slots", str(SLOTS), "--token-delay-ms", str(TOKEN_DELAY_MS)]
        flags += [] if self._death.supervised else ["--no-supervise"]
        while len(self._processes) < self._death.workers + self._death.spare:
            self._processes.append(self._ends.enter_context(self._system.worker(MODEL, *flags)))
        deadline = time.monotonic() + START_S
        while len(await self.serving()) < self._death.workers:
            if time.monotonic() > deadline:
                raise SystemExit(f"{self._death.name}: not enough workers within {START_S:g} s")
            await asyncio.sleep(0.05)

    async def serving(self) -> dict[str, Registration]:
        """Worker id -> entry, of those whose process is there: an entry outlives its process by its TTL."""
        entries = await self._registry.workers()
        return {entry.worker_id: entry for entry in entries if entry.serves and _is_there(entry.pid)}

    def kill(self, entry: Registration) -> None:
        """SIGKILL."""
        os.kill(entry.supervisor if self._death.victim == "supervisor" else entry.pid, signal.SIGKILL)

    async def renew(self) -> None:
        """Ends all workers: the next ones have not failed yet, so that their first restart comes soon."""
        for process in self._processes:  # all at once: the stack ends them one after another
            process.terminate()
        await asyncio.to_thread(self._ends.close)
        self._processes = []


def _is_there(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def one_round(
    system: Front, redis: "Redis", fleet: Fleet, death: Death, streams: int
) -> list[tuple[float, float]]:
    """One kill: (pause, kill -> next piece of text) in seconds of each stream that it met."""
    text = " ".join(f"w{number}" for number in range(TOKENS))
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS}
    opened = [Stream(system.port) for _ in range(streams)]
    async with asyncio.timeout(ROUND_S), asyncio.TaskGroup() as group:
        for stream in opened:
            group.create_task(stream.ask(body))
        while any(len(stream.arrivals_s) < TOKENS_BEFORE for stream in opened):
            await asyncio.sleep(0.01)
        await asyncio.sleep(random.uniform(0, PHASE_S))
        workers = await fleet.serving()
        runs_on = {stream: await _worker_of(redis, stream) for stream in opened}
        busiest = max(workers, key=list(runs_on.values()).count)
        met = [stream for stream in opened if runs_on[stream] == busiest]
        killed_s = time.perf_counter()
        fleet.kill(workers[busiest])
    wrong = [stream.job_id for stream in opened if stream.text != text]
    if wrong:
        raise SystemExit(f"{death.name}: {len(wrong)} transcripts are not exact: {wrong[:3]}")
    return [(pause_s, ended_s - killed_s) for pause_s, ended_s in (stream.pause_around(killed_s) for stream in met)]


async def _worker_of(redis: "Redis", stream: Stream) -> str | None:
    model, _, job_id = stream.job_id.rpartition(".")
    record = await read_record(redis, model, job_id)
    return record.worker if record else None


async def measure(system: Front, death: Death, kills: int, seconds: float, streams: int) -> dict[str, float]:
    """Kills until there are enough, or the time is over."""
    samples: list[tuple[float, float]] = []
    deadline, made = time.monotonic() + seconds, 0
    async with _fleet(system, death) as (fleet, redis):
        while made < kills and time.monotonic() < deadline:
            await fleet.complete()
            met = await one_round(system, redis, fleet, death, streams)
            samples += met
            made += 1
            if death.workers == 1:
                await fleet.renew()
    pauses = quantiles_ms([pause for pause, _ in samples])
    after = quantiles_ms([since for _, since in samples])
    assert pauses is not None
    assert after is not None
    result = {
        "kills": made,
        "samples": len(samples),
        "pause_p50_s": round(pauses.p50 / 1000, 3),
        "pause_p99_s": round(pauses.p99 / 1000, 3),
        "pause_max_s": round(max(pause for pause, _ in samples), 3),
        "kill_to_next_p50_s": round(after.p50 / 1000, 3),
        "kill_to_next_p99_s": round(after.p99 / 1000, 3),
        "exact_transcripts": made * streams,
        **({} if death.goal_p99_s is None else {"goal_p99_s": death.goal_p99_s}),
    }
    print(f"\n{death.name}\n" + "\n".join(f"  {name:<20}{value}" for name, value in result.items()), flush=True)
    return result


@asynccontextmanager
async def _fleet(system: Front, death: Death) -> AsyncIterator[tuple[Fleet, "Redis"]]:
    redis = connect(system.url)
    fleet = Fleet(system, redis, death)
    try:
        yield fleet, redis
    finally:
        await fleet.renew()
        await redis.aclose()


def main() -> None:
    """The command line. Exit status 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of each way to die (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=130.0, help="no further kill after that (default: %(default)s)"
    )
    parser.add_argument("--streams", type=int, default=16, help="at once (default: %(default)s)")
    parser.add_argument("--only", type=int, action="append", help=f"the n-th of {len(DEATHS)} ways, from 1")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "recovery.json")
    options = parser.parse_args()
    results = {}
    for number, death in enumerate(DEATHS, 1):
        if options.only and number not in options.only:
            continue
        with tempfile.TemporaryDirectory(prefix="fq") as folder, front(Path(folder)) as system:
            results[death.name] = asyncio.run(measure(system, death, options.kills, options.seconds, options.streams))
    setting = {**machine(), "streams": options.streams, "token_delay_ms": TOKEN_DELAY_MS}
    options.output.write_text(json.dumps({"machine": setting, "results": results}, indent=1) + "\n")
    missed = [name for name, result in results.items() if result["pause_p99_s"] > result.get("goal_p99_s", math.inf)]
    if missed:
        raise SystemExit(f"p99 above its goal: {missed}")


if __name__ == "__main__":
    main()
