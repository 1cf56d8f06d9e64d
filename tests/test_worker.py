"""The worker's loops against a real server, in this process, with the echo engine."""

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fastchat_q.workers import record
from fastchat_q.workers.active import Links
from fastchat_q.workers.engines.base import Output, Request
from fastchat_q.workers.engines.echo import EchoEngine
from fastchat_q.workers.worker import MAX_STEPS_AHEAD, Limits, Worker
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from fastchat_q import keys, scripts
from fastchat_q.connection import connect
from fastchat_q.errors import FastchatQError
from fastchat_q.events import Delta, Piece
from fastchat_q.jobs import Job, Message
from fastchat_q.queue import LEASE_MS, Claim, Queue, Terms
from fastchat_q.tokens import Chunk, append, read, read_claimed

from .servers import RedisServer, wait_until

NAMES = keys.model_keys("echo")
WORDS = [f"w{number}" for number in range(150)]


def job(job_id: str = "J1", words: list[str] = WORDS, lane: str = "hi") -> Job:
    message = Message(role="user", content=" ".join(words))
    return Job.model_validate({"id": job_id, "model": "echo", "lane": lane, "messages": [message.model_dump()]})


async def enqueue(redis: "Redis", *jobs: Job) -> None:
    for one in jobs:
        await Queue(redis).enqueue(one, Terms(inbox="fq:inbox:t"))


async def claim(redis: "Redis", worker_id: str, free: int) -> list[Claim]:
    return (await Queue(redis).claim("echo", worker_id, running=0, lanes=[("hi", free)], nonce="n")).claims


async def state(redis: "Redis", job_id: str = "J1") -> str:
    value = await redis.hget(NAMES.job(job_id), "state")  # type: ignore[misc]
    return value.decode() if value else "none"


async def until(fact: Callable[[], object], what: str) -> None:
    for _ in range(4000):
        if await fact():  # type: ignore[misc]
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"not within 20 s: {what}")


async def ended(redis: "Redis", job_id: str = "J1") -> None:
    async def over() -> bool:
        return await state(redis, job_id) not in ("queued", "running")

    await until(over, "the job ends")


@asynccontextmanager
async def running(links: Links, engine: EchoEngine, **limits: float) -> AsyncIterator[Worker]:
    worker = Worker(links, engine, Limits(**{"drain_s": 5, **limits}))
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        await task


def assert_whole(log: list[Delta], words: list[str] = WORDS) -> None:
    """Counts without gap or overlap, and the text."""
    seen = 0
    for delta in log:
        assert delta.n - delta.k == seen
        seen = delta.n
    assert "".join(delta.said for delta in log).split() == words


async def test_a_worker_that_keeps_losing_its_job_to_itself_writes_each_token_once(
    redis: "Redis", links: Links
) -> None:
    async with running(links, EchoEngine("echo", 4, 0.005)):
        await enqueue(redis, job())
        for loss in range(3):  # the fourth would make it dead

            async def further(least: int = 20 * (loss + 1)) -> bool:
                return int(await redis.hget(NAMES.job("J1"), "n") or 0) >= least  # type: ignore[misc]

            async def lost() -> bool:
                await redis.zadd(NAMES.lease, {"J1": 1})
                return (await Queue(redis).reap("echo")).handed_back == 1

            await until(further, "it gets on")
            await until(lost, "a reaper comes before the lease is extended again")
        await ended(redis)
    assert await state(redis) == "succeeded"
    assert_whole(await read(redis, "echo", "J1"))
    assert await redis.hget(NAMES.job("J1"), "attempt") == b"4"  # type: ignore[misc]


async def test_output_of_a_claim_that_is_gone_is_not_taken_for_the_next_ones(redis: "Redis", links: Links) -> None:
    async with running(links, EchoEngine("echo", 4, 0.005)) as worker:
        await enqueue(redis, job())

        async def claimed() -> bool:
            return bool(worker._active)

        await until(claimed, "it runs")
        worker._on_outputs([Output("J1 0-stale", (Piece((999,), "stale"),))])
        await ended(redis)
    assert_whole(await read(redis, "echo", "J1"))


async def test_a_log_that_is_read_where_the_claim_is_not_known_says_nothing_of_the_job(
    redis: "Redis", links: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a failover: the claim is from the new master, and the log is read from the old one."""
    asked: list[Claim] = []

    async def read_elsewhere(redis: "Redis", model: str, claim: Claim) -> list[Delta] | None:
        asked.append(claim)
        return await read_claimed(redis, model, replace(claim, fence="1-another") if len(asked) == 1 else claim)

    monkeypatch.setattr(record, "read_claimed", read_elsewhere)
    await enqueue(redis, job())
    [held] = await claim(redis, "w-before", 1)
    await append(redis, "echo", [Chunk(held, 2, (Piece((0, 1), "w0 w1"),))])
    await Queue(redis).release("echo", [held])
    async with running(links, EchoEngine("echo", 4, 0.002)):
        await ended(redis)
    assert len(asked) == 2
    assert await redis.hmget(NAMES.job("J1"), "state", "attempt", "deaths") == [b"succeeded", b"3", b"0"]  # type: ignore[misc]
    assert_whole(await read(redis, "echo", "J1"))


@pytest.mark.parametrize("answer", [RedisConnectionError("away"), FastchatQError("unreadable"), []], ids=repr)
async def test_a_job_lost_while_its_log_is_read_is_not_begun_and_stops_nothing(
    redis: "Redis", links: Links, monkeypatch: pytest.MonkeyPatch, answer: Exception | list[Delta]
) -> None:
    """As when Redis is away for so long that the lease runs out before the read gives up."""
    begun: list[str] = []

    class Recording(EchoEngine):
        def submit(self, request: Request) -> None:
            begun.append(request.ticket.partition(" ")[0])
            super().submit(request)

    async def read_late(redis: "Redis", model: str, held: Claim) -> list[Delta]:
        worker._lost(held)
        await Queue(redis).cancel("echo", held.job_id, "test")
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(record, "read_claimed", read_late)
    await enqueue(redis, job())
    [held] = await claim(redis, "w-before", 1)
    await append(redis, "echo", [Chunk(held, 2, (Piece((0, 1), "w0 w1"),))])
    await Queue(redis).release("echo", [held])
    async with running(links, Recording("echo", 4, 0.002)) as worker:
        await ended(redis)
        await enqueue(redis, job("J2"))
        await ended(redis, "J2")
    assert begun == ["J2"]
    assert (await state(redis), await state(redis, "J2")) == ("cancelled", "succeeded")


async def test_it_takes_no_more_jobs_than_it_has_slots(redis: "Redis", links: Links) -> None:
    await enqueue(redis, *(job(f"J{n}") for n in range(6)))
    async with running(links, EchoEngine("echo", 2, 0.002), drain_s=30):
        most = 0
        while await redis.zcard(NAMES.live):
            most = max(most, await redis.zcard(NAMES.lease))
            await asyncio.sleep(0.002)
    assert most == 2


async def test_a_spec_that_is_no_job_fails_alone(redis: "Redis", links: Links) -> None:
    await enqueue(redis, job("J1"), job("J2", ["a", "b"]))
    await redis.hset(NAMES.job("J1"), "spec", '{"v":2,"what":"ever"}')  # type: ignore[misc]
    async with running(links, EchoEngine("echo", 4, 0)):
        await ended(redis, "J1")
        await ended(redis, "J2")
    assert (await state(redis, "J1"), await state(redis, "J2")) == ("failed", "succeeded")
    assert await redis.hget(NAMES.job("J1"), "reason") == b"bad_spec"  # type: ignore[misc]


async def test_a_job_whose_log_was_cut_fails_with_a_clear_error(redis: "Redis", links: Links) -> None:
    await enqueue(redis, job())
    await redis.hset(NAMES.job("J1"), "n", 7)  # type: ignore[misc]
    async with running(links, EchoEngine("echo", 4, 0)):
        await ended(redis)
    assert await state(redis) == "failed"
    assert await redis.hget(NAMES.job("J1"), "reason") == b"log_incomplete"  # type: ignore[misc]


async def test_a_job_whose_last_token_is_logged_but_not_its_end_is_ended(redis: "Redis", links: Links) -> None:
    """Its worker died between EMIT and FINISH."""
    words = ["a", "b"]
    await enqueue(redis, job("J1", words))
    async with running(links, EchoEngine("echo", 1, 0)):
        await ended(redis)
    await redis.delete(NAMES.job("J1"))
    await enqueue(redis, job("J1", words))
    await redis.hset(NAMES.job("J1"), "n", 2)  # type: ignore[misc]
    async with running(links, EchoEngine("echo", 1, 0)):
        await ended(redis)
    assert await state(redis) == "succeeded"
    assert_whole(await read(redis, "echo", "J1"), words)


async def test_a_dead_engine_ends_the_worker_with_its_cause(redis: "Redis", links: Links) -> None:
    class Broken(EchoEngine):
        def step(self) -> list[Output]:
            raise MemoryError("no more")

    worker = Worker(links, Broken("echo", 1, 0), Limits(drain_s=1))
    await enqueue(redis, job())
    with pytest.raises(RuntimeError, match="the engine died") as raised:
        async with asyncio.timeout(20):
            await worker.run()
    assert isinstance(raised.value.__cause__, MemoryError)
    assert await state(redis) == "running", "its lease will run out, and somebody else takes it"


async def test_a_job_cancelled_while_others_are_begun_is_not_begun(redis: "Redis", links: Links) -> None:
    """The claim loop reads a log for the first job; meanwhile the second one is cancelled."""
    await enqueue(redis, job("J1"), job("J2"))
    worker = Worker(links, EchoEngine("echo", 4, 0), Limits(drain_s=1))
    first, second = await claim(redis, worker.id, 2)
    worker._take(worker._lines[0], first, time.monotonic())
    worker._take(worker._lines[0], second, time.monotonic())
    worker._lost(second)
    await worker._begin(second)
    assert list(worker._active) == ["J1"]


async def test_a_job_whose_log_cannot_be_read_now_is_not_kept(
    redis: "Redis", links: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    await enqueue(redis, job("J1"))
    worker = Worker(links, EchoEngine("echo", 4, 0), Limits(drain_s=1))
    await redis.hset(NAMES.job("J1"), "n", 3)  # type: ignore[misc]
    [held] = await claim(redis, worker.id, 1)
    worker._take(worker._lines[0], held, time.monotonic())
    monkeypatch.setattr(links.commands, "xrange", _away)
    await worker._begin(held)
    assert not worker._active, "nothing renews its lease any more"


async def _away(*args: object, **kwargs: object) -> None:
    raise ConnectionError("cut")


async def test_an_engine_waits_for_a_loop_that_is_far_behind(redis: "Redis", links: Links) -> None:
    """Or else its outputs would pile up, and heartbeats would wait behind them."""
    worker = Worker(links, EchoEngine("echo", 1, 0), Limits(drain_s=1))
    loop = asyncio.get_running_loop()
    steps: list[int] = []

    def generate() -> None:
        for step in range(MAX_STEPS_AHEAD + 10):
            worker._hand_over(loop, [])
            steps.append(step)

    engine = threading.Thread(target=generate)
    engine.start()
    wait_until(lambda: len(steps) >= MAX_STEPS_AHEAD, "it is far ahead")  # on the loop's own thread: it takes nothing
    engine.join(0.3)
    assert len(steps) == MAX_STEPS_AHEAD
    await asyncio.to_thread(engine.join)
    assert len(steps) == MAX_STEPS_AHEAD + 10


async def test_row_21_the_reply_to_a_claim_is_lost_and_its_jobs_go_back_unharmed(
    redis: "Redis", links: Links, redis_server: RedisServer, folder: Path
) -> None:
    """The server has executed the CLAIM, the connection is cut before the reply."""
    await enqueue(redis, job("J1"), job("J2"))
    async with ReplyEater(redis_server, folder / "p", scripts.script("claim").sha) as proxy:
        once = connect(f"unix://{folder / 'p'}", resend=False)
        async with running(replace(links, once=once), EchoEngine("echo", 4, 0.001)):
            await ended(redis, "J1")
            await ended(redis, "J2")
        await once.aclose()
    assert proxy.eaten == 1
    for job_id in ("J1", "J2"):
        record = await redis.hgetall(NAMES.job(job_id))  # type: ignore[misc]
        assert (record[b"state"], record[b"deaths"], record[b"attempt"]) == (b"succeeded", b"0", b"2")
        assert record[b"e1"].endswith(b"claim reply lost")


class ReplyEater:
    """A proxy that cuts the first connection on which a script is called, after the server has run it."""

    def __init__(self, server: RedisServer, path: Path, sha: str) -> None:
        self._server, self._path, self._sha = server, path, sha.encode()
        self.eaten = 0

    async def __aenter__(self) -> "ReplyEater":
        self._connections: set[asyncio.Task[None]] = set()
        self._listener = await asyncio.start_unix_server(self._accept, self._path)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._listener.close()
        await asyncio.gather(*self._connections)  # its clients have hung up

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(self._server.socket)
        back = asyncio.create_task(_copy(from_server, writer))
        while data := await reader.read(65536):
            if self._sha in data and not self.eaten and await self._knows(data):
                self.eaten += 1
                back.cancel()
                await asyncio.gather(back, return_exceptions=True)
                to_server.write(data)
                await from_server.read(65536)
                break
            to_server.write(data)
        back.cancel()
        await asyncio.gather(back, return_exceptions=True)
        for stream in (writer, to_server):
            stream.close()
            await stream.wait_closed()

    async def _knows(self, data: bytes) -> bool:
        """Whether the server has the script already: the first call of all only makes the client load it."""
        client = connect(self._server.url)
        [known] = await client.script_exists(self._sha.decode())
        await client.aclose()
        return bool(known)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)


async def test_row_18_a_worker_that_cannot_renew_its_lease_stops_before_somebody_else_starts(folder: Path) -> None:
    """Redis is frozen for longer than a lease; meanwhile the engine must not go on for nobody."""
    server = RedisServer(folder)
    links = Links.to(server.url)
    try:
        async with running(links, EchoEngine("echo", 4, 0.02)) as worker:
            await enqueue(links.commands, job(words=[f"w{number}" for number in range(550)]))

            async def runs() -> bool:
                return bool(worker._active)

            await until(runs, "it runs")
            server.process.send_signal(signal.SIGSTOP)
            frozen, overslept = time.monotonic(), 0.0  # what the machine kept from this loop is not the worker's fault
            while worker._active:
                before = time.monotonic()
                assert before - frozen - overslept < LEASE_MS / 1000
                await asyncio.sleep(0.01)
                overslept += max(0.0, time.monotonic() - before - 0.02)
            assert time.monotonic() - frozen > LEASE_MS / 1000 - 5, "no earlier than it must"
            server.process.send_signal(signal.SIGCONT)
            await ended(links.commands)
        assert await state(links.commands) == "succeeded"
        assert_whole(await read(links.commands, "echo", "J1"), [f"w{number}" for number in range(550)])
    finally:
        await links.aclose()
        server.kill()


async def test_a_suspect_runs_alone(redis: "Redis", links: Links) -> None:
    await enqueue(redis, job("J1"), job("J2"), job("J3"))
    for loss in range(2):
        [held] = await claim(redis, f"dead-{loss}", 1)
        assert held.job_id == "J1"
        await Queue(redis).disown("echo", f"dead-{loss}", "killed", crashed=True)
    async with running(links, EchoEngine("echo", 4, 0.002)) as worker:
        beside: set[frozenset[str]] = set()
        while await redis.zcard(NAMES.live):
            beside.add(frozenset(worker._active))
            await asyncio.sleep(0.002)
    assert frozenset({"J1"}) in beside
    assert not any("J1" in together and len(together) > 1 for together in beside)
    assert [await state(redis, job_id) for job_id in ("J1", "J2", "J3")] == ["succeeded"] * 3


async def test_batch_jobs_leave_a_slot_for_interactive_ones(redis: "Redis", links: Links) -> None:
    await enqueue(redis, *(job(f"L{number}", WORDS * 4, lane="lo") for number in range(6)))
    async with running(links, EchoEngine("echo", 4, 0.01), drain_s=0) as worker:

        async def full() -> bool:
            return len(worker._active) == 3

        await until(full, "all but the reserve are taken")
        await enqueue(redis, job("H1", ["a", "b"]))
        await ended(redis, "H1")
        assert {active.claim.lane for active in worker._active.values()} == {"lo"}
        assert len(worker._active) == 3


@pytest.mark.parametrize(("lane", "away"), [("hi", {"light": 2**50}), ("lo", {})])
async def test_a_slot_that_falls_free_beside_a_kept_one_is_filled_at_once(
    redis: "Redis", links: Links, lane: str, away: dict[str, int]
) -> None:
    await enqueue(redis, *(job(f"J{number}", ["a", "b"], lane) for number in range(150)))
    if away:
        await redis.zadd(NAMES.away, away)
    await redis.delete(NAMES.bell)  # no bell tells of them
    began, most = time.monotonic(), 0
    async with running(links, EchoEngine("echo", 4, 0.01)) as worker:
        while await redis.zcard(NAMES.live):
            most = max(most, len(worker._active))
            await asyncio.sleep(0.002)
    assert most == 3
    assert time.monotonic() - began < 30, "with one claim a second it takes fifty"


async def test_a_worker_with_a_kept_slot_waits_and_a_light_tenant_gets_it_at_once(redis: "Redis", links: Links) -> None:
    await enqueue(redis, *(job(f"J{number}", WORDS * 4) for number in range(6)))
    await redis.zadd(NAMES.away, {"light": 2**50})
    await redis.delete(NAMES.bell)

    async def claims() -> int:
        return int((await redis.info("commandstats"))["cmdstat_zcount"]["calls"])

    async with running(links, EchoEngine("echo", 4, 0.03), drain_s=0) as worker:

        async def all_but_one() -> bool:
            return len(worker._active) == 3

        await until(all_but_one, "all but the headroom are taken")
        before, began = await claims(), time.monotonic()
        await asyncio.sleep(1.5)
        asked = await claims() - before
        assert asked <= 2 * (time.monotonic() - began + 1.5), "it asks once a second"
        await Queue(redis).enqueue(job("L1", ["a"]), Terms(inbox="fq:inbox:t", tenant="light"))
        await ended(redis, "L1")
        assert len(worker._active) == 3, "none of the others had ended"


async def test_a_second_stop_hands_back_at_once(redis: "Redis", links: Links) -> None:
    async with running(links, EchoEngine("echo", 4, 0.05), drain_s=60) as worker:
        await enqueue(redis, job())

        async def begun() -> bool:
            return int(await redis.hget(NAMES.job("J1"), "n") or 0) > 2  # type: ignore[misc]

        await until(begun, "it runs")
        worker.stop()
    assert await state(redis) == "queued", "it did not wait for the end of the job"
    assert await redis.hget(NAMES.job("J1"), "deaths") == b"0"  # type: ignore[misc]


async def test_a_worker_mends_what_an_operator_trimmed(redis: "Redis", links: Links) -> None:
    await enqueue(redis, job())
    await redis.delete(NAMES.waiting("hi"), NAMES.stream("hi"))
    async with running(links, EchoEngine("echo", 4, 0)):
        await ended(redis)
    assert await state(redis) == "succeeded"
