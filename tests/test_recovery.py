"""What clients see when processes die, freeze, leave or restart: real processes, real signals."""

import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fastchat_q import keys

from .http_client import Connection, Reply, get, post
from .stack import Process, Stack, free_port, wait_until

WORDS = [f"w{number}" for number in range(400)]
LONG = {"model": "echo", "messages": [{"role": "user", "content": " ".join(WORDS)}]}


def echo_worker(stack: Stack, *arguments: str) -> Process:
    return stack.start_worker("--model", "echo", "--engine", "echo", "--token-delay-ms", "10", *arguments)


def stream_text(connection: Connection) -> Iterator[str]:
    """The text of a stream, piece by piece; fails on an error event."""
    for block in connection.events():
        if block.startswith("data: {"):
            chunk = json.loads(block[6:])
            assert "choices" in chunk, chunk
            yield chunk["choices"][0]["delta"].get("content") or ""


def start_stream(port: int, body: dict[str, Any]) -> Connection:
    connection = Connection(port)
    connection.send({**body, "stream": True})
    return connection


def read_words(pieces: Iterator[str], count: int) -> str:
    text = ""
    while len(text.split()) < count:
        text += next(pieces)
    return text


def test_kill_9_of_the_worker_mid_stream_pauses_the_stream_and_loses_nothing(stack: Stack) -> None:
    first = echo_worker(stack)
    connection = start_stream(stack.port, LONG)
    assert connection.head()[0] == 200
    pieces = stream_text(connection)
    text = read_words(pieces, 40)
    first.kill()
    echo_worker(stack)
    text += "".join(pieces)
    assert text.split() == WORDS, "no word lost, none twice"
    wait_until(lambda: stack.live("echo") == 0, "no job is left")


def test_a_frozen_worker_that_thaws_writes_nothing_into_the_stream_of_its_heir(stack: Stack) -> None:
    frozen = echo_worker(stack)
    connection = start_stream(stack.port, LONG)
    connection.head()
    pieces = stream_text(connection)
    text = read_words(pieces, 40)
    frozen.signal(signal.SIGSTOP)
    try:
        echo_worker(stack)
        text += read_words(pieces, 40)  # the lease ran out, the heir goes on
    finally:
        frozen.signal(signal.SIGCONT)
    text += "".join(pieces)
    assert text.split() == WORDS


def test_a_worker_that_is_told_to_stop_hands_its_job_over(stack: Stack) -> None:
    first = echo_worker(stack, "--drain-s", "0.2")
    echo_worker(stack)
    streams = [start_stream(stack.port, LONG) for _ in range(4)]
    pieces = [stream_text(stream) for stream in streams if stream.head()]
    texts = [read_words(piece, 20) for piece in pieces]
    assert first.stop() == 0
    texts = [text + "".join(piece) for text, piece in zip(texts, pieces, strict=True)]
    assert [text.split() for text in texts] == [WORDS] * 4
    assert not stack.registered(first.pid)


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


def test_kill_9_of_redis_pauses_streams_and_they_go_on(stack: Stack) -> None:
    echo_worker(stack)
    connection = start_stream(stack.port, LONG)
    connection.head()
    pieces = stream_text(connection)
    text = read_words(pieces, 40)
    stack.server.kill()
    assert post(stack.port, LONG).status == 503
    assert get(stack.port, "/readyz").status == 503
    assert get(stack.port, "/healthz").status == 200
    stack.server.restart()
    text += "".join(pieces)
    assert text.split() == WORDS
    wait_until(lambda: get(stack.port, "/readyz").status == 200, "ready again")


def test_a_frozen_redis_turns_ready_red_at_once_and_streams_go_on_when_it_thaws(stack: Stack) -> None:
    echo_worker(stack)
    connection = start_stream(stack.port, {**LONG, "max_tokens": 200})
    connection.head()
    pieces = stream_text(connection)
    text = read_words(pieces, 20)
    stack.server.process.send_signal(signal.SIGSTOP)
    try:
        reply = get(stack.port, "/readyz")
        assert (reply.status, reply.json()["reason"]) == (503, "redis: no answer within 2 s")
        assert get(stack.port, "/v1/models").error()["code"] == "queue_unavailable"
    finally:
        stack.server.process.send_signal(signal.SIGCONT)
    assert (text + "".join(pieces)).split() == WORDS[:200]


def test_a_subscriber_that_redis_cuts_off_catches_up_from_the_log(stack: Stack) -> None:
    echo_worker(stack)
    connection = start_stream(stack.port, LONG)
    connection.head()
    pieces = stream_text(connection)
    text = ""
    for count in range(50, 300, 50):
        text += read_words(pieces, 50)
        assert stack.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub") >= 1, count
    text += "".join(pieces)
    assert text.split() == WORDS


def test_a_message_that_never_arrives_is_found_in_the_log(stack: Stack) -> None:
    """The tail is lost: the API's inbox is renamed under the job, so nothing is ever published to it."""
    box: list[Reply] = []
    body = {"model": "echo", "messages": [{"role": "user", "content": "a b c"}]}
    worker = echo_worker(stack)
    worker.signal(signal.SIGSTOP)
    request = threading.Thread(target=lambda: box.append(post(stack.port, body)))
    request.start()
    wait_until(lambda: stack.live("echo") == 1, "the job is queued")
    [job] = [name for name in stack.job_keys("echo") if ":j:" in name]
    stack.redis.hset(job, "inbox", "nowhere")
    worker.signal(signal.SIGCONT)
    request.join(15)
    assert box[0].json()["choices"][0]["message"]["content"] == "a b c"


def test_a_job_whose_record_vanished_ends_with_an_error_and_never_hangs(stack: Stack) -> None:
    worker = echo_worker(stack)
    worker.signal(signal.SIGSTOP)
    connection = start_stream(stack.port, LONG)
    wait_until(lambda: stack.live("echo") == 1, "the job is queued")
    stack.redis.flushall()
    worker.kill()
    status, _ = connection.head()
    if status == 200:
        last = json.loads(list(connection.events())[-1].removeprefix("data: "))
        assert last["error"]["code"] == "queue_unavailable"
    else:
        assert status == 503


def test_a_job_that_is_slow_to_be_accepted_is_not_taken_for_lost(stack: Stack) -> None:
    """Reads are answered while writes wait: the job's record is looked for before it is there."""
    echo_worker(stack)
    stack.redis.client_pause(2500, all=False)
    reply = post(stack.port, {**LONG, "max_tokens": 2})
    assert reply.status == 200, reply.body


def test_waiting_streams_are_told_their_place(stack: Stack) -> None:
    echo_worker(stack, "--slots", "1")
    running = start_stream(stack.port, {**LONG, "ignore_eos": True, "max_tokens": 100_000})
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
    wait_until(lambda: stack.live("echo") == 0, "the job is cancelled", timeout_s=3)
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


def test_a_model_without_a_worker_is_503_and_an_unknown_one_404(stack: Stack) -> None:
    worker = echo_worker(stack)
    assert worker.stop() == 0
    wait_until(lambda: get(stack.port, "/readyz").status == 503, "not ready")
    reply = post(stack.port, LONG)
    assert (reply.status, reply.error()["code"]) == (503, "no_worker")
    assert reply.headers["retry-after"]
    assert post(stack.port, {**LONG, "model": "other"}).status == 404
    assert stack.live("echo") == 0


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


def test_an_api_server_that_may_not_wait_cancels_what_it_leaves(stack: Stack) -> None:
    port = free_port()
    api = stack.start_api(port, "--drain-s", "0")
    echo_worker(stack)
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    connection = start_stream(port, {**LONG, "ignore_eos": True, "max_tokens": 100_000})
    connection.head()
    wait_until(lambda: stack.running("echo") == 1, "the job runs")
    assert api.stop() == 0
    wait_until(lambda: stack.running("echo") == 0, "the slot is free", timeout_s=3)


def test_kill_9_of_an_api_server_frees_the_slots_of_its_clients(stack: Stack) -> None:
    port = free_port()
    api = stack.start_api(port)
    echo_worker(stack)
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    start_stream(port, {**LONG, "ignore_eos": True, "max_tokens": 100_000})
    wait_until(lambda: stack.running("echo") == 1, "the job runs")
    api.kill()
    wait_until(lambda: stack.running("echo") == 0, "the slot is free", timeout_s=25)
    assert stack.live("echo") == 0


def test_a_client_that_reads_nothing_is_given_up_and_the_others_are_not(stack: Stack) -> None:
    port = free_port()
    stack.start_api(port, FASTCHAT_Q_STALLED_CLIENT_S="2")
    stack.start_worker("--model", "echo", "--engine", "echo", "--token-delay-ms", "1")
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    wide = {"model": "echo", "messages": [{"role": "user", "content": "x" * 4000 + " y"}], "ignore_eos": True}
    stalled = start_stream(port, {**wide, "max_tokens": 30_000})
    stalled.head()
    reader = start_stream(port, {**LONG, "ignore_eos": True, "max_tokens": 8_000})
    reader.head()
    pieces, text = stream_text(reader), ""
    while stack.live("echo") == 2:
        text += next(pieces)
    assert stack.live("echo") == 1, "the stalled one is cancelled, the one that reads goes on"
    text += "".join(pieces)
    assert text == " ".join(WORDS) * 20


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
