"""What drives batches, in this process, so that it can be killed at any point; storage, Redis and workers are real."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastchat_q.api import batch_lines, batch_run, batch_tick, orchestrator
from fastchat_q.api.batch_lines import Lines, RawLine, lines_at
from fastchat_q.api.batch_tick import Driver
from fastchat_q.api.catalog import Catalog
from fastchat_q.api.remote_images import Fetcher
from redis.asyncio import Redis

from fastchat_q import batches, keys, loops, operations, upkeep
from fastchat_q.batches import Batch, Batches, Manifest, new_batch_id
from fastchat_q.connection import connect
from fastchat_q.errors import InvalidRequestError, StorageFullError, StorageUnavailableError, UnknownBatchError
from fastchat_q.files import Files, object_key
from fastchat_q.ledger import Ledger
from fastchat_q.queue import Queue
from fastchat_q.settings import Settings
from fastchat_q.storage import Storage
from fastchat_q.tenants import ANONYMOUS

from .batches import ids, jsonl, line, parsed
from .conftest import shared_stack
from .stack import Stack

NOW = 1_800_000_000


class Killed(BaseException):
    """The process ends here."""


class MortalStorage(Storage):
    """Storage of a process that dies at one of its writes: before it, or after it and before it knows."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.left: int | None = None
        self.after = False
        self.full = False

    async def put(self, key: str, data: bytes | AsyncIterable[bytes], *, create: bool = False) -> int:
        if self.full:
            raise StorageFullError("The server's storage for files is full.")
        self._count(before=True)
        size = await super().put(key, data, create=create)
        self._count(before=False)
        return size

    async def delete(self, keys: Iterable[str]) -> None:
        self._count(before=True)
        await super().delete(keys)
        self._count(before=False)

    def _count(self, *, before: bool) -> None:
        if self.left is None or before is self.after:
            return
        self.left -= 1
        if self.left <= 0:
            raise Killed


@pytest.fixture(scope="module")
def worker_stack() -> Iterator[Stack]:
    """A fast echo worker and no orchestrator."""
    with shared_stack("--model", "echo", "--engine", "echo", "--token-delay-ms", "0") as stack:
        stack.start_worker("--model", "slow", "--engine", "echo", "--token-delay-ms", "200", "--slots", "4")
        yield stack


@pytest.fixture
async def queue_redis(worker_stack: Stack) -> AsyncIterator["Redis"]:
    client = connect(worker_stack.server.url)
    for name in [name async for name in client.scan_iter(keys.EVERY_BATCH_KEY)]:
        await client.delete(name)
    yield client
    await client.aclose()


class Bench:
    """A storage, and what drives batches on it."""

    def __init__(self, redis: "Redis", folder: Path, **settings: Any) -> None:
        self.redis = redis
        self.storage = MortalStorage(f"file://{folder}")
        self.settings = Settings(state_dir=folder, **settings)
        self.files = Files(redis, self.storage)
        self.batches = Batches(redis, self.storage)

    def driver(self, batches: Batches | None = None, ahead_s: float = 0.0) -> Driver:
        """One orchestrator, whose clock may be ahead."""
        tools = (self.redis, Queue(self.redis), Catalog(self.redis), batches or self.batches, self.files, self.settings)
        return Driver(*tools, clock=lambda: time.time() + ahead_s)

    async def create(self, content: bytes, expires_in_s: int = 600) -> str:
        """A batch of chats."""
        await self.redis.delete(keys.FILE_STORAGE)
        file = await self.files.create(content, tenant="default", filename="in.jsonl", purpose="batch")
        now = int(time.time())
        manifest = Manifest(
            new_batch_id(),
            ANONYMOUS.model_dump(mode="json"),
            file.id,
            "/v1/chat/completions",
            "24h",
            now,
            now + expires_in_s,
        )
        return (await self.batches.create(manifest)).manifest.id

    async def drive(self, batch_id: str, driver: Driver | None = None, ticks: int = 100, tick_s: float = 15) -> Batch:
        """Ticks until the batch has ended."""
        driver = driver or self.driver()
        for _ in range(ticks):
            await driver.advance(batch_id, tick_s)
            batch = await self.batches.load(batch_id)
            if not batch.is_open:
                return batch
        raise AssertionError(f"still {batch.state}")

    async def content(self, file_id: str | None) -> list[dict[str, Any]]:
        """The lines of a file of results."""
        if file_id is None:
            return []
        record = await self.files.get(file_id, "default")
        return parsed(b"".join([piece async for piece in self.files.content(record)]))


@pytest.fixture
def bench(queue_redis: "Redis", folder: Path) -> Bench:
    return Bench(queue_redis, folder)


def custom_ids(count: int) -> list[str]:
    return sorted(f"line-{n}" for n in range(count))


@pytest.mark.parametrize("after", [False, True], ids=["before a write", "after a write"])
async def test_a_process_may_die_at_every_one_of_its_writes(bench: Bench, monkeypatch: Any, after: bool) -> None:
    monkeypatch.setattr(batch_run, "COMMIT_LINES", 4)
    count, deaths = 12, 0
    content = jsonl([*(line(n) for n in range(count - 1)), line(count - 1, temperature=99)])
    for nth in range(1, 60):
        batch_id = await bench.create(content)
        bench.storage.left, bench.storage.after = nth, after
        try:
            batch = await bench.drive(batch_id)
            survived = True
        except Killed:
            survived, deaths = False, deaths + 1
        finally:
            bench.storage.left = None
        if not survived:
            batch = await bench.drive(batch_id)
            await bench.driver().advance(batch_id)  # a tick that was asked for by then
        assert (batch.state, batch.ended and (batch.ended.completed, batch.ended.failed)) == ("completed", (11, 1))
        assert batch.ended is not None
        output, errors = await bench.content(batch.ended.output_file_id), await bench.content(batch.ended.error_file_id)
        assert sorted(ids(output + errors)) == custom_ids(count), f"died at write {nth}"
        assert [one["response"]["status_code"] for one in errors] == [400]
        left = [key async for key, _ in bench.storage.list(f"batches/{batch_id}/segments")]
        assert not left, f"died at write {nth}: {left}"
        assert (await bench.batches.get(batch_id, "default"))["status"] == "completed"
        assert await bench.batches.open_ids() == ()
        if survived:
            break
    else:
        raise AssertionError("it never got through")
    assert deaths >= 8, "validated, segments, two files with records, ended, clean-up"


async def test_two_processes_that_both_believe_to_drive_a_batch_answer_no_line_twice(
    bench: Bench, monkeypatch: Any
) -> None:
    class NoLease(Batches):
        async def take(self, batch_id: str, nonce: str) -> int | None:
            return 1

        async def keep(self, batch_id: str, nonce: str) -> bool:
            return True

    monkeypatch.setattr(batch_run, "COMMIT_LINES", 7)
    count = 300
    batch_id = await bench.create(jsonl(line(n, f"text {n}") for n in range(count)))
    drivers = [bench.driver(NoLease(bench.redis, bench.storage)) for _ in range(3)]
    ended = await asyncio.gather(*(bench.drive(batch_id, driver) for driver in drivers))
    assert {batch.state for batch in ended} == {"completed"}
    fact = ended[0].ended
    assert fact is not None
    assert (fact.completed, fact.failed) == (count, 0)
    assert sorted(ids(await bench.content(fact.output_file_id))) == custom_ids(count)
    assert (await bench.batches.get(batch_id, "default"))["request_counts"]["completed"] == count


async def test_a_lease_keeps_a_second_process_away(bench: Bench) -> None:
    batch_id = await bench.create(jsonl(line(n, "a b c d e f", model="slow") for n in range(8)))
    first = asyncio.create_task(bench.driver().advance(batch_id, 1.0))
    while not await bench.redis.exists(keys.batch_lease(batch_id)):
        await asyncio.sleep(0.01)
    assert await bench.driver().advance(batch_id) is None
    assert await first is not None, "it is not done within a second, and asks for another tick"
    assert not await bench.redis.exists(keys.batch_lease(batch_id))
    assert (await bench.drive(batch_id)).state == "completed"


async def test_who_loses_the_lease_puts_no_files_together(bench: Bench, monkeypatch: Any) -> None:
    monkeypatch.setattr(batch_tick, "KEEP_S", 0.05)
    batch_id = await bench.create(jsonl([line(0)]))
    begun, stopped = asyncio.Event(), asyncio.Event()

    async def slow_create(*_: Any, **__: Any) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    with monkeypatch.context() as patch:
        patch.setattr(bench.files, "create", slow_create)
        driving = asyncio.create_task(bench.driver().advance(batch_id))
        await asyncio.wait_for(begun.wait(), 20)
        await bench.redis.set(keys.batch_lease(batch_id), "somebody else")
        assert await asyncio.wait_for(driving, 5) is None
    assert stopped.is_set()
    assert await bench.redis.getdel(keys.batch_lease(batch_id)) == b"somebody else"
    assert (await bench.drive(batch_id)).state == "completed"


async def test_slow_images_are_fetched_side_by_side_and_cost_no_lease(
    queue_redis: "Redis", folder: Path, monkeypatch: Any
) -> None:
    class Slow(Fetcher):
        async def fetch_all(self, named: Iterable[tuple[str, str]]) -> dict[str, bytes]:
            await asyncio.sleep(1.5)
            raise InvalidRequestError("It is not there.", param="messages", code="image_not_fetched")

    monkeypatch.setattr(batches, "LEASE_MS", 500)
    monkeypatch.setattr(batch_tick, "KEEP_S", 0.1)
    monkeypatch.setattr(batch_run, "check_can_do", lambda *_: None)
    bench = Bench(queue_redis, folder, allow_remote_images=True)
    image = {"type": "image_url", "image_url": {"url": "https://images.example/a.png"}}
    some = [line(n) for n in range(8)]
    for one in some:
        one["body"]["messages"][0]["content"] = [image]
    batch_id = await bench.create(jsonl(some))
    fetching = replace(bench.driver(), fetcher=Slow(1000))
    began = time.monotonic()
    driving = asyncio.create_task(bench.drive(batch_id, fetching))
    await asyncio.sleep(1.2)
    assert await bench.driver().advance(batch_id) is None, "it is driven"
    batch = await driving
    assert batch.ended is not None
    assert batch.ended.failed == 8
    assert time.monotonic() - began < 8 * 1.5
    errors = await bench.content(batch.ended.error_file_id)
    assert {one["response"]["body"]["error"]["code"] for one in errors} == {"image_not_fetched"}


async def test_a_batch_goes_on_after_redis_lost_everything(bench: Bench, worker_stack: Stack, monkeypatch: Any) -> None:
    monkeypatch.setattr(batch_run, "COMMIT_LINES", 2)
    count = 60
    batch_id = await bench.create(jsonl(line(n, "a b", model="slow") for n in range(count)))
    while not (before := (await bench.batches.load(batch_id)).head).completed:
        await bench.driver().advance(batch_id, 0.5)
    assert before.completed < count
    await bench.redis.flushall()
    assert await bench.batches.reindex() == 1
    assert await bench.batches.reindex() == 0, "the indexes are whole"
    assert await bench.batches.open_ids() == (batch_id,)
    batch = await bench.drive(batch_id)
    assert batch.ended is not None
    assert (batch.state, batch.ended.completed) == ("completed", count)
    assert sorted(ids(await bench.content(batch.ended.output_file_id))) == custom_ids(count)
    assert worker_stack.job_keys("slow") == [], "what was answered is gone from Redis"


async def test_batches_come_back_newest_first_and_go_on_meanwhile(bench: Bench, monkeypatch: Any) -> None:
    made = [await bench.create(jsonl([line(0)])) for _ in range(3)]
    for number, junk in enumerate((b"", b"[]", b"{}", b'{"caller": {}}')):
        await bench.storage.put(f"batches/batch_{number}/manifest.json", junk)
    unread = dataclasses.asdict((await bench.batches.load(made[0])).manifest) | {"id": "batch_9", "caller": {}}
    await bench.storage.put("batches/batch_9/manifest.json", json.dumps(unread).encode())
    await bench.redis.flushall()
    monkeypatch.setattr(loops, "AT_A_TIME", 1)
    load, begun, go_on = bench.batches.load, asyncio.Event(), asyncio.Event()

    async def slow_load(batch_id: str) -> Batch:
        if batch_id == made[0]:
            begun.set()
            await go_on.wait()
        return await load(batch_id)

    monkeypatch.setattr(bench.batches, "load", slow_load)
    asked: list[str] = []

    class Asked:
        async def enqueue_job(self, _: str, batch_id: str, **__: Any) -> None:
            asked.append(batch_id)

    context = {"driver": bench.driver(), "redis": Asked()}
    finding = asyncio.create_task(orchestrator.find_batches(context))
    await asyncio.wait_for(begun.wait(), 20)
    await asyncio.wait_for(orchestrator.find_batches(context), 20)
    assert sorted(asked) == made[1:], "the oldest one is not back yet"
    finding.cancel()
    await asyncio.gather(finding, return_exceptions=True)
    assert not await bench.redis.exists(keys.BATCHES_INDEXED)
    go_on.set()
    assert await bench.batches.reindex() == 1, "what was cut off goes on"
    assert sorted(await bench.batches.open_ids()) == made
    assert await bench.redis.exists(keys.BATCHES_INDEXED)


async def test_a_process_with_another_storage_neither_takes_nor_drives_nor_forgets_batches(
    bench: Bench, folder: Path
) -> None:
    batch_id = await bench.create(jsonl([line(0)]))
    elsewhere = Bench(bench.redis, folder / "elsewhere")
    await elsewhere.storage.put("storage-id", b"another")
    context = {"driver": elsewhere.driver(), "redis": None}
    await orchestrator.find_batches(context)
    await orchestrator.advance_batch(context, batch_id)
    assert not await bench.redis.exists(keys.batch_lease(batch_id), keys.BATCH_TICKS)
    with pytest.raises(StorageUnavailableError):
        await elsewhere.batches.create((await bench.batches.load(batch_id)).manifest)
    for name in [name async for name in bench.redis.scan_iter(keys.EVERY_BATCH_KEY)]:
        await bench.redis.delete(name)
    assert await elsewhere.batches.reindex() == 0
    assert await bench.batches.reindex() == 1
    assert await bench.batches.open_ids() == (batch_id,)
    await bench.redis.set(keys.FILE_STORAGE, "another")  # the storage was changed on purpose, and later back
    assert await elsewhere.batches.reindex() == 0
    assert await bench.redis.get(keys.BATCHES_INDEXED) == b"another"
    await bench.redis.delete(keys.FILE_STORAGE)
    await bench.batches.reindex()
    assert await bench.redis.get(keys.BATCHES_INDEXED) == await bench.storage.get("storage-id")


async def test_jobs_that_redis_lost_are_enqueued_again_within_a_tick(bench: Bench, worker_stack: Stack) -> None:
    count = 12
    batch_id = await bench.create(jsonl(line(n, "a b", model="slow") for n in range(count)))
    driving = asyncio.create_task(bench.drive(batch_id))
    while worker_stack.live("slow") < count // 2:
        await asyncio.sleep(0.01)
    names = [name async for name in bench.redis.scan_iter(keys.model_keys("slow").prefix + "*")]
    await bench.redis.delete(*names)
    batch = await driving
    assert batch.ended is not None
    assert sorted(ids(await bench.content(batch.ended.output_file_id))) == custom_ids(count)


async def test_a_full_storage_is_waited_out_and_clients_see_why(bench: Bench) -> None:
    batch_id = await bench.create(jsonl(line(n) for n in range(10)))
    bench.storage.full = True
    await bench.driver().advance(batch_id, 1.0)
    seen = await bench.batches.get(batch_id, "default")
    assert seen["status"] == "validating"
    assert "full" in seen["trouble"]
    bench.storage.full = False
    batch = await bench.drive(batch_id)
    assert batch.state == "completed"
    assert "trouble" not in await bench.batches.get(batch_id, "default")


async def test_a_queue_that_takes_nothing_is_left_alone_and_clients_see_why(bench: Bench, monkeypatch: Any) -> None:
    tries: list[int] = []
    enqueue_many = Queue.enqueue_many

    async def counted(self: Queue, jobs: Any) -> Any:
        tries.append(len(jobs))
        return await enqueue_many(self, jobs)

    monkeypatch.setattr(Queue, "enqueue_many", counted)
    batch_id = await bench.create(jsonl(line(n) for n in range(200)))
    await operations.set_mode(bench.redis, "echo", "draining")
    try:
        await bench.driver().advance(batch_id, 3.0)
        assert "drained" in (await bench.batches.get(batch_id, "default"))["trouble"]
        assert 2 <= len(tries) <= 5
    finally:
        await operations.resume(bench.redis, "echo")
    batch = await bench.drive(batch_id)
    assert batch.ended is not None
    assert (batch.state, batch.ended.completed) == ("completed", 200)
    assert "trouble" not in await bench.batches.get(batch_id, "default")


async def test_a_redis_at_maxmemory_is_waited_out_and_clients_see_why(bench: Bench, monkeypatch: Any) -> None:
    enqueue_many = Queue.enqueue_many

    async def out_of_memory(self: Queue, jobs: Any) -> Any:
        await bench.redis.config_set("maxmemory", "1mb")
        return await enqueue_many(self, jobs)

    batch_id = await bench.create(jsonl(line(n) for n in range(10)))
    other = await bench.create(jsonl([line(0)]))
    monkeypatch.setattr(Queue, "enqueue_many", out_of_memory)
    try:
        assert await bench.driver().advance(batch_id, 2.0) is not None, "the tick went on"
        assert await bench.driver().advance(other) is None, "it could not begin"
        for one in (batch_id, other):
            assert "maxmemory" in (await bench.batches.get(one, "default"))["trouble"]
    finally:
        monkeypatch.undo()
        await bench.redis.config_set("maxmemory", "0")
    for one in (batch_id, other):
        assert (await bench.drive(one)).state == "completed"


async def test_what_is_not_done_in_time_is_told_line_by_line(bench: Bench) -> None:
    count = 120
    batch_id = await bench.create(jsonl(line(n, "a b", model="slow") for n in range(count)), expires_in_s=6)
    batch = await bench.drive(batch_id)
    assert batch.ended is not None
    assert batch.state == "expired"
    assert batch.ended.completed > 0
    assert batch.ended.failed > 0
    output, errors = await bench.content(batch.ended.output_file_id), await bench.content(batch.ended.error_file_id)
    assert (len(output), len(errors)) == (batch.ended.completed, batch.ended.failed)
    assert sorted(ids(output + errors)) == custom_ids(count)
    assert {one["error"]["code"] for one in errors} == {"batch_expired"}
    assert {one["response"] for one in errors} == {None}
    assert await bench.redis.zcard(keys.model_keys("slow").live) == 0, "nothing of it goes on"


async def test_answers_that_wait_in_the_queue_are_kept_when_nobody_drove_the_batch_until_it_expired(
    bench: Bench, worker_stack: Stack
) -> None:
    batch_id = await bench.create(jsonl(line(n, "a", model="slow") for n in range(4)))
    driving = asyncio.create_task(bench.driver().advance(batch_id))
    while not worker_stack.records("slow"):
        await asyncio.sleep(0.01)
    driving.cancel()
    await asyncio.gather(driving, return_exceptions=True)
    assert not (await bench.batches.load(batch_id)).head.completed
    while worker_stack.live("slow"):
        await asyncio.sleep(0.01)
    batch = await bench.drive(batch_id, bench.driver(ahead_s=3600))
    assert batch.ended is not None
    assert (batch.state, batch.ended.completed, batch.ended.failed) == ("completed", 4, 0), "all of it was done in time"


async def test_a_cancelled_batch_keeps_what_is_done(bench: Bench) -> None:
    count = 200
    batch_id = await bench.create(jsonl(line(n, "a b", model="slow") for n in range(count)))
    driving = asyncio.create_task(bench.drive(batch_id))
    while not (await bench.batches.load(batch_id)).head.completed:
        await asyncio.sleep(0.05)
    assert (await bench.batches.cancel(batch_id, "default"))["status"] == "cancelling"
    batch = await asyncio.wait_for(driving, 20)
    assert batch.ended is not None
    assert batch.state == "cancelled"
    output = await bench.content(batch.ended.output_file_id)
    assert 0 < len(ids(output)) == batch.ended.completed < count
    assert batch.ended.error_file_id is None
    seen = await bench.batches.cancel(batch_id, "default")
    assert seen["status"] == "cancelled"
    assert seen["cancelling_at"] <= seen["cancelled_at"]
    assert await bench.redis.zcard(keys.model_keys("slow").live) == 0, "nothing of it goes on"


async def test_jobs_that_no_segment_speaks_of_are_cancelled_too(bench: Bench, worker_stack: Stack) -> None:
    batch_id = await bench.create(jsonl(line(n, "a b c d e f g h", model="slow") for n in range(300)))
    driving = asyncio.create_task(bench.driver().advance(batch_id))
    while worker_stack.live("slow") < 100:
        await asyncio.sleep(0.01)
    driving.cancel()
    await asyncio.gather(driving, return_exceptions=True)
    assert (await bench.batches.load(batch_id)).head.seq == 0
    await bench.batches.cancel(batch_id, "default")
    assert (await bench.drive(batch_id)).state == "cancelled"
    assert worker_stack.live("slow") == 0


async def test_a_batch_that_is_cancelled_before_it_was_read_ends_without_files(bench: Bench) -> None:
    batch_id = await bench.create(jsonl([line(0)]))
    await bench.batches.cancel(batch_id, "default")
    batch = await bench.drive(batch_id)
    assert batch.ended is not None
    assert batch.state == "cancelled"
    assert (batch.ended.output_file_id, batch.ended.error_file_id) == (None, None)


@pytest.mark.parametrize(("cancel", "state"), [(False, "failed"), (True, "cancelled")])
async def test_a_batch_whose_input_is_gone_ends_with_what_it_has(
    bench: Bench, worker_stack: Stack, cancel: bool, state: str
) -> None:
    batch_id = await bench.create(jsonl(line(n, "a b c", model="slow") for n in range(300)))
    while not (before := await bench.batches.load(batch_id)).head.completed:
        await bench.driver().advance(batch_id, 0.5)
    assert worker_stack.live("slow"), "jobs that no process knows of any more"
    await bench.storage.delete([object_key(before.manifest.input_file_id)])
    if cancel:
        await bench.batches.cancel(batch_id, "default")
    batch = await bench.drive(batch_id, ticks=3)
    assert batch.ended is not None
    assert batch.state == state
    assert len(ids(await bench.content(batch.ended.output_file_id))) == batch.ended.completed > 0
    assert batch.ended.failed == 0
    assert worker_stack.live("slow") == 0
    seen = await bench.batches.get(batch_id, "default")
    assert seen["request_counts"] == {"total": 300, "completed": batch.ended.completed, "failed": 0}
    assert [one["code"] for one in (seen["errors"] or {"data": []})["data"]] == ([] if cancel else ["file_not_found"])
    assert seen[f"{state}_at"] >= seen["in_progress_at"]
    assert await bench.batches.open_ids() == ()


async def test_a_file_that_expires_stays_as_long_as_an_open_batch_reads_it(bench: Bench) -> None:
    batch_id = await bench.create(jsonl([line(0)]))
    file_id = (await bench.batches.load(batch_id)).manifest.input_file_id
    await bench.redis.zadd(keys.FILE_EXPIRY, {file_id: 1})
    await upkeep.tick(bench.files, bench.redis)
    assert await bench.storage.size(object_key(file_id)), "it is read yet"
    assert (await bench.drive(batch_id)).state == "completed"
    await upkeep.tick(bench.files, bench.redis)
    assert await bench.storage.size(object_key(file_id)) is None


async def test_a_batch_that_the_storage_does_not_know_leaves_the_indexes(bench: Bench) -> None:
    batch_id = await bench.create(jsonl([line(0)]))
    await bench.storage.delete([f"batches/{batch_id}/manifest.json"])
    ours = await bench.redis.getset(keys.FILE_STORAGE, "another")
    assert await bench.driver().advance(batch_id) is None
    assert await bench.batches.num_open("default") == 1, "the other storage may have it"
    await bench.redis.set(keys.FILE_STORAGE, ours)
    assert await bench.driver().advance(batch_id) is None
    assert await bench.batches.num_open("default") == 0
    assert await bench.batches.open_ids() == ()
    assert await bench.batches.list("default", None, 10) == ([], False)
    assert await bench.batches.list(None, None, 10) == ([], False)
    with pytest.raises(UnknownBatchError):
        await bench.batches.get(batch_id, "default")


async def test_a_process_that_is_behind_does_not_take_back_what_clients_see(bench: Bench) -> None:
    batch_id = await bench.create(jsonl([line(0)]))
    behind = await bench.batches.load(batch_id)
    await bench.drive(batch_id)
    assert not await bench.batches.show(behind)
    assert (await bench.batches.get(batch_id, "default"))["status"] == "completed"
    assert await bench.batches.open_ids() == ()


async def test_no_more_than_the_window_is_in_the_queue(queue_redis: "Redis", folder: Path, worker_stack: Stack) -> None:
    bench = Bench(queue_redis, folder, batch_window=5)
    batch_id = await bench.create(jsonl(line(n, "a b", model="slow") for n in range(20)))
    driving, most = asyncio.create_task(bench.drive(batch_id)), 0
    while not driving.done():
        most = max(most, worker_stack.live("slow"))
        await asyncio.sleep(0.02)
    assert (await driving).state == "completed"
    assert most == 5


async def test_large_lines_take_turns(queue_redis: "Redis", folder: Path, worker_stack: Stack) -> None:
    bench = Bench(queue_redis, folder, batch_window_bytes=100_000)
    batch_id = await bench.create(jsonl(line(n, "x" * 40_000 + " b", model="slow") for n in range(9)))
    driving, most = asyncio.create_task(bench.drive(batch_id)), 0
    while not driving.done():
        most = max(most, worker_stack.live("slow"))
        await asyncio.sleep(0.02)
    batch = await driving
    assert batch.ended is not None
    assert batch.ended.completed == 9
    assert most == 3, "the third one goes over the bound, and none after it"


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
async def test_lines_are_the_same_wherever_blocks_end(folder: Path, monkeypatch: Any, block: int) -> None:
    monkeypatch.setattr(batch_lines, "BLOCK", block)
    storage = Storage(f"file://{folder}")
    content = b'{"a":1}\n\n  \r\n{"b":22}\n' + b"x" * 50 + b"\nlast"
    await storage.put("in", content)

    async def read(number: int, offset: int) -> list[RawLine]:
        lines, found = Lines(storage, "in", 20, number, offset), []
        while (one := await lines.next()) is not None:
            found.append(one)
        assert lines.done
        return found

    found = await read(1, 0)
    assert [(one.number, one.raw, one.size) for one in found] == [
        (1, b'{"a":1}', 7),
        (4, b'{"b":22}', 8),
        (5, b"", 50),
        (6, b"last", 4),
    ]
    for one in found:
        assert await read(one.number, one.offset) == [other for other in found if other.number >= one.number]
    places = tuple((one.number, one.offset, one.size) for one in found if one.raw)
    assert [one async for one in lines_at(storage, "in", places)] == [one for one in found if one.raw]


async def test_a_ledger_is_found_without_a_hint_and_with_a_wrong_one(folder: Path) -> None:
    storage = Storage(f"file://{folder}")
    ledger, head = Ledger(storage, "batch_x"), batch_run.replace((await Ledger(storage, "batch_x").last()), seq=0)
    for seq in range(1, 5):
        head = batch_run.replace(head, seq=seq, completed=seq, pending=((1, 0, 9),), output_bytes=2, error_bytes=1)
        await ledger.commit(head, b"o\n", b"e")
    for hint in (0, 1, 4, 9):
        assert await ledger.last(hint) == head
    assert b"".join([piece async for piece in ledger.read("output", head)]) == b"o\n" * 4
    assert b"".join([piece async for piece in ledger.read("errors", head)]) == b"e" * 4
