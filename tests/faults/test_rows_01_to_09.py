"""Workers that die or freeze, and a client that is slow."""

import psutil
import pytest

from tests.stack import Stack, wait_until
from tests.streams import ENDLESS, WORDS, echo_worker, second_api

from .kit import Recorder, assert_log_is, assert_queue_is_clean, frozen
from .proxy import fault_proxy

LEASE_S = 10.0


def owner(stack: Stack) -> int:
    """The pid of the worker that has the only job."""
    [job] = [key for key in stack.job_keys("echo") if ":j:" in key]
    return int(str(stack.redis.hget(job, "worker")).split("-")[-2])


def test_row_01_kill_9_of_a_worker_mid_token_continues_from_the_token_where_it_stopped(stack: Stack) -> None:
    workers = {worker.pid: worker for worker in (echo_worker(stack), echo_worker(stack))}
    stream = Recorder(stack.port)
    stream.wait_words(40)
    workers[owner(stack)].kill()
    assert stream.finish(60).split() == WORDS, "no word lost, none twice"
    assert stream.longest_pause_s() < LEASE_S + 10
    assert_log_is(stack, "echo", stream)
    assert_queue_is_clean(stack, "echo")


def test_row_02_a_worker_frozen_beyond_its_lease_writes_nothing_into_the_stream_of_its_heir(stack: Stack) -> None:
    first = echo_worker(stack)
    stream = Recorder(stack.port)
    stream.wait_words(40)
    with frozen(first.pid):
        echo_worker(stack)
        stream.wait_words(80)  # the lease ran out, the heir goes on
    assert stream.finish().split() == WORDS
    wait_until(lambda: "dropped" in first.output(), "the first worker finds out")
    assert_log_is(stack, "echo", stream)
    assert_queue_is_clean(stack, "echo")


def test_row_03_a_worker_frozen_for_half_its_lease_keeps_its_job(stack: Stack) -> None:
    workers = {echo_worker(stack).pid, echo_worker(stack).pid}
    stream = Recorder(stack.port)
    stream.wait_words(40)
    [job] = stack.records("echo")
    assert owner(stack) in workers
    with frozen(owner(stack)):
        wait_until(lambda: stream.last_id == int(stack.redis.hget(job, "n") or 0), "the client has all")
        before = len(stream.text)
        with pytest.raises(AssertionError, match="not within 5 s"):
            wait_until(lambda: len(stream.text) > before + 100, "the other worker takes it", timeout_s=LEASE_S / 2)
    assert stream.finish().split() == WORDS
    assert stack.redis.hmget(job, "attempt", "deaths") == ["1", "0"]
    assert_queue_is_clean(stack, "echo")


def reasons(stack: Stack) -> list[str | None]:
    """Why jobs of the model ended."""
    return [stack.redis.hget(key, "reason") for key in stack.records("echo")]


def test_row_09_a_client_that_reads_a_byte_a_second_costs_no_memory_and_no_other_stream(stack: Stack) -> None:
    """Its tokens pile up where they are bounded, and after a while it is given up."""
    port = second_api(stack, FASTCHAT_Q_STALLED_CLIENT_S="5")
    echo_worker(stack, delay_ms=1)
    wide = {"model": "echo", "messages": [{"role": "user", "content": "x" * 4000 + " y"}], "ignore_eos": True}
    with fault_proxy(("127.0.0.1", port), resp=False, receive_buffer=16_384) as proxy:
        proxy.to_client.bytes_per_s = 4096.0
        slow = Recorder(proxy.port, {**wide, "max_tokens": 30_000})
        wait_until(lambda: slow.job_id, "the slow client has its head")
        proxy.to_client.bytes_per_s = 1.0
        other = Recorder(port, ENDLESS | {"max_tokens": 3_000})
        process = psutil.Process(stack.processes[1].pid)
        sizes = [process.memory_info().rss]

        def given_up() -> bool:
            sizes.append(process.memory_info().rss)
            return "client disconnected" in reasons(stack)

        wait_until(given_up, "the slow client is given up")
        assert len(other.finish().split()) > 2500, "the other one has lost nothing of its 3000 words and joints"
        wait_until(lambda: stack.live("echo") == 0, "the slow one is cancelled")
        slow.close()
    assert max(sizes) - sizes[0] < 60_000_000
