"""One queue in Redis and its `QueueModel`, and what must hold between them at any time."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis.stateful import RuleBasedStateMachine, invariant

from fastchat_q import keys, scripts
from fastchat_q.connection import connect
from fastchat_q.jobs import Job
from fastchat_q.queue import Claim, Queue, Terms

from .protocol import NAMES
from .queue_model import TERMINAL, ModelJob, QueueModel

T = TypeVar("T")
INBOX = "fq:inbox:t"
WEIGHTS = {"ann": 1.0, "bob": 2.0, "cy": 0.5}
PARALLEL = {"ann": 0, "bob": 2, "cy": 1}


class QueueComparison(RuleBasedStateMachine):
    """The state of a run, without its rules. ``damaged``: an operator broke something, and RECONCILE has not run."""

    url = ""
    runner: asyncio.Runner

    def __init__(self) -> None:
        super().__init__()
        self.redis = connect(self.url)
        self.queue = Queue(self.redis)
        self.listener = connect(self.url, blocking=True)
        self.model = QueueModel()
        self.terms: dict[str, tuple[Job, Terms]] = {}
        self.zombies: list[Claim] = []
        self.ends: Counter[str] = Counter()
        self.ended: dict[str, str] = {}
        self.damaged = False
        self.unindexed: set[str] = set()
        self.nonce = 0
        self.do(self.redis.flushall())
        self.pubsub = self.listener.pubsub()
        self.do(self.pubsub.subscribe(INBOX))

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        """Runs a call on the machine's own loop."""
        return self.runner.run(call)

    def teardown(self) -> None:
        """Closes the connections."""
        self.do(self.pubsub.aclose())  # type: ignore[no-untyped-call]
        self.do(self.listener.aclose())
        self.do(self.redis.aclose())

    @invariant()
    def redis_agrees(self) -> None:
        """Each record and each index is what the model says."""
        self.do(self._compare())

    async def _compare(self) -> None:
        model, jobs = self.model, list(self.model.jobs.values())
        pipe = self.redis.pipeline()
        for job in jobs:
            pipe.hgetall(NAMES.job(job.id)).xrange(NAMES.log(job.id))
            pipe.pttl(NAMES.job(job.id)).pttl(NAMES.log(job.id))
        records = await pipe.execute()
        for at, job in enumerate(jobs):
            self._compare_job(job, *records[4 * at : 4 * at + 4])
        for lane in keys.ALL_LANES:
            line = await self.redis.zrange(NAMES.waiting(lane), 0, -1, withscores=True)
            assert [(i.decode(), score) for i, score in line] == [(j.id, j.score) for j in model.at("line", lane)]
        for name, place in ((NAMES.lease, "lease"), (NAMES.delay, "delay")):
            assert {i.decode() for i in await self.redis.zrange(name, 0, -1)} == {j.id for j in model.at(place)}
        live = {job.id for job in jobs if job.state not in TERMINAL}
        assert {i.decode() for i in await self.redis.zrange(NAMES.live, 0, -1)} == live
        for tenant in WEIGHTS:
            parked = {i.decode() for i in await self.redis.zrange(NAMES.parked(tenant), 0, -1)}
            assert parked == {j.id for j in model.at("parked", tenant=tenant)}
            assert not PARALLEL[tenant] or len(model.running(tenant=tenant)) <= PARALLEL[tenant]
        await self._compare_away()
        if not self.damaged:
            await self._compare_counters()
        for known, (job_id, body) in model.idempotency.items():
            assert await self.redis.get(NAMES.idempotency(known)) == f"{job_id} {body}".encode()
            assert await self.redis.pttl(NAMES.idempotency(known)) > 0
        assert await self._ends() == {job.id: job.ends for job in jobs if job.ends}

    def _compare_job(self, job: ModelJob, raw: dict[bytes, bytes], log: list[Any], ttl: int, log_ttl: int) -> None:
        record = {name.decode(): value.decode() for name, value in raw.items()}
        held = job.claim if job.state == "running" else None
        assert {name: record[name] for name in ("state", "lane", "attempt", "deaths", "retries", "n", "fence")} == {
            "state": job.state,
            "lane": job.lane,
            "attempt": str(job.attempt),
            "deaths": str(job.deaths),
            "retries": str(job.retries),
            "n": str(job.n),
            "fence": held.fence if held else "",
        }
        assert record["inbox"].split() == job.inbox or job.state in TERMINAL
        assert [int(entry.split(b"-")[1]) for entry, _ in log] == job.log
        assert [int(f[b"k"]) for _, f in log] == [b - a for a, b in zip([0, *job.log], job.log, strict=False)]
        assert ttl > 0
        assert log_ttl > 0 or not job.log
        if job.id in self.ended:
            assert self.ended[job.id] == job.state, "what has ended stays as it is"
        if job.state in TERMINAL:
            self.ended[job.id] = job.state
            assert ("spec" in record) == (job.state not in ("succeeded", "cancelled"))

    async def _compare_away(self) -> None:
        expected = {t.decode() for t in await self.redis.zrangebyscore(NAMES.away, 2, "+inf")}
        assert expected == self.model.away
        if expected:  # that clock stands still: only a rule lets it run out
            await self.redis.zadd(NAMES.away, dict.fromkeys(expected, 2**50), xx=True)

    async def _compare_counters(self) -> None:
        model = self.model
        for name, jobs in ((NAMES.queued, model.queued()), (NAMES.running, model.running())):
            kept = {t.decode(): int(c) for t, c in (await self.redis.hgetall(name)).items()}  # type: ignore[misc]
            assert kept == Counter(job.tenant for job in jobs)
        for lane in keys.ALL_LANES:
            if not await self.redis.exists(NAMES.stream(lane)):
                assert not model.at("line", lane)
                continue
            found = await self.redis.xinfo_groups(NAMES.stream(lane))
            group = found[0] if found else {"pending": 0, "lag": 0}
            waiting, running = len(model.at("line", lane)), model.running(lane=lane)
            surely = [job for job in running if job.claim and job.claim.fence not in self.unindexed]
            assert len(surely) <= group["pending"] <= len(running)
            assert await self.redis.xlen(NAMES.stream(lane)) - group["pending"] == waiting
            assert group.get("lag") in (waiting, None), "unknown until RECONCILE (always on 6.2), but never wrong"

    async def _ends(self) -> Counter[str]:
        await self.redis.publish(INBOX, "that is all")
        while True:
            message = await self.pubsub.get_message(ignore_subscribe_messages=True, timeout=5)
            if message is None:
                continue
            if message["data"] == b"that is all":
                break
            for line in message["data"].split(b"\n"):
                if line.split(b" ", 3)[2] == b"end":
                    self.ends[line.split(b" ")[0].decode()] += 1
        return Counter({i: count for i, count in self.ends.items() if i in self.model.jobs})

    def fence_out(self, job: ModelJob) -> None:
        """Whoever runs the job is a zombie from now on."""
        if job.state == "running" and job.claim is not None:
            self.zombies.append(job.claim)

    def lease_order(self) -> list[ModelJob]:
        """Jobs with a lease, first to run out first."""
        return [self.model.jobs[i.decode()] for i in self.do(self.redis.zrange(NAMES.lease, 0, -1))]

    def field(self, job_id: str, name: str) -> str:
        """One field of a record."""
        return str(self.do(self.redis.hget(NAMES.job(job_id), name)).decode())  # type: ignore[arg-type, union-attr]

    def set(self, job_id: str, name: str, value: int) -> None:
        """Rewrites one field of a record."""
        self.do(self.redis.hset(NAMES.job(job_id), name, str(value)))  # type: ignore[arg-type]

    def call(self, name: str, *args: scripts.Arg) -> int:
        """A script that `Queue` has no method for."""
        return int(self.do(scripts.call(self.redis, name, NAMES.script_keys, args)))
