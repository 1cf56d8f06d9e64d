"""Operators' mistakes, a full Redis, and one that does not answer."""

from fastchat_q import keys
from tests.http_client import get, post
from tests.stack import API_KEY, Process, Stack, free_port, wait_until
from tests.streams import ENDLESS, LONG, WORDS, echo_worker

from .kit import Recorder, assert_log_is, assert_queue_is_clean, frozen


def reason(stack: Stack) -> str:
    """Why the API is not ready; empty: it is."""
    return str(get(stack.port, "/readyz").json().get("reason", ""))


def test_row_15_script_flush_is_not_noticed(stack: Stack) -> None:
    echo_worker(stack)
    stream = Recorder(stack.port)
    for count in (30, 100, 200):
        stream.wait_words(count)
        stack.redis.script_flush()
    assert stream.finish().split() == WORDS
    assert post(stack.port, {**LONG, "max_tokens": 2}).status == 200
    assert_queue_is_clean(stack, "echo")


def test_row_15_flushall_costs_no_stream_its_answer(stack: Stack) -> None:
    worker = echo_worker(stack)
    with frozen(worker.pid):
        stream = Recorder(stack.port)
        wait_until(lambda: stack.live("echo") == 1, "the job is queued")
        stack.redis.flushall()
    assert stream.finish().split() == WORDS
    wait_until(lambda: reason(stack) == "", "the worker is back in the registry")
    assert post(stack.port, {**LONG, "max_tokens": 2}).status == 200


def test_row_16_at_maxmemory_new_requests_are_refused_and_what_runs_ends(stack: Stack) -> None:
    echo_worker(stack)
    finishing, left = Recorder(stack.port), Recorder(stack.port, ENDLESS)
    for stream in (finishing, left):
        stream.wait_words(20)
    stack.redis.config_set("maxmemory", 1)
    reply = post(stack.port, LONG)
    assert reply.status in (429, 503)
    assert int(reply.headers["retry-after"]) > 0
    assert "memory" in reply.error()["message"]
    left.close()
    record = keys.model_keys("echo").job(str(left.job_id))
    wait_until(lambda: stack.redis.hget(record, "state") == "cancelled", "cancelling works")
    assert finishing.finish().split() == WORDS
    assert_queue_is_clean(stack, "echo")
    stack.redis.config_set("maxmemory", 0)
    assert post(stack.port, {**LONG, "max_tokens": 2}).status == 200


def test_row_17_an_api_server_does_not_start_on_a_redis_that_evicts(stack: Stack) -> None:
    stack.redis.config_set("maxmemory-policy", "allkeys-lru")
    environment = {"FASTCHAT_Q_REDIS_URL": stack.server.url, "FASTCHAT_Q_API_KEY": API_KEY}
    api = Process(stack.folder / "refused.log", "serve", "--port", str(free_port()), **environment)
    assert api.wait() == 2
    assert "maxmemory-policy is allkeys-lru" in api.output()
    assert "set maxmemory-policy noeviction" in api.output()


def test_row_17_an_eviction_policy_set_later_turns_readiness_red_until_it_is_mended(stack: Stack) -> None:
    echo_worker(stack)
    wait_until(lambda: reason(stack) == "", "ready")
    stack.redis.config_set("maxmemory-policy", "volatile-ttl")
    wait_until(lambda: "maxmemory-policy is volatile-ttl" in reason(stack), "not ready")
    stack.redis.config_set("maxmemory-policy", "noeviction")
    wait_until(lambda: reason(stack) == "", "ready again")


def test_row_17_an_evicted_lease_of_a_worker_that_lives_does_no_harm(stack: Stack) -> None:
    echo_worker(stack)
    stream = Recorder(stack.port)
    stream.wait_words(40)
    stack.redis.delete(keys.model_keys("echo").lease)
    assert stream.finish().split() == WORDS
    assert_queue_is_clean(stack, "echo")


def test_row_18_a_redis_frozen_beyond_the_lease_turns_readiness_red_and_no_token_is_written_twice(
    stack: Stack,
) -> None:
    echo_worker(stack)
    echo_worker(stack)
    streams = [Recorder(stack.port) for _ in range(4)]
    for stream in streams:
        stream.wait_words(20)
    with frozen(stack.server.process.pid):
        reply = get(stack.port, "/readyz")
        assert (reply.status, reply.json()["reason"]) == (503, "redis: no answer within 2 s")
        assert get(stack.port, "/v1/models").error()["code"] == "queue_unavailable"
        assert post(stack.port, LONG).status == 503, "after ten seconds, as long as a lease"
    for stream in streams:
        assert stream.finish().split() == WORDS
        assert_log_is(stack, "echo", stream)
    assert_queue_is_clean(stack, "echo")
