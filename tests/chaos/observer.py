"""Reads what the product wrote, by itself: every record and log by sweeping over the keys, every end by subscription.

A record is read when its job has ended, and looked at again in every sweep as long as it is kept: a terminal state must
never change.
"""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from fastchat_q import keys
from fastchat_q.connection import connect
from fastchat_q.events import TERMINAL_STATES
from fastchat_q.loops import AWAY, check_cancelled

from . import MODEL
from .report import Report
from .token_log import Entry, flaws

SWEEP_S = 2.0
RETRY_S = 0.05
SCANNED = 1000
SHOWN = 12
NAMES = keys.model_keys(MODEL)


@dataclass(slots=True)
class Record:
    """A job that has ended, as it was when first seen so."""

    job_id: str
    fields: dict[str, str]
    text: str
    """All of the log."""
    tail: list[Entry]
    """The last entries of the log, to be shown."""
    record_ttl_ms: int
    log_ttl_ms: int

    @property
    def state(self) -> str:
        """Its terminal state."""
        return self.fields["state"]

    @property
    def n(self) -> int:
        """Tokens in the log, as the record has it."""
        return int(self.fields["n"])

    @property
    def done_s(self) -> float:
        """When it ended, in Unix seconds."""
        return int(self.fields["done_ms"]) / 1000

    def history(self) -> list[tuple[float, str, float, str]]:
        """For each attempt that is still known: when it began, on which worker, when it ended, how."""
        attempts = []
        for name, value in self.fields.items():
            if name[0] == "a" and name[1:].isdigit():
                began, worker = value.split(" ", 1)
                ended, _, how = self.fields.get("e" + name[1:], "0 ?").partition(" ")
                attempts.append((int(began) / 1000, worker, int(ended) / 1000, how))
        return sorted(attempts)

    def evidence(self) -> str:
        """What a person needs to see."""
        short = {name: value[:300] for name, value in self.fields.items()}
        lines = [f"record {short}"]
        lines += [f"attempt {began:.3f} {worker} .. {ended:.3f} {how}" for began, worker, ended, how in self.history()]
        lines += [f"log 0-{entry.n} k={entry.k} {entry.text}" for entry in self.tail]
        return "\n".join(lines)


@dataclass(slots=True)
class Observer:
    """`run` gathers until cancelled; `sweep` can be called once more at the end."""

    url: str
    report: Report
    records: dict[str, Record] = field(default_factory=dict)
    ends: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    """Job -> channel -> terminal events heard."""
    deaf: list[tuple[float, float]] = field(default_factory=list)
    """When nothing could be heard, in Unix seconds."""
    seen: set[str] = field(default_factory=set)
    """Every job that ever had a record."""

    async def run(self) -> None:
        """The observer's loops, for ever."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._hear_ends())
            loops.create_task(self._sweep_on())

    async def _hear_ends(self) -> None:
        redis = connect(self.url, blocking=True)
        deaf_since: float | None = time.time()
        while True:
            pubsub = redis.pubsub()
            try:
                await pubsub.psubscribe(keys.inbox("*"))  # the one subscriber of a pattern: the nemesis spares it
                while True:
                    message = await pubsub.get_message(timeout=None)
                    check_cancelled()
                    if message is None:
                        continue
                    if message["type"] == "psubscribe" and deaf_since is not None:
                        self.deaf.append((deaf_since, time.time()))
                        deaf_since = None
                    elif message["type"] == "pmessage":
                        self._hear(message["channel"].decode(), message["data"])
            except AWAY:
                check_cancelled()
                deaf_since = deaf_since or time.time()
                await asyncio.sleep(RETRY_S)
            finally:
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    def _hear(self, channel: str, message: bytes) -> None:
        for line in message.split(b"\n"):
            job_id, _, kind, _ = line.split(b" ", 3)
            if kind == b"end":
                self.ends[job_id.decode()][channel] += 1

    async def _sweep_on(self) -> None:
        redis = connect(self.url)
        while True:
            with contextlib.suppress(*AWAY):
                await self.sweep(redis)
            check_cancelled()
            await asyncio.sleep(SWEEP_S)

    async def sweep(self, redis: "Redis") -> None:
        """Looks at every job record that there is."""
        prefix = NAMES.job("")
        found = {name.decode().removeprefix(prefix) async for name in redis.scan_iter(NAMES.job("*"), count=SCANNED)}
        self.seen |= found
        ids = sorted(found)
        pipe = redis.pipeline(transaction=False)
        for job_id in ids:
            pipe.hmget(NAMES.job(job_id), ["state", "n", "done_ms", "attempt"])
        ended = []
        for job_id, (state, *rest) in zip(ids, await pipe.execute(), strict=True):
            if state is None or state.decode() not in TERMINAL_STATES:
                if state is not None and job_id in self.records:
                    self._changed(job_id, f"{state!r} {rest}")
            elif job_id not in self.records:
                ended.append(job_id)
            else:
                fields = self.records[job_id].fields
                now = [value.decode() for value in (state, *rest)]
                if now != [fields["state"], fields["n"], fields["done_ms"], fields["attempt"]]:
                    self._changed(job_id, str(now))
        await self._read(redis, ended)

    async def _read(self, redis: "Redis", ids: Iterable[str]) -> None:
        for job_id in ids:
            pipe = redis.pipeline(transaction=False)
            pipe.hgetall(NAMES.job(job_id))
            pipe.xrange(NAMES.log(job_id))
            pipe.pttl(NAMES.job(job_id))
            pipe.pttl(NAMES.log(job_id))
            fields, log, record_ttl_ms, log_ttl_ms = await pipe.execute()
            if fields:
                entries = [_entry(entry_id, values) for entry_id, values in log]
                text = "".join(entry.text for entry in entries)
                decoded = {name.decode(): value.decode() for name, value in fields.items()}
                record = Record(job_id, decoded, text, entries[-SHOWN:], record_ttl_ms, log_ttl_ms)
                self.records[job_id] = record
                for what, evidence in flaws(entries, record.n, int(decoded["attempt"])):
                    self.report.violate(what, job_id, f"{evidence}\n{record.evidence()}")

    def _changed(self, job_id: str, now: str) -> None:
        self.report.violate("a terminal state changed", job_id, f"now {now}\n{self.records[job_id].evidence()}")


def _entry(entry_id: bytes, values: dict[bytes, bytes]) -> Entry:
    payload = orjson.loads(values[b"d"])
    return Entry(int(entry_id.partition(b"-")[2]), int(values[b"k"]), payload["t"], payload["s"])


async def is_quiet(redis: "Redis") -> bool:
    """Whether no job is left that has not ended."""
    try:
        return not await redis.zcard(NAMES.live)
    except RedisError:
        return False
