"""How long tenant B waits beside tenant A, who has thousands of jobs in line, against B alone: ``make bench-queue``.

Protocol level: jobs go in through `Queue.enqueue` and are served by a real worker process with the echo engine. A wait
is the record's ``start_ms`` - ``enq_ms``, in whole ms; «first token» is measured by the client, from before the ENQUEUE
to the first token on its channel. B submits (a) one job at a time, the next when the last has ended, (b) a burst. Each
round measures both alone and beside A, on the same server and worker, and how many jobs of A end in a second: while B
was not there yet, and beside single jobs of B. ``FASTCHAT_Q_TENANT_HEADROOM=0`` shows what the headroom does and costs.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import AsyncExitStack, aclosing
from itertools import count
from pathlib import Path

from processes import echo_worker, server
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.connection import connect
from fastchat_q.embedded import server_binary, server_version
from fastchat_q.events import TERMINAL_STATES
from fastchat_q.jobs import Job, Message, Sampling
from fastchat_q.queue import Queue, Terms
from fastchat_q.settings import Settings

MODEL = "echo"
NAMES = keys.model_keys(MODEL)
SLOTS, TOKEN_DELAY_MS, TOKENS = 8, 5, 8
SINGLE = 100
BURST = 200
A_ALONE_S = 3.0
INBOX = keys.inbox("bench")


class Neighbours:
    """Both tenants' clients."""

    def __init__(self, redis: "Redis") -> None:
        self._redis, self._queue, self._numbers = redis, Queue(redis), count(1)

    async def submit(self, tenant: str, inbox: str = "") -> str:
        """One job."""
        job = Job(
            id=f"JOB{next(self._numbers):09}",
            model=MODEL,
            messages=(Message(role="user", content="one two three four five six seven eight nine ten"),),
            sampling=Sampling(max_tokens=TOKENS),
        )
        terms = Terms(inbox=inbox, tenant=tenant, detached=True, max_waiting=10**6, keep_s=600.0)
        await self._queue.enqueue(job, terms)
        return job.id

    async def wait_ms(self, job_id: str) -> int:
        """Waits for the job's end; returns how long it stood in line."""
        while True:
            state, enq_ms, start_ms = await self._redis.hmget(NAMES.job(job_id), ["state", "enq_ms", "start_ms"])  # type: ignore[misc]
            if state.decode() in TERMINAL_STATES:
                return int(start_ms) - int(enq_ms)
            await asyncio.sleep(0.005)

    async def flood(self, jobs: int) -> None:
        """Tenant A."""
        for _ in range(jobs // 100):
            await asyncio.gather(*(self.submit("a") for _ in range(100)))

    async def waiting(self) -> int:
        """Jobs in line."""
        return int(await self._redis.zcard(NAMES.waiting("hi")))

    async def clear(self) -> None:
        """Cancels all that waits, and lets what runs end."""
        while ids := await self._redis.zrange(NAMES.live, 0, 99):
            await asyncio.gather(*(self._queue.cancel(MODEL, i.decode(), "cleared") for i in ids))

    async def succeeded(self) -> int:
        """Jobs of both that have ended."""
        return int(await self._redis.hget(NAMES.stat, "succeeded") or 0)  # type: ignore[misc]

    async def a_alone(self) -> float:
        """Jobs of A that end in a second, as if B had never been there."""
        await self._redis.delete(NAMES.away)
        before, start = await self.succeeded(), time.perf_counter()
        await asyncio.sleep(A_ALONE_S)
        return (await self.succeeded() - before) / (time.perf_counter() - start)

    async def single(self, listener: "Redis") -> tuple[list[int], list[float], float]:
        """B, one at a time: waits and first tokens in ms, and the jobs of A that end in a second meanwhile."""
        waits, first_tokens = [], []
        async with listener.pubsub() as pubsub:
            await pubsub.subscribe(INBOX)
            await pubsub.get_message(timeout=5.0)
            before, began = await self.succeeded(), time.perf_counter()
            for _ in range(SINGLE):
                start = time.perf_counter()
                job_id = await self.submit("b", INBOX)
                while await pubsub.get_message(ignore_subscribe_messages=True, timeout=5.0) is None:
                    pass
                first_tokens.append((time.perf_counter() - start) * 1000)
                waits.append(await self.wait_ms(job_id))
                while await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.0) is not None:
                    pass
            rate = (await self.succeeded() - before - SINGLE) / (time.perf_counter() - began)
        return waits, first_tokens, rate

    async def burst(self) -> list[int]:
        """B, all at once."""
        ids = await asyncio.gather(*(self.submit("b") for _ in range(BURST)))
        return [await self.wait_ms(job_id) for job_id in ids]


def p95(values: list[int] | list[float]) -> float:
    """The 95th percentile."""
    return statistics.quantiles(values, n=20)[18]


async def measure(redis: "Redis", listener: "Redis", jobs: int, rounds: int) -> dict[str, object]:
    """The figures, as they are recorded: p95 of each round, in ms, and the medians of those."""
    neighbours = Neighbours(redis)
    await neighbours.burst()  # warm
    found: dict[str, list[float]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    left = []
    for _ in range(rounds):
        for where in ("alone", "beside"):
            if where == "beside":
                await neighbours.flood(jobs)
                rates["b_absent"].append(await neighbours.a_alone())
            waits, first_tokens, rate = await neighbours.single(listener)
            found[f"single_{where}"].append(p95(waits))
            found[f"first_token_{where}"].append(p95(first_tokens))
            found[f"burst_{where}"].append(p95(await neighbours.burst()))
        rates["b_single"].append(rate)
        left.append(await neighbours.waiting())
        await neighbours.clear()
    medians = {name: round(statistics.median(values), 2) for name, values in found.items()}
    return {
        "queued_by_a": jobs,
        "still_waiting_of_a": left,
        "rounds": rounds,
        "slots": SLOTS,
        "tenant_headroom": Settings().tenant_headroom,
        "service_ms": TOKEN_DELAY_MS * TOKENS,
        "p95_wait_ms": medians,
        "ratio_single": round(medians["single_beside"] / max(medians["single_alone"], 1.0), 2),
        "ratio_burst": round(medians["burst_beside"] / max(medians["burst_alone"], 1.0), 2),
        "ratio_first_token": round(medians["first_token_beside"] / medians["first_token_alone"], 2),
        "a_jobs_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "all_rounds": found,
        "all_rates": rates,
    }


async def main(jobs: int, rounds: int, output: Path) -> None:
    """Starts a server and a worker, measures, prints and records."""
    serving = ("--slots", str(SLOTS), "--token-delay-ms", str(TOKEN_DELAY_MS))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fq")))
        url, _ = stack.enter_context(server(folder))
        redis = await stack.enter_async_context(aclosing(connect(url, max_connections=128)))
        listener = await stack.enter_async_context(aclosing(connect(url, blocking=True)))
        stack.enter_context(echo_worker(folder, url, MODEL, *serving))
        figures = await measure(redis, listener, jobs, rounds)
    figures["server"] = server_version(server_binary())
    output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if not name.startswith("all_")}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=5000, help="jobs that A has in line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "noisy-neighbour.json")
    given = parser.parse_args()
    asyncio.run(main(given.jobs, given.rounds, given.output))
