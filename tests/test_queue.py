"""The queue protocol, script by script, against a real server."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastchat_q import keys, scripts
from fastchat_q.connection import connect
from fastchat_q.errors import QueueFullError
from fastchat_q.events import Delta, End, Piece, parse_line
from fastchat_q.jobs import Job, Message, Sampling
from fastchat_q.queue import Claim, Finish, Queue
from fastchat_q.tokens import Appended, Chunk, Status, append, read

from .protocol import DONE, MODEL, NAMES, claim, emit, enqueue, expire_lease, field, finish, job
from .servers import RedisServer


async def test_a_job_goes_from_queued_to_running_to_succeeded(redis: "Redis") -> None:
    queue = Queue(redis)
    assert await enqueue(queue) == 1
    assert await field(redis, "state") == "queued"
    [held] = await claim(queue)
    assert (held.job_id, held.attempt, held.n) == ("JOB0001", 1, 0)
    assert Job.from_spec(held.spec) == job()
    assert await field(redis, "state") == "running"
    assert await emit(redis, held, 2, 7, 8, text="ab") is Status.OK
    assert await finish(redis, held, 2) is Status.OK
    assert await field(redis, "state") == "succeeded"
    assert await read(redis, MODEL, "JOB0001") == [Delta(2, 2, (Piece((7, 8), "ab"),))]


async def test_a_finished_job_leaves_nothing_behind_that_has_no_ttl(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [held] = await claim(queue)
    await emit(redis, held, 1, 7)
    await finish(redis, held, 1)
    for name in (NAMES.job("JOB0001"), NAMES.log("JOB0001")):
        assert 0 < await redis.pttl(name) <= 120_000
    assert await redis.xlen(NAMES.stream("hi")) == 0
    for zset in (NAMES.live, NAMES.lease, NAMES.waiting("hi")):
        assert await redis.zcard(zset) == 0
    assert await field(redis, "spec") is None, "the prompt of a job that is done is not kept"


async def test_enqueueing_the_same_job_twice_keeps_one(redis: "Redis") -> None:
    queue = Queue(redis)
    places = await asyncio.gather(*(enqueue(queue) for _ in range(50)))
    assert sorted(places)[-2:] == [0, 1]
    assert len(await claim(queue, free=10)) == 1


async def test_a_full_lane_refuses_and_stores_nothing(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(3):
        await enqueue(queue, number, max_waiting=3)
    with pytest.raises(QueueFullError, match="3 jobs wait, the limit is 3"):
        await enqueue(queue, 9, max_waiting=3)
    assert await redis.exists(NAMES.job("JOB0009")) == 0
    await enqueue(queue, 10, lane="lo", max_waiting=3)


async def test_jobs_are_claimed_in_order_and_interactive_before_batch(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue, 1, lane="lo")
    for number in (2, 3):
        await enqueue(queue, number)
    taken = await claim(queue, free=10)
    assert [held.job_id for held in taken] == ["JOB0002", "JOB0003", "JOB0001"]


async def test_a_worker_never_gets_more_than_its_free_slots(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(10):
        await enqueue(queue, number, lane="hi" if number % 2 else "lo")
    assert len(await claim(queue, free=7)) == 7
    assert len(await claim(queue, "w2", free=7)) == 3


async def test_a_lost_lease_hands_the_job_back_to_the_head_of_the_lane(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in (1, 2):
        await enqueue(queue, number)
    [first] = await claim(queue)
    await emit(redis, first, 3, 7, 8, 9)
    await expire_lease(redis)
    assert (await queue.reap(MODEL)).handed_back == 1
    [again] = await claim(queue, "w2")
    assert (again.job_id, again.attempt, again.n) == ("JOB0001", 2, 3)
    assert again.fence != first.fence


async def test_a_zombie_can_neither_emit_nor_finish_nor_renew_nor_release(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [zombie] = await claim(queue)
    await emit(redis, zombie, 1, 7)
    await expire_lease(redis)
    await queue.reap(MODEL)
    assert await emit(redis, zombie, 2, 8) is Status.LOST, "between two claims nobody may write"
    [heir] = await claim(queue, "w2")
    assert await emit(redis, zombie, 2, 8) is Status.LOST
    assert await finish(redis, zombie, 1) is Status.LOST
    assert await queue.renew(MODEL, [zombie]) == [zombie]
    await queue.release(MODEL, [zombie])
    assert await emit(redis, heir, 2, 9) is Status.OK
    assert [delta.ids for delta in await read(redis, MODEL, "JOB0001")] == [(7,), (9,)]


async def test_the_same_attempt_number_with_another_nonce_is_fenced_out(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [held] = await claim(queue)
    twin = Claim(held.job_id, f"{held.attempt}-other", held.attempt, 0, held.lane, held.spec)
    assert await emit(redis, twin, 1, 7) is Status.LOST


async def test_a_repeated_emit_adds_no_token_and_a_gap_is_refused(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [held] = await claim(queue)
    assert await emit(redis, held, 2, 1, 2) is Status.OK
    assert await emit(redis, held, 2, 1, 2) is Status.DUPLICATE
    assert await emit(redis, held, 4, 4) is Status.GAP
    assert [delta.n for delta in await read(redis, MODEL, "JOB0001")] == [2]


@pytest.mark.parametrize(
    ("damage", "can_be_ended"),
    [
        pytest.param(lambda r: r.xadd(NAMES.log("JOB0002"), {"x": "y"}, id="0-100000"), True, id="entry-ahead"),
        pytest.param(lambda r: r.xadd(NAMES.log("JOB0002"), {"x": "y"}), True, id="entry-of-our-time"),
        pytest.param(
            lambda r: r.xadd(NAMES.log("JOB0002"), {"x": "y"}, id=f"{2**64 - 1}-{2**64 - 1}"), True, id="full"
        ),
        pytest.param(lambda r: r.set(NAMES.log("JOB0002"), "what"), True, id="log-is-a-string"),
        pytest.param(lambda r: r.hset(NAMES.job("JOB0002"), "n", "many"), True, id="count-is-no-number"),
        pytest.param(lambda r: r.hdel(NAMES.job("JOB0002"), "n"), True, id="no-count"),
        pytest.param(lambda r: r.hdel(NAMES.job("JOB0002"), "deadline_ms"), True, id="no-deadline"),
        pytest.param(lambda r: r.hdel(NAMES.job("JOB0002"), "inbox"), False, id="no-inbox"),
        pytest.param(lambda r: r.set(NAMES.job("JOB0002"), "what"), False, id="record-is-a-string"),
    ],
)
@pytest.mark.parametrize("before", [0, 1])
async def test_a_damaged_job_takes_no_token_and_its_neighbours_in_the_call_do(
    redis: "Redis", damage: Callable[["Redis"], Awaitable[object]], can_be_ended: bool, before: int
) -> None:
    queue = Queue(redis)
    for number in (1, 2, 3):
        await enqueue(queue, number, inbox="")
    held = await claim(queue, free=3)
    for one in held if before else []:
        await emit(redis, one, 1, 7)
    await damage(redis)
    answer = await append(redis, MODEL, [Chunk(one, before + 1, (Piece((8,), "x"),)) for one in held])
    assert answer.chunks == [Status.UNHEARD, Status.DAMAGED, Status.UNHEARD]
    ends = [Finish(held[0], before + 1, "succeeded", "stop", DONE), Finish(held[1], before, "failed", "damaged", DONE)]
    answer = await append(redis, MODEL, [Chunk(held[2], before + 2, (Piece((9,), "y"),))], ends)
    assert answer.chunks == [Status.UNHEARD], "an end that is refused is nobody else's"
    assert answer.finishes[0] is Status.OK
    if can_be_ended:
        assert answer.finishes[1] is Status.OK
        assert await field(redis, "state", 2) == "failed"
    else:
        assert isinstance(answer.finishes[1], ResponseError)
    assert await redis.zrange(NAMES.lease, 0, -1) == [b"JOB0003"], "who goes by the leases does not stumble over it"


async def test_a_finish_that_overtakes_its_tokens_is_refused(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [held] = await claim(queue)
    await emit(redis, held, 1, 1)
    assert await finish(redis, held, 2) is Status.GAP
    assert await field(redis, "state") == "running"


async def test_tokens_and_end_of_many_jobs_travel_in_one_message_for_their_inbox(
    redis: "Redis", blocking_redis: "Redis"
) -> None:
    queue = Queue(redis)
    pubsub = blocking_redis.pubsub()
    await pubsub.subscribe("fq:inbox:t")
    await pubsub.get_message(timeout=5)
    for number in (1, 2):
        await enqueue(queue, number)
    a, b = await claim(queue, free=2)
    answer: Appended = await append(
        redis,
        MODEL,
        [Chunk(a, 1, (Piece((5,), "é 😀\n"),)), Chunk(b, 2, (Piece((6, 7), "b"),))],
        [Finish(b, 2, "succeeded", "stop", DONE)],
    )
    assert answer.chunks == [Status.OK, Status.OK]
    tokens = (await pubsub.get_message(timeout=5))["data"].split(b"\n")
    assert [parse_line(line) for line in tokens] == [
        ("JOB0001", Delta(1, 1, (Piece((5,), "é 😀\n"),))),
        ("JOB0002", Delta(2, 2, (Piece((6, 7), "b"),))),
    ]
    end = (await pubsub.get_message(timeout=5))["data"]
    assert parse_line(end) == ("JOB0002", End(2, "succeeded", "stop", DONE))
    await pubsub.aclose()  # type: ignore[no-untyped-call]


async def test_an_emit_says_which_jobs_nobody_listens_to(redis: "Redis", blocking_redis: "Redis") -> None:
    queue = Queue(redis)
    pubsub = blocking_redis.pubsub()
    await pubsub.subscribe("fq:inbox:t")
    await pubsub.get_message(timeout=5)
    await enqueue(queue, 1)
    await enqueue(queue, 2, inbox="fq:inbox:dead")
    a, b = await claim(queue, free=2)
    answer = await append(
        redis,
        MODEL,
        [Chunk(b, 1, (Piece((1,), "x"),)), Chunk(a, 1, (Piece((1,), "x"),)), Chunk(b, 2, (Piece((2,), "y"),))],
    )
    assert answer.chunks == [Status.UNHEARD, Status.OK, Status.UNHEARD]
    await pubsub.aclose()  # type: ignore[no-untyped-call]


async def test_releasing_hands_the_job_back_with_its_tokens_and_counts_no_lost_worker(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [held] = await claim(queue)
    await emit(redis, held, 1, 7)
    await queue.release(MODEL, [held])
    [again] = await claim(queue, "w2")
    assert (again.attempt, again.n, await field(redis, "deaths")) == (2, 1, "0")


async def test_renewing_moves_the_lease_and_names_lost_claims(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in (1, 2):
        await enqueue(queue, number)
    a, b = await claim(queue, free=2)
    await expire_lease(redis, 1)
    await queue.cancel(MODEL, "JOB0002", "test")
    assert await queue.renew(MODEL, [a, b]) == [b]
    assert (await queue.reap(MODEL)).handed_back == 0


async def test_lag_is_what_waits_and_pending_is_what_runs(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(1, 7):
        await enqueue(queue, number)
    await queue.cancel(MODEL, "JOB0002", "test")
    held, other = await claim(queue, free=2)
    await queue.release(MODEL, [held])
    await queue.cancel(MODEL, "JOB0005", "test")
    await finish(redis, other, 0)
    await claim(queue)
    [group] = await redis.xinfo_groups(NAMES.stream("hi"))
    assert group["pending"] == 1
    assert group.get("lag", 2) == 2, "KEDA and people read it; Redis 6.2 does not tell it"
    assert await redis.zcard(NAMES.waiting("hi")) == 2
    assert await redis.zcard(NAMES.lease) == 1


async def test_cancelled_jobs_are_not_in_the_way_of_the_others(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(200):
        await enqueue(queue, number, max_waiting=1000)
    await enqueue(queue, 900, max_waiting=1000)
    for number in range(200):
        await queue.cancel(MODEL, f"JOB{number:04}", "test")
    assert [held.job_id for held in await claim(queue, free=1)] == ["JOB0900"]
    assert await redis.xlen(NAMES.stream("hi")) == 1


async def test_cancelling_a_running_job_frees_everything_and_hints_its_worker(
    redis: "Redis", blocking_redis: "Redis"
) -> None:
    queue = Queue(redis)
    pubsub = blocking_redis.pubsub()
    await pubsub.subscribe(keys.worker_channel("w1"))
    await pubsub.get_message(timeout=5)
    await enqueue(queue)
    [held] = await claim(queue)
    assert await queue.cancel(MODEL, "JOB0001", "test") == "running"
    assert (await pubsub.get_message(timeout=5))["data"] == b"cancel JOB0001"
    assert await emit(redis, held, 1, 7) is Status.LOST
    assert await redis.xlen(NAMES.stream("hi")) == 0
    assert await queue.cancel(MODEL, "JOB0001", "again") == "cancelled"
    assert await queue.cancel(MODEL, "JOB9999", "test") == "none"
    await pubsub.aclose()  # type: ignore[no-untyped-call]


async def test_a_cancelled_handed_back_job_leaves_no_stream_entry(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    [held] = await claim(queue)
    await queue.release(MODEL, [held])
    await queue.cancel(MODEL, "JOB0001", "test")
    assert await redis.xlen(NAMES.stream("hi")) == 0
    assert await claim(queue, free=5) == []


async def test_a_job_that_keeps_losing_its_worker_is_dead_in_the_end(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    for death in range(1, 5):
        [_] = await claim(queue, f"w{death}")
        await expire_lease(redis)
        reaped = await queue.reap(MODEL)
        assert (reaped.handed_back, reaped.dead) == ((1, 0) if death < 4 else (0, 1))
    assert await field(redis, "state") == "dead"
    assert await claim(queue, free=5) == []


async def test_a_job_past_its_deadline_expires_whether_it_waits_or_runs(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in (1, 2):
        await enqueue(queue, number)
    [held] = await claim(queue)
    for number in (1, 2):
        await redis.hset(NAMES.job(f"JOB000{number}"), "deadline_ms", 1)  # type: ignore[misc]
    await redis.zadd(NAMES.live, {"JOB0001": 1, "JOB0002": 1})
    assert (await queue.reap(MODEL)).expired == 2
    assert await emit(redis, held, 1, 7) is Status.LOST
    assert [await field(redis, "state", number) for number in (1, 2)] == ["expired", "expired"]
    assert await claim(queue, free=5) == []


async def test_claiming_a_job_past_its_deadline_expires_it(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue, deadline_s=0.001)
    await asyncio.sleep(0.005)
    assert await claim(queue, free=5) == []
    assert await field(redis, "state") == "expired"
    assert await redis.xlen(NAMES.stream("hi")) == 0


async def test_foreign_stream_entries_are_dropped_and_jobs_behind_them_served(redis: "Redis") -> None:
    queue = Queue(redis)
    await redis.xadd(NAMES.stream("hi"), {"what": "ever"})
    await redis.xadd(NAMES.stream("hi"), {"j": "no-such-job"})
    await enqueue(queue)
    assert [held.job_id for held in await claim(queue)] == ["JOB0001"]
    await queue.reconcile(MODEL)
    assert await redis.xlen(NAMES.stream("hi")) == 1


async def test_scripts_and_group_come_back_after_flush(redis: "Redis") -> None:
    queue = Queue(redis)
    await enqueue(queue)
    await claim(queue)
    await redis.flushall()
    await redis.script_flush()
    assert await claim(queue) == []
    await enqueue(queue, 2)
    [held] = await claim(queue)
    await redis.script_flush()
    answer = await append(
        redis, MODEL, [Chunk(held, 1, (Piece((1,), "x"),))], [Finish(held, 1, "succeeded", "stop", DONE)]
    )
    assert (answer.chunks, answer.finishes) == ([Status.UNHEARD], [Status.OK])


async def test_scripts_that_are_forgotten_again_between_load_and_call_are_loaded_again(
    redis: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, load_all = Queue(redis), scripts.load_all
    await enqueue(queue)
    [held] = await claim(queue)
    forgotten = [True, True]

    async def load_for_a_moment(redis: "Redis") -> None:
        await load_all(redis)
        if forgotten.pop():
            await redis.script_flush()

    monkeypatch.setattr(scripts, "load_all", load_for_a_moment)
    for call in (lambda: emit(redis, held, 1, 7), lambda: queue.renew(MODEL, [held])):
        await redis.script_flush()
        forgotten[:] = [False, True]
        assert await call() in (Status.OK, [])
        assert forgotten == []


async def test_at_maxmemory_new_jobs_are_refused_and_running_ones_drain(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in (1, 2, 3):
        await enqueue(queue, number)
    held, other = await claim(queue, free=2)
    await redis.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(Exception, match=r"OOM|maxmemory"):
            await enqueue(queue, 4)
        assert await redis.exists(NAMES.job("JOB0004")) == 0, "refused whole, not in part"
        assert await emit(redis, held, 1, 7) is Status.OK
        assert await queue.renew(MODEL, [held, other]) == []
        assert await finish(redis, held, 1) is Status.OK
        assert await queue.cancel(MODEL, other.job_id, "test") == "running"
        assert len(await claim(queue)) == 1
    finally:
        await redis.config_set("maxmemory", "0")


async def test_an_idle_worker_is_woken_by_a_new_job(redis: "Redis", blocking_redis: "Redis") -> None:
    waiting = asyncio.create_task(Queue(blocking_redis).wait(MODEL, 30))
    await enqueue(Queue(redis))
    await asyncio.wait_for(waiting, 20)


async def test_a_burst_larger_than_the_connection_pool_waits_its_turn(
    redis_server: RedisServer, redis: "Redis"
) -> None:
    few = connect(redis_server.url, max_connections=3)
    await asyncio.gather(*(enqueue(Queue(few), number) for number in range(100)))
    assert await redis.zcard(NAMES.live) == 100
    await few.aclose()


async def test_waiting_on_a_connection_that_died_without_closing_ends(
    redis_server: RedisServer, blocking_redis: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastchat_q.queue.DEAD_CONNECTION_S", 0.2)
    await Queue(blocking_redis).wait(MODEL, 0.01)
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            await Queue(blocking_redis).wait(MODEL, 0.01)
    finally:
        redis_server.process.send_signal(signal.SIGCONT)


async def test_bells_do_not_pile_up(redis: "Redis") -> None:
    queue = Queue(redis)
    for number in range(80):
        await enqueue(queue, number)
    assert await redis.llen(NAMES.bell) == 64  # type: ignore[misc]


def test_values_in_redis_are_readable_json_and_decimal() -> None:
    spec = Job(id="J", model="m", messages=(Message(role="user", content="é"),), sampling=Sampling(seed=5)).to_spec()
    assert spec == '{"id":"J","model":"m","messages":[{"role":"user","content":"é"}],"sampling":{"seed":5}}'


@pytest.mark.parametrize(
    ("model", "start"),
    [
        ("tiny", "tiny"),
        ("vicuna-7b", "vicuna-7b"),
        ("Qwen/Qwen3-0.6B", "qwen-qwen3-0.6b-"),
        ("模型", "model-"),
        ("x" * 60, "x" * 39 + "-"),
        ("a}b{c", "a-b-c-"),
    ],
)
def test_any_model_name_gets_a_slug_that_fits_a_key(model: str, start: str) -> None:
    made = keys.slug(model)
    assert made.startswith(start)
    assert 1 <= len(made) <= 48
    assert made == keys.slug(model)


def test_names_that_differ_only_in_case_do_not_share_a_queue() -> None:
    assert keys.slug("Tiny") != keys.slug("tiny")


async def test_a_worker_that_finds_its_job_abandoned_asks_whether_somebody_listens(
    redis: "Redis", blocking_redis: "Redis"
) -> None:
    queue = Queue(redis)
    for number in (1, 2):
        await enqueue(queue, number, inbox="fq:inbox:gone")
    held, other = await claim(queue, free=2)
    pubsub = blocking_redis.pubsub()
    await pubsub.subscribe("fq:inbox:back")
    await pubsub.get_message(timeout=5)
    await queue.attach(MODEL, held.job_id, "fq:inbox:back")
    assert await queue.cancel(MODEL, held.job_id, "gone", fence=held.fence) == "heard"
    assert await queue.cancel(MODEL, other.job_id, "gone", fence="1-another") == "lost"
    assert await field(redis, "state", 1) == await field(redis, "state", 2) == "running"
    assert await queue.cancel(MODEL, other.job_id, "gone", fence=other.fence) == "running"
    assert await field(redis, "state", 2) == "cancelled"
    await pubsub.aclose()  # type: ignore[no-untyped-call]
