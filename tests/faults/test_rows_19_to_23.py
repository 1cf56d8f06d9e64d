"""Networks that drop everything, replies that are lost, clocks that are wrong."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastchat_q import keys
from tests.http_client import get, post
from tests.servers import CHOSEN, KINDS, needed
from tests.stack import Stack, wait_until
from tests.streams import ENDLESS, LONG, WORDS, echo_worker, second_api

from .kit import Recorder, assert_log_is, assert_queue_is_clean, faketime_library, runs, skewed
from .netns import Namespace, namespace, unavailable
from .proxy import FaultProxy, fault_proxy

HOURS_3 = 3 * 3600


@pytest.fixture
def space() -> Iterator[Namespace]:
    """A network namespace; the test is skipped where there can be none."""
    missing = unavailable()
    if missing is not None:
        pytest.skip(missing)
    with namespace() as up:
        yield up


def test_row_19_a_worker_behind_a_partition_loses_its_job_to_another_and_is_fenced_when_it_heals(
    stack: Stack, space: Namespace
) -> None:
    url = space.serve_redis(stack.server)
    cut_off = echo_worker(stack, prefix=space.prefix, FASTCHAT_Q_REDIS_URL=url)
    stream = Recorder(stack.port)
    stream.wait_words(40)
    with space.partitioned():
        heir = echo_worker(stack)
        stream.wait_words(100)
    assert stream.finish().split() == WORDS
    assert_log_is(stack, "echo", stream)
    assert_queue_is_clean(stack, "echo")
    assert heir.stop() == 0
    assert stack.registered(cut_off.pid), "it is back"
    assert post(stack.port, {**LONG, "max_tokens": 2}).status == 200, "and serves"


def test_row_20_an_api_server_behind_a_partition_answers_503_and_its_streams_go_on_from_the_log(
    stack: Stack, space: Namespace
) -> None:
    url, port = space.serve_redis(stack.server), 8000
    stack.start_api(port, host=space.address, prefix=space.prefix, FASTCHAT_Q_REDIS_URL=url)
    echo_worker(stack)
    with fault_proxy((space.address, port), resp=False) as http:
        wait_until(lambda: get(http.port, "/readyz").status == 200, "ready")
        stream = Recorder(http.port)
        stream.wait_words(40)
        with space.partitioned():
            assert post(http.port, LONG).status == 503
            assert get(http.port, "/readyz").status == 503
            assert get(http.port, "/healthz").status == 200
        assert stream.finish().split() == WORDS
        assert_log_is(stack, "echo", stream)
        wait_until(lambda: get(http.port, "/readyz").status == 200, "ready again")
    assert_queue_is_clean(stack, "echo")


def test_row_21_a_lost_reply_of_enqueue_makes_no_second_job(stack: Stack, behind_proxy: tuple[FaultProxy, int]) -> None:
    proxy, port = behind_proxy
    for _ in range(3):
        before = len(stack.job_keys("echo"))
        loss = proxy.lose_reply(runs("enqueue"))
        stream = Recorder(port, {**LONG, "max_tokens": 20})
        assert stream.finish().split() == WORDS[:20]
        assert loss.happened.wait(5)
        assert_log_is(stack, "echo", stream)
        assert len(stack.job_keys("echo")) == before + 2, "one record, one log"
    assert_queue_is_clean(stack, "echo")


def test_row_21_lost_replies_of_emit_write_no_token_twice(stack: Stack) -> None:
    with fault_proxy(stack.server.socket) as proxy:
        echo_worker(stack, FASTCHAT_Q_REDIS_URL=proxy.url)
        stream = Recorder(stack.port)
        for count in (20, 60, 100, 150, 200):
            stream.wait_words(count)
            assert proxy.lose_reply(runs("emit")).happened.wait(10)
        assert stream.finish().split() == WORDS
        assert_log_is(stack, "echo", stream)
        assert_queue_is_clean(stack, "echo")


def test_row_21_a_lost_reply_of_finish_ends_the_job_once(stack: Stack) -> None:
    with fault_proxy(stack.server.socket) as proxy:
        echo_worker(stack, FASTCHAT_Q_REDIS_URL=proxy.url)
        for _ in range(3):
            loss = proxy.lose_reply(runs("finish"))
            stream = Recorder(stack.port, {**LONG, "max_tokens": 20})
            assert stream.finish().split() == WORDS[:20]
            assert loss.happened.wait(5)
            assert_log_is(stack, "echo", stream)
            assert stack.redis.hget(keys.model_keys("echo").job(str(stream.job_id)), "state") == "succeeded"
        assert_queue_is_clean(stack, "echo")


def test_row_21_connections_cut_again_and_again_cost_time_alone(stack: Stack) -> None:
    with fault_proxy(stack.server.socket) as proxy:
        port = second_api(stack, FASTCHAT_Q_REDIS_URL=proxy.url)
        echo_worker(stack, FASTCHAT_Q_REDIS_URL=proxy.url)
        wait_until(lambda: get(port, "/readyz").status == 200, "ready")
        stream = Recorder(port)
        for count in range(40, 360, 40):
            stream.wait_words(count)
            assert proxy.cut() > 0
        assert stream.finish().split() == WORDS
        assert_log_is(stack, "echo", stream)
    assert_queue_is_clean(stack, "echo")


@pytest.mark.parametrize("offset_s", [-HOURS_3, HOURS_3])
def test_row_22_wall_clocks_that_are_hours_off_do_not_matter(stack: Stack, folder: Path, offset_s: int) -> None:
    """Two workers and two API servers, one of each with a wrong clock: all know each other and share the work."""
    wrong = skewed(folder, offset_s)
    port = second_api(stack, **wrong)
    right_worker = echo_worker(stack, "--slots", "2")
    wrong_worker = echo_worker(stack, "--slots", "2", **wrong)
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    streams = [Recorder(at) for at in (stack.port, port) for _ in range(2)]
    wait_until(lambda: stack.running("echo") == 4, "each worker has two")
    members = set()
    wait_until(
        lambda: members.update(stack.redis.zrange(keys.WORKERS, 0, -1)) or len(members) == 2, "both are in the index"
    )
    beats = time.monotonic() + 4.0  # longer than a heartbeat of each
    while time.monotonic() < beats:
        assert set(stack.redis.zrange(keys.WORKERS, 0, -1)) == members, "neither forgets the other"
        time.sleep(0.05)
    scores = dict(stack.redis.zrange(keys.WORKERS, 0, -1, withscores=True))
    assert max(scores.values()) - min(scores.values()) < 10_000
    for stream in streams:
        assert stream.finish().split() == WORDS
        assert_log_is(stack, "echo", stream)
    assert right_worker.alive
    assert wrong_worker.alive
    assert_queue_is_clean(stack, "echo")


@pytest.mark.skipif(CHOSEN is KINDS["redis-7"], reason="libfaketime hangs beside Debian's shared library of jemalloc")
def test_row_23_a_redis_clock_that_jumps_an_hour_costs_a_lease_and_no_token(stack: Stack, folder: Path) -> None:
    library = needed(faketime_library)
    port = second_api(stack, FASTCHAT_Q_DEADLINE_S="36000")
    offset = folder / "faketime"
    offset.write_text("+0")
    preload = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_CACHE_DURATION": "1"}
    stack.server.terminate()
    stack.server.restart(**preload, FAKETIME_DONT_FAKE_MONOTONIC="1")
    echo_worker(stack)
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    stream = Recorder(port, {**ENDLESS, "max_tokens": 2 * len(WORDS)})
    stream.wait_words(40)
    before = stack.redis.time()[0]
    for jump, said in ((3600, "+3600"), (0, "+0")):
        offset.write_text(said)
        expected = before + jump
        wait_until(lambda at=expected: abs(stack.redis.time()[0] - at) < 60, "the clock of Redis jumps")
        stream.wait_words(len(stream.text.split()) + 60)
    assert stream.finish() == " ".join(WORDS) * 2
    assert_log_is(stack, "echo", stream)
    assert_queue_is_clean(stack, "echo")
