"""A worker whose engine answers to several names: its models share the slots, and each has a queue of its own."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from fastchat_q.workers.active import Links
from fastchat_q.workers.engines.echo import EchoEngine
from fastchat_q.workers.turns import Turns
from fastchat_q.workers.worker import Limits, Worker
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.jobs import Job
from fastchat_q.queue import Queue, Terms
from fastchat_q.registry import ModelCard, Registry, capacity_of

from .test_worker import until

WORDS = [f"w{number}" for number in range(40)]


class Adapted(EchoEngine):
    """An echo engine with adapters: it says which model each answer is of."""

    def __init__(self, names: Sequence[str], slots: int, token_delay_s: float) -> None:
        super().__init__(names[0], slots, token_delay_s)
        self._names = names

    @property
    def cards(self) -> Sequence[ModelCard]:
        return tuple(replace(self.card, name=name) for name in self._names)


@asynccontextmanager
async def running(
    links: Links, names: Sequence[str], slots: int, delay_s: float, **limits: float
) -> AsyncIterator[Worker]:
    worker = Worker(links, Adapted(names, slots, delay_s), Limits(**{"drain_s": 30, **limits}))
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        await task


async def enqueue(redis: "Redis", model: str, *job_ids: str, words: Sequence[str] = WORDS, **fields: object) -> None:
    for job_id in job_ids:
        message = {"role": "user", "content": " ".join(words)}
        job = Job.model_validate({"id": job_id, "model": model, "messages": [message], **fields})
        await Queue(redis).enqueue(job, Terms(inbox="fq:inbox:t"))


async def field(redis: "Redis", model: str, job_id: str, name: str) -> str:
    value = await redis.hget(keys.model_keys(model).job(job_id), name)  # type: ignore[misc]
    return value.decode() if value else ""


async def none_left(redis: "Redis", *models: str) -> bool:
    return not sum([await redis.zcard(keys.model_keys(model).live) for model in models])


async def test_jobs_of_all_its_models_are_done_and_the_slots_are_shared(redis: "Redis", links: Links) -> None:
    names = ["base", "one", "two"]
    for name in names:
        await enqueue(redis, name, *(f"{name}-{number}" for number in range(8)))
    most = 0
    async with running(links, names, 4, 0.002) as worker:
        while not await none_left(redis, *names):
            leases = [await redis.zcard(keys.model_keys(name).lease) for name in names]
            most = max(most, len(worker._active), max(leases))
            await asyncio.sleep(0.002)
    assert most == 4
    for name in names:
        assert {await field(redis, name, f"{name}-{number}", "state") for number in range(8)} == {"succeeded"}


async def test_a_model_that_is_backlogged_does_not_starve_the_others(redis: "Redis", links: Links) -> None:
    """Both want all slots: they run as many jobs each, though one of them came later and has less in line."""
    names = ["base", "one", "two"]
    await enqueue(redis, "base", *(f"B{number}" for number in range(60)))
    together: Counter[tuple[int, int]] = Counter()
    async with running(links, names, 4, 0.005, drain_s=0) as worker:
        await until(lambda: _full(worker, 4), "the first one has all slots")
        await enqueue(redis, "one", *(f"O{number}" for number in range(12)))
        while not await none_left(redis, "one"):
            together[worker._running("base"), worker._running("one")] += 1
            await asyncio.sleep(0.002)
        assert not await none_left(redis, "base"), "else nothing was shown"
    assert together[2, 2] > sum(together.values()) / 2, together
    begun = [await field(redis, "one", f"O{number}", "a1") for number in range(12)]
    assert all(begun)


async def _full(worker: Worker, slots: int) -> bool:
    return len(worker._active) == slots


async def test_the_registry_has_an_entry_for_each_model_and_forgets_all_together(redis: "Redis", links: Links) -> None:
    registry = Registry(redis)
    async with running(links, ["base", "one"], 4, 0) as worker:

        async def announced() -> bool:
            return len(await registry.workers()) == 2

        await until(announced, "it is registered")
        found = await registry.workers()
        assert {entry.card.name for entry in found} == {"base", "one"}
        assert {entry.worker_id for entry in found} == {worker.id}
        assert [capacity_of(found, name) for name in ("base", "one", "two")] == [(1, 4), (1, 4), (0, 0)]
        assert await registry.known_models() == {"base", "one"}
        assert await registry.models_of(worker.id) == ["base", "one"]
    assert await registry.workers() == []


async def test_a_suspect_of_one_model_runs_beside_no_job_of_another(redis: "Redis", links: Links) -> None:
    await enqueue(redis, "one", "S1")
    for loss in range(2):
        taken = await Queue(redis).claim("one", f"dead-{loss}", running=0, lanes=[("hi", 1)], nonce="n")
        assert [claim.job_id for claim in taken.claims] == ["S1"]
        await Queue(redis).disown("one", f"dead-{loss}", "killed", crashed=True)
    await enqueue(redis, "base", *(f"B{number}" for number in range(30)))
    beside: set[frozenset[str]] = set()
    async with running(links, ["base", "one"], 4, 0.002) as worker:
        while not await none_left(redis, "base", "one"):
            beside.add(frozenset(worker._active))
            await asyncio.sleep(0.002)
    assert frozenset({"S1"}) in beside
    assert not any("S1" in together and len(together) > 1 for together in beside)
    assert await field(redis, "one", "S1", "state") == "succeeded"
    ended = [int(await field(redis, "base", f"B{number}", "done_ms")) for number in range(30)]
    assert int(await field(redis, "one", "S1", "done_ms")) < max(ended), "it did not wait for the end of all others"


async def test_models_with_nothing_to_do_cost_a_few_commands_a_second_each(redis: "Redis", links: Links) -> None:
    names = [f"m{number}" for number in range(8)]

    async def commands() -> int:
        return int((await redis.info("stats"))["total_commands_processed"])

    async with running(links, names, 4, 0):
        await asyncio.sleep(1)
        before, began = await commands(), time.monotonic()
        await asyncio.sleep(4)
        each = (await commands() - before) / (time.monotonic() - began) / len(names)
        assert each < 25, "bell, claim and reap each second; what scripts call is counted too"
        began = time.monotonic()
        await enqueue(redis, "m7", "J1", words=["x"])

        async def ended() -> bool:
            return await none_left(redis, "m7")

        await until(ended, "it is done")
        assert time.monotonic() - began < 0.7, "the bell woke it"


async def test_what_is_not_finished_goes_back_to_each_models_queue(redis: "Redis", links: Links) -> None:
    async with running(links, ["base", "one"], 4, 0.05, drain_s=0.1) as worker:
        for name in ("base", "one"):
            await enqueue(redis, name, f"{name}-1")
        await until(lambda: _full(worker, 2), "both run")
    for name in ("base", "one"):
        assert await field(redis, name, f"{name}-1", "state") == "queued"
        assert await field(redis, name, f"{name}-1", "deaths") == "0"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kind": "embed", "inputs": ["text"]}, "takes no such request"),
        ({"sampling": {"logprobs": 2}}, "'logprobs' asks for what the model"),
    ],
)
async def test_a_job_that_the_model_is_not_for_is_refused_by_the_worker_too(
    redis: "Redis", links: Links, fields: dict[str, object], complaint: str
) -> None:
    """The API accepts jobs for a model that is not loaded yet, without its card."""
    await enqueue(redis, "base", "J1", **fields)
    async with running(links, ["base"], 4, 0):

        async def ended() -> bool:
            return await none_left(redis, "base")

        await until(ended, "it is refused")
    assert await field(redis, "base", "J1", "state") == "failed"
    assert complaint in await field(redis, "base", "J1", "result")


async def test_turns_go_to_who_runs_least_and_then_round() -> None:
    runs = {"a": 3, "b": 0, "c": 0}
    turns = Turns(list(runs), runs.__getitem__)
    order: list[tuple[str, int]] = []

    async def take(model: str) -> None:
        for _ in range(2):
            async with turns.turn(model) as others:
                order.append((model, others))
                await asyncio.sleep(0)

    await asyncio.gather(*map(take, runs))
    assert [model for model, _ in order] == ["b", "c", "b", "c", "a", "a"]
    assert order[0] == ("b", 2)


async def test_a_turn_that_nobody_waits_for_any_more_goes_to_the_next() -> None:
    turns = Turns(["a", "b"], lambda _: 0)
    first = asyncio.create_task(_turn(turns, "a"))
    second = asyncio.create_task(_turn(turns, "b"))
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(5):
        await second
    assert first.cancelled() or first.done()


async def _turn(turns: Turns, model: str) -> None:
    async with turns.turn(model):
        pass


async def test_nobody_takes_anything_while_the_worker_is_reserved() -> None:
    turns = Turns(["a", "b"], lambda _: 0)
    turns.reserve("a")
    turns.free("b")
    assert (turns.may_take("a"), turns.may_take("b")) == (True, False)
    turns.free("a")
    assert turns.may_take("b")
