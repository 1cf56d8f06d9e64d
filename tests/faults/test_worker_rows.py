"""Rows of the fault table that need a worker's processes: its engine's process and the supervisor of that one."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastchat_q.workers.engines.loading.builtin import BUILTIN_DIRS
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.jobs import Job, Message
from fastchat_q.queue import LEASE_MS, Queue, Terms
from tests.faulty_worker import FORGET, HANG, LARGE, POISON
from tests.http_client import get, post
from tests.stack import Process, RedisServer, Stack, wait_until
from tests.streams import LONG, WORDS, echo_worker, read_words, start_stream, stream_text

MODEL = "faulty"
NAMES = keys.model_keys(MODEL)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """Processes of one test; those that are left are killed."""
    started: list[Process] = []
    yield started
    for process in started:
        if process.alive:
            process.kill()


def faulty_worker(
    server: RedisServer, folder: Path, processes: list[Process], *, stall_s: float = 30.0, supervised: bool = True
) -> Process:
    log = folder / f"faulty-{len(processes)}"
    flags = [] if supervised else ["--id", "w-alone"]
    processes.append(Process(log, server.url, MODEL, str(stall_s), *flags, module="tests.faulty_worker"))
    return processes[-1]


async def enqueue(redis: "Redis", job_id: str, *words: str, count: int = 40) -> None:
    content = " ".join([*words, *(f"w{number}" for number in range(count))])
    job = Job(id=job_id, model=MODEL, messages=(Message(role="user", content=content),))
    await Queue(redis).enqueue(job, Terms(detached=True))


def job_record(server: RedisServer, job_id: str) -> dict[str, str]:
    with server.client() as client:
        return dict(client.hgetall(NAMES.job(job_id)))


def text_of(server: RedisServer, job_id: str) -> str:
    with server.client() as client:
        return "".join(json.loads(entry["d"])["s"] for _, entry in client.xrange(NAMES.log(job_id)))


def ended(server: RedisServer, *job_ids: str) -> bool:
    return all(job_record(server, i)["state"] not in ("queued", "running") for i in job_ids)


def history(server: RedisServer, job_id: str, attempt: int) -> tuple[int, int, str]:
    """(begun, ended, how) of an attempt; times in ms of the server's clock."""
    record = job_record(server, job_id)
    end, _, how = record[f"e{attempt}"].partition(" ")
    return int(record[f"a{attempt}"].split()[0]), int(end), how


def worker_states(server: RedisServer) -> list[dict[str, str]]:
    with server.client() as client:
        return [client.hgetall(name) for name in client.scan_iter(keys.worker("*"))]


def crashed(server: RedisServer) -> list[str]:
    return [entry["reason"] for entry in worker_states(server) if entry.get("state") == "crashed"]


def seen_crashed(server: RedisServer, timeout_s: float = 30.0) -> list[str]:
    """The reasons as soon as there are some: the next process takes them away again."""
    seen: list[str] = []
    wait_until(lambda: seen.extend(crashed(server)) or seen, "it says that it crashed", timeout_s)
    return seen


def test_row_01_the_job_of_a_killed_engine_is_handed_back_long_before_its_lease_is_over(stack: Stack) -> None:
    worker = echo_worker(stack, supervised=True)
    engine = stack.engine_pid(worker)
    stream = start_stream(stack.port, LONG)
    stream.head()
    pieces = stream_text(stream)
    text = read_words(pieces, 20)
    seconds, micros = stack.redis.time()
    killed_ms = seconds * 1000 + micros // 1000
    os.kill(engine, signal.SIGKILL)
    [name] = stack.records("echo")
    wait_until(lambda: stack.redis.hget(name, "e1"), "the job is handed back")
    at, _, how = stack.redis.hget(name, "e1").partition(" ")
    assert how == "killed by SIGKILL (out of memory?)"
    assert int(at) - killed_ms < LEASE_MS / 2
    text += "".join(pieces)
    assert text.split() == WORDS
    assert stack.redis.hget(name, "deaths") == "1"
    assert worker.alive
    assert stack.engine_pid(worker) != engine
    assert worker.stop() == 0


async def test_row_04_a_hung_engine_ends_its_process_which_says_so_and_is_started_again(
    redis: "Redis", redis_server: RedisServer, folder: Path, processes: list[Process]
) -> None:
    await enqueue(redis, "J1", HANG)
    worker = faulty_worker(redis_server, folder, processes, stall_s=2)
    wait_until(lambda: "e1" in job_record(redis_server, "J1"), "the hung engine's job is handed back")
    assert history(redis_server, "J1", 1)[2] == "exit code 70: the engine made no step for 2 s"
    wait_until(lambda: ended(redis_server, "J1"), "the next engine does it")
    assert job_record(redis_server, "J1")["state"] == "succeeded"
    assert text_of(redis_server, "J1").split()[1:] == [f"w{n}" for n in range(40)]
    assert "in step" in worker.output(), "where it hung"


async def test_row_05_a_poison_job_dies_of_four_crashes_and_takes_nobody_along(
    redis: "Redis", redis_server: RedisServer, folder: Path, processes: list[Process]
) -> None:
    innocents = [f"J{number}" for number in range(6)]
    for job_id in innocents:
        await enqueue(redis, job_id, count=300)
    await enqueue(redis, "JP", POISON)
    faulty_worker(redis_server, folder, processes)
    wait_until(lambda: ended(redis_server, "JP", *innocents), "all have ended", 90)
    assert job_record(redis_server, "JP")["state"] == "dead"
    assert "killed by SIGKILL" in job_record(redis_server, "JP")["reason"]
    assert {job_record(redis_server, i)["state"] for i in innocents} == {"succeeded"}
    assert {len(text_of(redis_server, i).split()) for i in innocents} == {300}


async def test_row_04_a_job_that_the_engine_forgets_is_tried_again(
    redis: "Redis", redis_server: RedisServer, folder: Path, processes: list[Process]
) -> None:
    await enqueue(redis, "J1", FORGET)
    faulty_worker(redis_server, folder, processes, stall_s=1.5)
    await enqueue(redis, "J2", count=2000)  # meanwhile the engine steps
    wait_until(lambda: "e1" in job_record(redis_server, "J1"), "it is stalled", 40)
    assert history(redis_server, "J1", 1)[2] == "retry stalled"


async def test_row_30_an_engine_that_the_kernel_kills_is_said_to_have_crashed_and_comes_back(
    redis: "Redis", redis_server: RedisServer, folder: Path, processes: list[Process]
) -> None:
    worker = faulty_worker(redis_server, folder, processes)
    wait_until(lambda: any(e.get("state") == "serving" for e in worker_states(redis_server)), "it serves")
    for kills in (1, 2, 3):
        serving = {e["pid"] for e in worker_states(redis_server) if e.get("state") == "serving"}
        [pid] = serving
        os.kill(int(pid), signal.SIGKILL)  # as the kernel's out-of-memory killer does
        assert seen_crashed(redis_server) == ["killed by SIGKILL (out of memory?)"]
        wait_until(lambda: any(e.get("state") == "serving" for e in worker_states(redis_server)), "it serves again")
        wait_until(lambda: not crashed(redis_server), f"that is over, {kills}")
    assert worker.stop() == 0
    assert worker_states(redis_server) == [], "nothing of it is left"


async def test_row_04_a_process_that_hangs_as_a_whole_is_ended_by_its_supervisor(
    redis: "Redis", redis_server: RedisServer, folder: Path, processes: list[Process]
) -> None:
    """Its registration runs out, and nobody renews it."""
    faulty_worker(redis_server, folder, processes, stall_s=2)
    wait_until(lambda: any(e.get("state") == "serving" for e in worker_states(redis_server)), "it serves")
    [entry] = [e for e in worker_states(redis_server) if e.get("state") == "serving"]
    os.kill(int(entry["pid"]), signal.SIGSTOP)
    assert seen_crashed(redis_server, 60) == ["no heartbeat for 2 s"]
    wait_until(lambda: any(e.get("state") == "serving" for e in worker_states(redis_server)), "the next one serves")


async def test_row_31_jobs_that_do_not_fit_into_memory_are_tried_again_with_fewer_at_a_time(
    redis: "Redis", redis_server: RedisServer, folder: Path, processes: list[Process]
) -> None:
    await enqueue(redis, "J1", LARGE, count=60)
    await enqueue(redis, "J2", LARGE, count=60)
    faulty_worker(redis_server, folder, processes)
    wait_until(lambda: ended(redis_server, "J1", "J2"), "both have ended")
    assert {job_record(redis_server, i)["state"] for i in ("J1", "J2")} == {"succeeded"}
    assert {len(text_of(redis_server, i).split()) for i in ("J1", "J2")} == {61}
    wait_until(lambda: any(e.get("slots") == "1" for e in worker_states(redis_server)), "the registry has its slots")


def test_row_32_a_model_that_cannot_be_loaded_is_refused_with_the_reason(stack: Stack, folder: Path) -> None:
    """The model was there at the first start, and is gone at the next ones."""
    model, away = folder / "model", folder / "away"
    shutil.copytree(BUILTIN_DIRS["tiny"], model)
    worker = stack.start_worker("--model", str(model), "--name", "gone", "--threads", "1", supervised=True)
    model.rename(away)
    os.kill(stack.engine_pid(worker), signal.SIGSEGV)
    wait_until(lambda: "exit code 2" in "".join(crashed(stack.server)), "it says why", 60)
    wait_until(lambda: get(stack.port, "/readyz").status == 503, "no model is served")
    reply = post(stack.port, {**LONG, "model": "gone"})
    assert (reply.status, reply.error()["code"]) == (503, "no_worker")
    assert re.search(r"exit code 2: Model .*cannot be loaded", reply.error()["message"])
    away.rename(model)
    wait_until(lambda: get(stack.port, "/readyz").status == 200, "it is back", 60)
    assert int((stack.registration(worker.pid) or {})["restarts"]) == 0, "the entry is that of the new process"
    question = {"model": "gone", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 3}
    assert post(stack.port, question).status == 200


def test_row_38_a_rolling_restart_under_supervision_moves_its_streams(stack: Stack) -> None:
    first = echo_worker(stack, "--drain-s", "0.2", supervised=True)
    echo_worker(stack, "--drain-s", "0.2", supervised=True)
    streams = [start_stream(stack.port, LONG) for _ in range(4)]
    pieces = [stream_text(stream) for stream in streams if stream.head()]
    texts = [read_words(piece, 20) for piece in pieces]
    assert first.stop() == 0
    texts = [text + "".join(piece) for text, piece in zip(texts, pieces, strict=True)]
    assert [text.split() for text in texts] == [WORDS] * 4
    assert stack.registration(first.pid) is None
