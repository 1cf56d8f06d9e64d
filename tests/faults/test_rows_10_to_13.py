"""Published messages that do not arrive, and a Redis that is killed."""

import threading
import time

from tests.http_client import Reply, get, post
from tests.stack import Stack, free_port, wait_until
from tests.streams import LONG, WORDS, echo_worker, second_api

from .kit import Recorder, assert_log_is, assert_queue_is_clean, frozen
from .proxy import FaultProxy, fault_proxy

SHORT = {"model": "echo", "messages": [{"role": "user", "content": "a b c"}]}


def subscribers(stack: Stack) -> set[str]:
    """Ids of connections that are subscribed to an inbox."""
    return {str(client["id"]) for client in stack.redis.client_list(_type="pubsub") if client["sub"] != "0"}


def test_row_10_a_subscriber_killed_by_its_output_buffer_catches_up_without_a_lost_token(stack: Stack) -> None:
    """Messages stay below 16 KB: larger ones Valkey does not copy, and does not count against the limit.

    The API server is on the unix socket: TCP's own buffers would take the whole stream.
    """
    port = free_port()
    api = stack.start_api(port, FASTCHAT_Q_REDIS_URL=f"unix://{stack.server.socket}")
    stack.redis.config_set("client-output-buffer-limit", "pubsub 64kb 32kb 1")
    echo_worker(stack, delay_ms=1)
    body = {"model": "echo", "messages": [{"role": "user", "content": "x" * 700 + " y"}], "ignore_eos": True}
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    stream = Recorder(port, {**body, "max_tokens": 3000})
    stream.wait_words(2)
    before = stack.redis.client_list(_type="pubsub")
    with frozen(api.pid):
        wait_until(lambda: len(stack.redis.client_list(_type="pubsub")) < len(before), "Redis drops the subscriber")
    text = stream.finish()
    assert text.count("y") == 1500
    assert_log_is(stack, "echo", stream)


def test_row_10_a_subscriber_that_redis_cuts_off_again_and_again_loses_nothing(stack: Stack) -> None:
    echo_worker(stack)
    stream = Recorder(stack.port)
    for count in range(50, 300, 50):
        stream.wait_words(count)
        wait_until(lambda: stack.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub"), "somebody is cut off")
    assert stream.finish().split() == WORDS


def test_row_11_a_half_open_subscription_delays_a_stream_by_the_look_at_silent_ones_and_no_more(
    stack: Stack, behind_proxy: tuple[FaultProxy, int]
) -> None:
    proxy, port = behind_proxy
    pauses: list[float] = []
    while not pauses or (min(pauses) >= 4 and len(pauses) < 3):  # once is enough; a busy machine gets more
        stream = Recorder(port)
        stream.wait_words(20)
        with proxy.frozen(subscriptions_only=True) as frozen_connections:
            assert frozen_connections == 1
            assert stream.finish().split() == WORDS
        pauses.append(stream.longest_pause_s())
        assert_log_is(stack, "echo", stream)
    assert min(pauses) < 4, "a new subscription would take longer"


def test_row_11_a_half_open_subscription_is_replaced(stack: Stack) -> None:
    with fault_proxy(stack.server.socket) as proxy:
        port = second_api(stack, FASTCHAT_Q_REDIS_URL=proxy.url)
        wait_until(lambda: len(subscribers(stack)) == 2, f"both API servers listen, {port} too")
        before = subscribers(stack)
        with proxy.frozen(subscriptions_only=True):
            wait_until(lambda: subscribers(stack) - before, "it subscribes anew", timeout_s=15)


def test_row_12_a_stream_whose_last_message_is_lost_ends_all_the_same(
    stack: Stack, behind_proxy: tuple[FaultProxy, int]
) -> None:
    proxy, port = behind_proxy
    loss = proxy.lose_messages(lambda frame: b" end {" in frame)
    stream = Recorder(port, {**LONG, "max_tokens": 100})
    assert loss.happened.wait(20)
    lost_at = time.monotonic()
    assert stream.finish().split() == WORDS[:100]
    assert time.monotonic() - lost_at < 6, "the look at silent streams, on a busy machine"


def test_row_12_messages_lost_in_the_middle_are_read_from_the_log(
    stack: Stack, behind_proxy: tuple[FaultProxy, int]
) -> None:
    proxy, port = behind_proxy
    stream = Recorder(port)
    for count in (30, 100, 200):
        stream.wait_words(count)
        assert proxy.lose_messages(lambda frame: b"fq:inbox:" in frame, count=3).happened.wait(10)
    assert stream.finish().split() == WORDS
    assert_log_is(stack, "echo", stream)


def test_row_12_an_answer_of_which_no_message_ever_arrives_is_found_in_the_log(stack: Stack) -> None:
    """The API's inbox is renamed under the job, so nothing is published to it."""
    box: list[Reply] = []
    worker = echo_worker(stack)
    with frozen(worker.pid):
        request = threading.Thread(target=lambda: box.append(post(stack.port, SHORT)))
        request.start()
        wait_until(lambda: stack.live("echo") == 1, "the job is queued")
        [job] = stack.records("echo")
        stack.redis.hset(job, "inbox", "nowhere")
    request.join(30)
    assert box[0].json()["choices"][0]["message"]["content"] == "a b c"


def test_row_13_kill_9_of_redis_under_load_pauses_streams_and_all_of_them_go_on(stack: Stack) -> None:
    echo_worker(stack)
    streams = [Recorder(stack.port) for _ in range(8)]
    for stream in streams:
        stream.wait_words(40)
    stack.server.kill()
    assert post(stack.port, LONG).status == 503
    assert get(stack.port, "/readyz").status == 503
    assert get(stack.port, "/healthz").status == 200
    stack.server.restart()
    for stream in streams:
        assert stream.finish().split() == WORDS
        assert_log_is(stack, "echo", stream)
    wait_until(lambda: get(stack.port, "/readyz").status == 200, "ready again")
    assert_queue_is_clean(stack, "echo")


def test_row_13_a_terminated_redis_is_no_different(stack: Stack) -> None:
    echo_worker(stack)
    stream = Recorder(stack.port)
    stream.wait_words(40)
    stack.server.terminate()
    stack.server.restart()
    assert stream.finish().split() == WORDS
