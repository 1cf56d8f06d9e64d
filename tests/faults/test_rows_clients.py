"""Clients and API servers that go and come back: rows 6 to 8, 25 and 40."""

import statistics
import threading
import time
from typing import Any

from fastchat_q import keys
from tests.http_client import Reply, get, post
from tests.stack import Stack, free_port, wait_until
from tests.streams import ENDLESS, LONG, WORDS, echo_worker, resume, second_api

from .kit import Recorder, assert_log_is, assert_queue_is_clean

RESUMES = 200


def record(stack: Stack, recorder: Recorder) -> dict[str, Any]:
    """What the API says of the recorder's job."""
    found: dict[str, Any] = get(stack.port, f"/v1/jobs/{recorder.public_id}").json()
    return found


def test_row_06_kill_9_of_an_api_server_frees_the_slots_of_its_clients_that_stay_away(stack: Stack) -> None:
    port = free_port()
    api = stack.start_api(port)
    echo_worker(stack)
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    recorder = Recorder(port, ENDLESS)
    recorder.wait_words(5)
    api.kill()
    wait_until(lambda: stack.running("echo") == 0, "the slot is free", timeout_s=60)
    assert record(stack, recorder)["reason"] == "its API server is gone"
    recorder.close()
    assert_queue_is_clean(stack, "echo")


def test_row_06_kill_9_of_an_api_server_does_not_end_a_job_that_is_to_continue(stack: Stack) -> None:
    port = free_port()
    api = stack.start_api(port)
    echo_worker(stack)
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    recorder = Recorder(port, {**LONG, "on_disconnect": "continue"})
    recorder.wait_words(5)
    api.kill()
    wait_until(lambda: record(stack, recorder)["state"] == "succeeded", "it is done all the same")
    assert record(stack, recorder)["tokens"] == len(WORDS)
    recorder.close()


def test_row_07_a_cut_client_goes_on_at_another_api_server_with_the_exact_rest(stack: Stack) -> None:
    echo_worker(stack)
    other = second_api(stack)
    first = Recorder(stack.port)
    first.wait_words(40)
    first.close()
    assert first.public_id is not None
    rest = Recorder(other, behind=(first.public_id, first.last_id))
    rest.finish()
    assert (first.text + rest.text).split() == WORDS
    assert min(piece.id for piece in rest.pieces) > first.last_id


def test_row_07_a_stream_survives_the_kill_9_of_its_api_server_and_goes_on_at_the_restarted_one(stack: Stack) -> None:
    port = free_port()
    api = stack.start_api(port)
    echo_worker(stack)
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    first = Recorder(port)
    first.wait_words(40)
    api.kill()
    first.close()
    stack.start_api(port)
    assert first.public_id is not None
    rest = Recorder(port, behind=(first.public_id, first.last_id))
    rest.finish()
    assert (first.text + rest.text).split() == WORDS


def test_row_08_a_client_that_leaves_costs_no_more_than_the_grace_and_its_use_is_recorded(stack: Stack) -> None:
    echo_worker(stack)
    port = second_api(stack, FASTCHAT_Q_DISCONNECT_GRACE_S="2")
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    recorder = Recorder(port, ENDLESS)
    recorder.wait_words(10)
    left = time.monotonic()
    recorder.close()
    wait_until(lambda: stack.running("echo") == 0, "the slot is free")
    assert time.monotonic() - left >= 1.5, "it had its grace"
    found = record(stack, recorder)
    assert (found["state"], found["reason"]) == ("cancelled", "client disconnected")
    assert found["tokens"] >= 10
    assert stack.redis.exists(keys.model_keys("echo").running) == 0
    assert_queue_is_clean(stack, "echo")


def test_row_08_a_client_that_comes_back_within_the_grace_keeps_its_job(stack: Stack) -> None:
    echo_worker(stack)
    port = second_api(stack, FASTCHAT_Q_DISCONNECT_GRACE_S="2")
    wait_until(lambda: get(port, "/readyz").status == 200, "ready")
    first = Recorder(port)
    first.wait_words(10)
    first.close()
    assert first.public_id is not None
    rest = Recorder(port, behind=(first.public_id, first.last_id))
    rest.finish()
    assert (first.text + rest.text).split() == WORDS


def test_row_25_50_clients_with_one_idempotency_key_get_the_answer_of_one_job(stack: Stack) -> None:
    echo_worker(stack)
    replies: list[Reply] = []

    def ask() -> None:
        replies.append(post(stack.port, {**LONG, "max_tokens": 40}, headers={"idempotency-key": "one"}))

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {reply.status for reply in replies} == {200}
    assert len({reply.headers["x-job-id"] for reply in replies}) == 1
    assert len({reply.body for reply in replies}) == 1
    other = post(stack.port, {**LONG, "max_tokens": 41}, headers={"idempotency-key": "one"})
    assert (other.status, other.error()["code"]) == (422, "idempotency_key_reused")


def test_row_40_a_thundering_herd_of_clients_that_come_back_is_served(stack: Stack) -> None:
    """All at once, each with the exact rest. How fast is for bench/, not for a test on a shared machine."""
    echo_worker(stack)
    first = Recorder(stack.port)
    first.wait_words(40)
    assert first.public_id is not None
    ids = [piece.id for piece in first.pieces][:40]
    herd = [resume(stack.port, first.public_id, ids[number % len(ids)]) for number in range(RESUMES)]
    first.finish()
    for number, connection in enumerate(herd):
        assert connection.head()[0] == 200
        blocks = list(connection.events())
        assert blocks[-1] == "data: [DONE]"
        assert connection.ids[0] > ids[number % len(ids)]
        assert connection.ids == sorted(set(connection.ids))
    assert statistics.median(connection.ids[-1] for connection in herd) == len(WORDS) + 3
    assert_log_is(stack, "echo", first)
