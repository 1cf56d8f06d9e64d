"""What waits while something is missing, old or noisy: rows 33, 35, 39 and 41."""

import asyncio
import os
import signal
import threading

from fastchat_q import keys
from fastchat_q.connection import connect
from fastchat_q.jobs import Job, Message, Sampling
from fastchat_q.queue import Queue, Terms
from tests.http_client import Reply, get, post
from tests.stack import Process, Stack, free_port, wait_until
from tests.streams import LONG, WORDS, echo_worker, second_api

from .kit import Recorder, assert_queue_is_clean, frozen

NAMES = keys.model_keys("echo")
FLEX = {**LONG, "service_tier": "flex", "max_tokens": 5}
ANOTHER_VERSION = """
import hashlib
from fastchat_q import scripts
known = scripts.script
def script(name):
    source = known(name).source + "\\n-- another version"
    return scripts.Script(source, hashlib.sha1(source.encode()).hexdigest())
scripts.script = script
"""


def post_in_background(port: int) -> tuple[threading.Thread, list[Reply]]:
    box: list[Reply] = []
    thread = threading.Thread(target=lambda: box.append(post(port, FLEX)))
    thread.start()
    return thread, box


def test_row_33_without_a_worker_a_batch_job_waits_for_one(stack: Stack) -> None:
    assert echo_worker(stack).stop() == 0
    wait_until(lambda: get(stack.port, "/readyz").status == 503, "not ready")
    thread, box = post_in_background(stack.port)
    wait_until(lambda: stack.live("echo") == 1, "it is queued")
    echo_worker(stack)
    thread.join(30)
    assert box[0].json()["choices"][0]["message"]["content"].split() == WORDS[:5]


def test_row_33_a_batch_job_that_no_worker_comes_for_expires(stack: Stack) -> None:
    port = free_port()
    stack.start_api(port, FASTCHAT_Q_QUEUE_DEADLINE_S="1")
    assert echo_worker(stack).stop() == 0
    wait_until(lambda: get(port, "/readyz").status == 503, "not ready")
    reply = post(port, FLEX)
    assert (reply.status, reply.error()["code"]) == (504, "deadline_exceeded")
    assert get(port, f"/v1/jobs/{reply.headers['x-job-id']}").json()["reason"] == "queue deadline"
    assert_queue_is_clean(stack, "echo")


def test_row_35_recovery_does_not_need_the_orchestrator_and_it_comes_back_after_kill_9(stack: Stack) -> None:
    orchestrator = start_orchestrator(stack)
    os.kill(orchestrator.pid, signal.SIGKILL)
    orchestrator.wait()
    first = echo_worker(stack)
    recorder = Recorder(stack.port)
    recorder.wait_words(20)
    first.kill()
    echo_worker(stack)
    assert recorder.finish(60).split() == WORDS, "the lease ran out and was reaped without it"
    start_orchestrator(stack)


def start_orchestrator(stack: Stack) -> Process:
    """Running its ticks when this returns."""
    with stack.server.orchestrator_client() as redis:
        started = redis.get(keys.ORCHESTRATOR_HEALTH)
        redis.delete(keys.ORCHESTRATOR_HEALTH)
        orchestrator = stack.start("orchestrator", "orchestrator")
        wait_until(lambda: redis.get(keys.ORCHESTRATOR_HEALTH) not in (None, started), "it says that it is well", 60)
    return orchestrator


def test_row_39_two_versions_of_the_scripts_serve_one_queue(stack: Stack) -> None:
    """Each is loaded under its own digest, and fields that one of them does not know are left alone."""
    place = stack.folder / "version"
    place.mkdir()
    (place / "sitecustomize.py").write_text(ANOTHER_VERSION)
    other = second_api(stack, PYTHONPATH=str(place))
    old, new = echo_worker(stack), echo_worker(stack, PYTHONPATH=str(place))
    for name in stack.redis.scan_iter(keys.worker("*")):
        stack.redis.hset(name, "from_the_future", "1")
    wait_until(lambda: get(other, "/readyz").status == 200, "ready")
    streams = [Recorder(port) for port in (stack.port, other) for _ in range(3)]
    for stream in streams:
        stream.wait_words(20)
    for name in stack.records("echo"):
        stack.redis.hset(name, "from_the_future", "1")
    old.kill()
    for stream in streams:
        assert stream.finish(60).split() == WORDS
    assert new.alive
    assert_queue_is_clean(stack, "echo")


def test_row_41_a_noisy_tenant_makes_nobody_wait_behind_its_queue(stack: Stack) -> None:
    worker = echo_worker(stack, "--slots", "4")

    async def flood() -> None:
        redis = connect(stack.server.url)
        queue = Queue(redis)
        for number in range(1020):
            tenant = "noisy" if number < 1000 else "quiet"
            job = Job(
                id=f"J{number:025}",
                model="echo",
                messages=(Message(role="user", content="a b"),),
                sampling=Sampling(max_tokens=2),
            )
            await queue.enqueue(job, Terms(tenant=tenant, detached=True))
        await redis.aclose()

    with frozen(worker.pid):
        asyncio.run(flood())
    counters = (NAMES.queued, NAMES.running)
    wait_until(lambda: not any(stack.redis.hexists(name, "quiet") for name in counters), "the quiet one is served")
    assert int(stack.redis.hget(NAMES.queued, "noisy") or 0) > 400, "long before the noisy one is"
