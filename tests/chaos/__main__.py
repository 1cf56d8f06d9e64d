"""``python -m tests.chaos``: one run, from start to verdict. Exit code 3: violations."""

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.connection import connect
from fastchat_q.queue import Queue

from . import MODEL
from .checker import Checker
from .fleet import Fleet
from .load import Load, Shape
from .mutants import MUTANTS
from .nemesis import EVERYTHING, LATE_WRITERS, Nemesis
from .observer import Observer, is_quiet
from .report import Report

CLIENTS = 24
DRAIN_S = 60.0
"""Everything must have ended so long after the last fault and the last request."""
PROFILES = {
    "everything": (Shape(), EVERYTHING),
    # For mutants: jobs that outlast a lease, so that most are still running when a frozen writer wakes up.
    "late-writers": (Shape(tokens=(300, 600), delay_ms=(20.0, 40.0)), LATE_WRITERS),
}
EXIT_VIOLATIONS = 3


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="of load and faults; by default a new one, which is printed")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long there are requests and faults")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="requests at a time")
    parser.add_argument("--profile", choices=sorted(PROFILES), help="which faults; by default everything")
    parser.add_argument(
        "--mutant", choices=sorted(MUTANTS), help="remove a safety: expects violations; profile late-writers"
    )
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args()
    profile = options.profile or ("late-writers" if options.mutant else "everything")
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"chaos: seed {seed}, {options.minutes:g} minutes, mutant {options.mutant or '-'}", flush=True)
    report = Report(seed, options.minutes, options.mutant)
    folder = Path(tempfile.mkdtemp(prefix="fqc"))
    rngs = {part: random.Random(f"{seed} {part}") for part in ("fleet", "load", "nemesis")}
    fleet = Fleet(folder, rngs["fleet"], report, options.mutant)
    try:
        fleet.start()
        uvloop.run(run(fleet, report, rngs, options.clients, profile))
        fleet.read_logs()
    finally:
        fleet.close()
    print(report.table())
    if options.json is not None:
        report.write_json(options.json)
    if report.violations:
        report.write_json(folder / "report.json")
        print(f"logs, and the report with its timeline: {folder}")
        print(f"again: make chaos SEED={seed} MINUTES={options.minutes:g}")
        sys.exit(EXIT_VIOLATIONS)
    shutil.rmtree(folder)


async def run(fleet: Fleet, report: Report, rngs: dict[str, random.Random], clients: int, profile: str) -> None:
    """Load and faults, then quiet, then the verdict, which is in the report."""
    shape, faults = PROFILES[profile]
    observer = Observer(fleet.redis.url, report)
    load = Load([api.port for api in fleet.apis], fleet.bearers, rngs["load"], report, clients, shape)
    nemesis = Nemesis(fleet, rngs["nemesis"], report, faults, load.cut_all)
    until = time.monotonic() + report.minutes * 60
    background = [asyncio.create_task(fleet.keep()), asyncio.create_task(observer.run())]
    redis = connect(fleet.redis.url)
    try:
        await asyncio.gather(load.run(until), nemesis.run(until))
        report.note("the last fault is over, the last client has left")
        await _drain(redis, report)
        await _reconcile(redis)
        await observer.sweep(redis)
        checker = Checker(report, observer, load.transcripts)
        await checker.check_redis(redis)
    finally:
        for task in background:
            task.cancel()
        for outcome in await asyncio.gather(*background, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await redis.aclose()
    checker.check(nemesis.hits, nemesis.outages)


async def _drain(redis: "Redis", report: Report) -> None:
    """Waits until every job has ended."""
    deadline = time.monotonic() + DRAIN_S
    while not await is_quiet(redis):
        if time.monotonic() > deadline:
            left = [job_id.decode() for job_id in await redis.zrange(keys.model_keys(MODEL).live, 0, 9)]
            report.violate(f"jobs are left {DRAIN_S:g} s after the last fault", " ".join(left))
            return
        await asyncio.sleep(0.2)


async def _reconcile(redis: "Redis") -> None:
    """What the product does every few seconds, now: the last faults may have left entries that stand for no job."""
    while await Queue(redis).reconcile(MODEL):
        pass


if __name__ == "__main__":
    main()
