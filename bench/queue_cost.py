"""What one call of each script costs beside an empty queue and beside a long one, in one run: ``make bench-queue``.

Two servers of our own, one with ``--waiting`` jobs in line; the calls alternate between them. «client» is the time of a
call as one client sees it over a unix socket, «server» the EVALSHA time of commandstats. Medians over rounds.
"""

import argparse
import asyncio
import json
import secrets
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from processes import server

from fastchat_q import keys
from fastchat_q.connection import connect
from fastchat_q.embedded import server_binary, server_version
from fastchat_q.events import Piece, Result
from fastchat_q.jobs import Job, Message, Sampling
from fastchat_q.queue import Claim, Finish, Queue, Terms
from fastchat_q.tokens import Chunk, append

MODEL = "bench"
SIDES = ("client", "server")
TERMS = Terms(inbox="fq:inbox:bench", max_waiting=10**7, queue_deadline_s=3600.0)
FLAT = ("ENQUEUE", "CLAIM 1", "CLAIM 4", "EMIT 1", "EMIT 32")
ALIKE = 1.3
"""A call beside a long queue may cost so many times what it costs beside an empty one."""


class Side:
    """One server and its queue."""

    def __init__(self, url: str) -> None:
        self.redis = connect(url)
        self.queue = Queue(self.redis)
        self.number = 0
        self.client_us: dict[str, list[float]] = defaultdict(list)
        self.server_us: dict[str, list[float]] = defaultdict(list)

    def job(self, characters: int = 1024) -> Job:
        """The next job, with a prompt of so many characters."""
        self.number += 1
        message = Message(role="user", content="x" * characters)
        return Job(id=f"JOB{self.number:09}", model=MODEL, messages=(message,), sampling=Sampling(max_tokens=64))

    async def fill(self, jobs: int, characters: int) -> float:
        """Queues jobs of 50 tenants; returns the bytes of memory that one takes."""
        before = (await self.redis.info("memory"))["used_memory"]
        for _ in range(jobs // 100):
            terms = [Terms(inbox=TERMS.inbox, max_waiting=10**7, tenant=f"t{i % 50}") for i in range(100)]
            await asyncio.gather(*(self.queue.enqueue(self.job(characters), t) for t in terms))
        return float((await self.redis.info("memory"))["used_memory"] - before) / jobs

    async def timed(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """Times a call that is one EVALSHA."""
        before = await self._evalsha_us()
        start = time.perf_counter()
        answer = await call()
        self.client_us[name].append((time.perf_counter() - start) * 1e6)
        self.server_us[name].append(await self._evalsha_us() - before)
        return answer

    async def claim(self, count: int) -> list[Claim]:
        """Claims from the interactive lane."""
        nonce = secrets.token_hex(4)
        return (await self.queue.claim(MODEL, "w", running=0, lanes=[("hi", count)], nonce=nonce)).claims

    async def put(self, jobs: int) -> list[str]:
        """Queues jobs, not timed."""
        made = [self.job() for _ in range(jobs)]
        for job in made:
            await self.queue.enqueue(job, TERMS)
        return [job.id for job in made]

    async def round(self) -> None:
        """Each call once; the queue is as long afterwards as before."""
        new = self.job()
        await self.timed("ENQUEUE", lambda: self.queue.enqueue(new, TERMS))
        held = await self.timed("CLAIM 1", lambda: self.claim(1))
        await self.put(4)
        held += await self.timed("CLAIM 4", lambda: self.claim(4))
        await self.put(27)
        held += await self.claim(27)
        one = [Chunk(held[0], 1, (Piece((7,), " word"),))]
        many = [Chunk(c, 2 if c is held[0] else 1, (Piece((7,), " word"),)) for c in held]
        await self.timed("EMIT 1", lambda: append(self.redis, MODEL, one))
        await self.timed("EMIT 32", lambda: append(self.redis, MODEL, many))
        ends = [Finish(c, 2 if c is held[0] else 1, "succeeded", "stop", Result("stop")) for c in held]
        await self.timed("FINISH", lambda: append(self.redis, MODEL, [], ends[:1]))
        for end in ends[1:]:
            await append(self.redis, MODEL, [], [end])
        [waiting] = await self.put(1)
        await self.timed("CANCEL (waiting)", lambda: self.queue.cancel(MODEL, waiting, "bench"))
        await self.timed("REAP", lambda: self.queue.reap(MODEL))
        await self.timed("RECONCILE", lambda: self.queue.reconcile(MODEL))

    async def _evalsha_us(self) -> int:
        return int((await self.redis.info("commandstats")).get("cmdstat_evalsha", {}).get("usec", 0))


async def measure(urls: list[str], waiting: int, rounds: int) -> dict[str, Any]:
    """The figures, as they are recorded."""
    empty, full = Side(urls[0]), Side(urls[1])
    tiny_bytes = await full.fill(min(waiting, 5000), 8)
    await full.redis.flushall()
    kilo_bytes = await full.fill(waiting, 1024)
    for side in (empty, full):  # loads the scripts
        await side.round()
        side.client_us.clear()
        side.server_us.clear()
    for number in range(rounds):
        for side in (empty, full) if number % 2 else (full, empty):
            await side.round()
    calls = {}
    for name in empty.client_us:
        row: dict[str, float] = {}
        for what, a, b in (
            ("client", empty.client_us[name], full.client_us[name]),
            ("server", empty.server_us[name], full.server_us[name]),
        ):
            row[f"{what}_us_empty"] = round(statistics.median(a), 1)
            row[f"{what}_us_long"] = round(statistics.median(b), 1)
            row[f"{what}_ratio"] = round(statistics.median(b) / max(statistics.median(a), 1.0), 2)
        calls[name] = row
    left = await full.redis.zcard(keys.model_keys(MODEL).waiting("hi"))
    memory = {"tiny_prompt": round(tiny_bytes), "1_KB_prompt": round(kilo_bytes)}
    await empty.redis.aclose()
    await full.redis.aclose()
    return {"waiting": left, "rounds": rounds, "bytes_per_waiting_job": memory, "calls": calls}


async def main(waiting: int, rounds: int, output: Path) -> None:
    """Starts two servers, measures, prints and records."""
    with ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory(prefix="fq")) for _ in range(2)]
        urls = [stack.enter_context(server(Path(folder)))[0] for folder in folders]
        figures = await measure(urls, waiting, rounds)
    figures["server"] = server_version(server_binary())
    output.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{'call':18}{'client µs':>20}{'ratio':>8}{'server µs':>20}{'ratio':>8}")
    for name, row in figures["calls"].items():
        columns = [f"{row[f'{w}_us_empty']:>10}{row[f'{w}_us_long']:>10}{row[f'{w}_ratio']:>8}" for w in SIDES]
        print(f"{name:18}{''.join(columns)}")
    print(f"bytes per waiting job: {figures['bytes_per_waiting_job']}, {figures['waiting']} jobs wait")
    slow = [name for name in FLAT if figures["calls"][name]["server_ratio"] > ALIKE]
    print(f"more than {ALIKE} times: {', '.join(slow) or 'none'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "queue-cost.json")
    given = parser.parse_args()
    asyncio.run(main(given.waiting, given.rounds, given.output))
