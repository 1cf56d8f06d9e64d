"""What clients see when processes and clients come and go: real processes, real signals. Faults are in faults/."""

import signal

import pytest

from fastchat_q import keys

from .http_client import Connection, get, post
from .servers import free_port, wait_until
from .stack import Stack
from .streams import ENDLESS, LONG, WORDS, echo_worker, read_words, start_stream, stream_text


def test_a_worker_that_drains_ends_what_runs_and_takes_nothing_new(stack: Stack) -> None:
    worker = echo_worker(stack)
    connection = start_stream(stack.port, {**LONG, "max_tokens": 100})
    connection.head()
    pieces = stream_text(connection)
    text = read_words(pieces, 5)
    worker.signal(signal.SIGTERM)
    wait_until(lambda: stack.redis.hget(worker_key(stack), "state") == "draining", "the worker drains")
    late = start_stream(stack.port, {**LONG, "max_tokens": 3})
    text += "".join(pieces)
    assert text.split() == WORDS[:100]
    assert worker.wait() == 0
    assert stack.live("echo") == 1, "the late job waits"
    echo_worker(stack)
    late.head()
    assert "".join(stream_text(late)).split() == WORDS[:3]


def test_a_job_that_is_slow_to_be_accepted_is_not_taken_for_lost(stack: Stack) -> None:
    """Reads are answered while writes wait: the job's record is looked for before it is there."""
    echo_worker(stack)
    stack.redis.client_pause(2500, all=False)
    reply = post(stack.port, {**LONG, "max_tokens": 2})
    assert reply.status == 200, reply.body


def test_waiting_streams_are_told_their_place(stack: Stack) -> None:
    echo_worker(stack, "--slots", "1")
    running = start_stream(stack.port, ENDLESS)
    running.head()
    wait_until(lambda: stack.running("echo") == 1, "the first job runs")
    waiting = [start_stream(stack.port, {**LONG, "max_tokens": 300})]  # long enough for a look at the next one
    wait_until(lambda: stack.live("echo") == 2, "the second job waits")
    waiting.append(start_stream(stack.port, {**LONG, "max_tokens": 2}))
    events = [stream.events() for stream in waiting if stream.head()[0] == 200]
    assert next(events[0]) == ": queued position=1"
    assert next(events[1]) == ": queued position=2"
    running.close()
    blocks = [list(stream) for stream in events]
    assert [block[-1] for block in blocks] == ["data: [DONE]"] * 2
    assert ": queued position=1" in blocks[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_cancels_its_job(stack: Stack, stream: bool) -> None:
    worker = echo_worker(stack, "--slots", "1")
    worker.signal(signal.SIGSTOP)
    connection = Connection(stack.port)
    connection.send({**LONG, "stream": stream})
    wait_until(lambda: stack.live("echo") == 1, "the job is queued")
    connection.close()
    wait_until(lambda: stack.live("echo") == 0, "the job is cancelled")
    assert stack.redis.zcard(keys.model_keys("echo").waiting("hi")) == 0
    worker.signal(signal.SIGCONT)
    assert post(stack.port, {**LONG, "max_tokens": 1}).status == 200


def test_a_full_queue_answers_429_with_retry_after(stack: Stack) -> None:
    port = free_port()
    stack.start_api(port, FASTCHAT_Q_MAX_WAITING="2")
    worker = echo_worker(stack)
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    worker.signal(signal.SIGSTOP)
    waiting = [start_stream(port, LONG) for _ in range(2)]
    wait_until(lambda: stack.live("echo") == 2, "the queue is full")
    reply = post(port, LONG)
    assert reply.status == 429
    assert int(reply.headers["retry-after"]) > 0
    assert reply.error()["code"] == "queue_full"
    assert stack.live("echo") == 2
    for connection in waiting:
        connection.close()
    worker.signal(signal.SIGCONT)


def test_an_api_server_that_stops_lets_its_streams_end(stack: Stack) -> None:
    echo_worker(stack)
    connection = start_stream(stack.port, {**LONG, "max_tokens": 150})
    connection.head()
    pieces = stream_text(connection)
    text = read_words(pieces, 5)
    stack.api.signal(signal.SIGTERM)
    text += "".join(pieces)
    assert text.split() == WORDS[:150]
    assert stack.api.wait() == 0


def test_an_api_server_that_may_not_wait_leaves_its_clients_the_time_to_come_back(stack: Stack) -> None:
    port = free_port()
    api = stack.start_api(port, "--drain-s", "0")
    echo_worker(stack)
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    connection = start_stream(port, ENDLESS)
    connection.head()
    wait_until(lambda: stack.running("echo") == 1, "the job runs")
    assert api.stop() == 0
    assert stack.running("echo") == 1
    wait_until(lambda: stack.running("echo") == 0, "the slot is free", timeout_s=60)


def test_two_workers_share_the_queue(stack: Stack) -> None:
    for _ in range(2):
        echo_worker(stack, "--slots", "2")
    streams = [start_stream(stack.port, {**LONG, "max_tokens": 60}) for _ in range(4)]
    wait_until(lambda: stack.running("echo") == 4, "all run at once")
    for stream in streams:
        stream.head()
        assert "".join(stream_text(stream)).split() == WORDS[:60]


def worker_key(stack: Stack) -> str:
    [name] = stack.redis.scan_iter(keys.worker("*"))
    return str(name)
