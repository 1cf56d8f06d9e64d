"""An operator damages the queue by hand: rows 28 and 29, and the parts of 17 and 27 that RECONCILE mends."""

import signal

from fastchat_q import keys
from tests.stack import Stack, wait_until
from tests.streams import LONG, WORDS, echo_worker

from .kit import Recorder, assert_queue_is_clean, frozen

NAMES = keys.model_keys("echo")
STREAM = NAMES.stream("hi")


def test_row_28_trimming_the_stream_loses_neither_waiting_nor_running_jobs(stack: Stack) -> None:
    echo_worker(stack, "--slots", "1")
    jobs = [Recorder(stack.port) for _ in range(4)]
    wait_until(lambda: stack.live("echo") == 4, "one runs, three wait")
    assert stack.redis.xtrim(STREAM, maxlen=0) == 4
    for job in jobs:
        assert job.finish(60).split() == WORDS
    assert_queue_is_clean(stack, "echo")


def test_row_28_a_trimmed_stream_shows_the_true_lag_again_soon(stack: Stack) -> None:
    worker = echo_worker(stack)
    with frozen(worker.pid):
        jobs = [Recorder(stack.port, {**LONG, "max_tokens": 5}) for _ in range(3)]
        wait_until(lambda: stack.redis.zcard(NAMES.waiting("hi")) == 3, "three wait")
        stack.redis.xtrim(STREAM, maxlen=0)
        wait_until(lambda: stack.redis.xlen(STREAM) == 3, "the API server mends it")
    for job in jobs:
        assert job.finish().split() == WORDS[:5]


def test_row_29_destroying_the_group_loses_nothing_and_serves_nothing_twice(stack: Stack) -> None:
    echo_worker(stack, "--slots", "2")
    jobs = [Recorder(stack.port) for _ in range(5)]
    wait_until(lambda: stack.running("echo") == 2, "two run, three wait")
    for _ in range(3):
        jobs[0].wait_words(len(jobs[0].text.split()) + 20)
        stack.redis.xgroup_destroy(STREAM, keys.GROUP)
    for job in jobs:
        assert job.finish(60).split() == WORDS
    assert_queue_is_clean(stack, "echo")


def test_row_29_deleting_a_consumer_drops_its_pending_entries_and_no_job(stack: Stack) -> None:
    first = echo_worker(stack)
    job = Recorder(stack.port)
    job.wait_words(20)
    [consumer] = [c["name"] for c in stack.redis.xinfo_consumers(STREAM, keys.GROUP) if c["pending"]]
    assert stack.redis.xgroup_delconsumer(STREAM, keys.GROUP, consumer) == 1
    first.kill()
    echo_worker(stack)
    assert job.finish(60).split() == WORDS
    assert_queue_is_clean(stack, "echo")


def test_row_17_a_lease_that_was_evicted_is_found_missing_though_its_worker_is_dead(stack: Stack) -> None:
    first = echo_worker(stack)
    job = Recorder(stack.port)
    job.wait_words(20)
    first.signal(signal.SIGKILL)
    first.wait()
    stack.redis.delete(NAMES.lease)
    echo_worker(stack)
    assert job.finish(60).split() == WORDS


def test_row_27_foreign_entries_in_a_lane_that_never_had_a_job_are_swept_out(stack: Stack) -> None:
    echo_worker(stack)
    stack.redis.xadd(NAMES.stream("lo"), {"what": "ever"})
    wait_until(lambda: stack.redis.xlen(NAMES.stream("lo")) == 0, "it is gone")
