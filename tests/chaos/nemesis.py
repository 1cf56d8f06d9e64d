"""The faults: drawn at random, several at a time, within limits that leave somebody to do the work."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import psutil  # type: ignore[import-untyped]
from redis.asyncio import Redis
from redis.exceptions import RedisError

from fastchat_q import keys
from fastchat_q.connection import connect
from fastchat_q.queue import LEASE_MS

from . import MODEL
from .fleet import Fleet, Member
from .report import Report

LEASE_S = LEASE_MS / 1000
MAX_WORKERS_HIT = 2
MAX_APIS_HIT = 1
SUPERVISORS = 0.2
"""So often it is the supervisor that is hit and not its engine."""
NAMES = keys.model_keys(MODEL)


@dataclass(frozen=True, slots=True)
class Profile:
    """How often which fault: mean seconds between two, weight of each."""

    every_s: float
    weights: dict[str, int]
    longest_freeze_s: tuple[float, float] = (LEASE_S + 2, LEASE_S + 5)


EVERYTHING = Profile(
    2.8,
    {
        "kill worker": 14,
        "freeze worker beyond its lease": 9,
        "freeze worker": 8,
        "terminate worker": 4,
        "kill api": 5,
        "freeze api": 3,
        "trim lane": 6,
        "destroy group": 6,
        "delete leases": 3,
        "delete consumer": 3,
        "kill subscribers": 6,
        "cut all clients": 3,
        "forget scripts": 3,
        "kill redis": 3,
        "freeze redis": 3,
    },
)
LATE_WRITERS = Profile(1.5, {"freeze worker beyond its lease": 1}, (LEASE_S + 0.2, LEASE_S + 2.5))
"""For mutants: nothing but workers that wake up after somebody else has taken over."""


@dataclass(slots=True)
class Nemesis:
    """Hits the fleet."""

    fleet: Fleet
    rng: random.Random
    report: Report
    profile: Profile
    cut_all_clients: Callable[[], None]
    hits: list[tuple[int, float]] = field(default_factory=list)
    """Which member was hit when: the pid that its worker's id has, Unix seconds."""
    outages: list[tuple[float, float]] = field(default_factory=list)
    """When Redis was down or frozen, in Unix seconds."""
    _redis_hit: bool = False

    async def run(self, until: float) -> None:
        """Strikes until then (monotonic clock); returns when everything is as it was."""
        client = connect(self.fleet.redis.url)
        try:
            async with asyncio.TaskGroup() as under_way:
                while time.monotonic() < until:
                    await asyncio.sleep(min(self.rng.expovariate(1 / self.profile.every_s), 3 * self.profile.every_s))
                    self._strike(under_way, client)
        finally:
            await client.aclose()

    def _strike(self, under_way: asyncio.TaskGroup, client: "Redis") -> None:
        [name] = self.rng.choices(list(self.profile.weights), list(self.profile.weights.values()))
        if name in ("kill redis", "freeze redis"):
            if not self._redis_hit:
                under_way.create_task(self._hit_redis(name))
        elif name.endswith("api") or "worker" in name:
            of_workers = "worker" in name
            members = self.fleet.workers if of_workers else self.fleet.apis
            limit = MAX_WORKERS_HIT if of_workers else MAX_APIS_HIT
            sound = [member for member in members if member.alive and not member.impaired]
            if len(members) - len(sound) < limit:
                under_way.create_task(self._hit_member(name, self.rng.choice(sound)))
        elif name == "cut all clients":
            self.report.count("faults", name)
            self.report.note(name)
            self.cut_all_clients()
        else:
            under_way.create_task(self._hit_data(name, client))

    async def _hit_member(self, name: str, member: Member) -> None:
        target: psutil.Process | None = psutil.Process(member.pid)
        if member.supervised and not name.startswith("terminate") and self.rng.random() >= SUPERVISORS:
            target = member.engine()
        if target is None:
            return
        whose = "supervisor of " if member.supervised and target.pid == member.pid else ""
        self.report.count("faults", f"{name}{' (supervisor)' if whose else ''}")
        self.report.note(f"{name}: {whose}{member.name} pid={target.pid}")
        if not (whose and name.startswith("freeze")):
            self.hits.append((member.pid, time.time()))
        member.impaired = True
        try:
            if name.startswith("kill"):
                target.kill()
                await asyncio.sleep(0.2)  # until the fleet sees it
            elif name.startswith("terminate"):
                member.excused = True
                target.terminate()
                while member.alive and member.excused:  # its successor is not excused
                    await asyncio.sleep(0.1)
            else:
                await self._freeze(target.send_signal, self._freeze_s(name))
        except psutil.NoSuchProcess:
            self.report.note(f"{name}: pid={target.pid} was gone")
        finally:
            member.impaired = False

    def _freeze_s(self, name: str) -> float:
        if name == "freeze worker beyond its lease":
            return self.rng.uniform(*self.profile.longest_freeze_s)
        return self.rng.uniform(0.3, LEASE_S / 2) if name == "freeze worker" else self.rng.uniform(0.3, 3.0)

    @staticmethod
    async def _freeze(send: Callable[[int], None], seconds: float) -> None:
        send(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            send(signal.SIGCONT)

    async def _hit_redis(self, name: str) -> None:
        self._redis_hit = True
        self.report.count("faults", name)
        self.report.note(name)
        server, began = self.fleet.redis, time.time()
        try:
            if name == "kill redis":
                server.kill()
                await asyncio.sleep(self.rng.uniform(0.0, 1.5))
                await asyncio.to_thread(server.restart)
            else:
                await self._freeze(server.process.send_signal, self.rng.uniform(2.0, 5.0))
        finally:
            self._redis_hit = False
            self.outages.append((began, time.time()))
            self.report.note(f"{name}: over")

    async def _hit_data(self, name: str, client: "Redis") -> None:
        actions: dict[str, Callable[[Redis], Awaitable[object]]] = {
            "trim lane": self._trim,
            "destroy group": self._destroy_group,
            "delete consumer": self._delete_consumer,
            "delete leases": lambda redis: redis.delete(NAMES.lease),
            "kill subscribers": self._kill_subscribers,
            "forget scripts": lambda redis: redis.script_flush(),
        }
        try:
            await actions[name](client)
        except RedisError as error:  # it is down, or has no such group now: no fault was done
            self.report.note(f"{name}: {error}")
        else:
            self.report.count("faults", name)
            self.report.note(name)

    async def _trim(self, redis: "Redis") -> None:
        await redis.xtrim(NAMES.stream(self.rng.choice(keys.ALL_LANES)), maxlen=0, approximate=False)

    async def _destroy_group(self, redis: "Redis") -> None:
        await redis.xgroup_destroy(NAMES.stream(self.rng.choice(keys.LANES)), keys.GROUP)

    async def _delete_consumer(self, redis: "Redis") -> None:
        stream = NAMES.stream(self.rng.choice(keys.LANES))
        consumers = await redis.xinfo_consumers(stream, keys.GROUP)
        if consumers:  # its pending entries go with it
            await redis.xgroup_delconsumer(stream, keys.GROUP, self.rng.choice(consumers)["name"])

    async def _kill_subscribers(self, redis: "Redis") -> None:
        for client in await redis.client_list(_type="pubsub"):
            if client["psub"] == "0":  # the observer hears a pattern, and is no part of the product
                await redis.client_kill_filter(_id=client["id"])
