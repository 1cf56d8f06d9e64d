"""Clients that were cut off go on where they were: on any server, after a restart, by event id or idempotency key."""

import json

import pytest
from fastchat_q.api.render import ChunkWriter, View
from fastchat_q.api.streaming import PING
from openai._streaming import SSEDecoder

from fastchat_q import keys
from fastchat_q.events import Delta, Piece

from .http_client import get, post
from .stack import Stack, wait_until
from .streams import (
    ENDLESS,
    LONG,
    WORDS,
    echo_worker,
    events_until,
    open_stream,
    resume,
    second_api,
    start_stream,
    text_of,
)


def test_every_event_has_an_id_and_the_ids_count_tokens(stack: Stack) -> None:
    echo_worker(stack)
    connection, _ = open_stream(stack.port, {**LONG, "max_tokens": 20, "stream_options": {"include_usage": True}})
    blocks = [block for block in connection.events() if not block.startswith(":")]
    assert len(blocks) == len(connection.ids)
    assert connection.ids[0] == 0
    assert connection.ids[-3:] == [21, 22, 23], "finish reason, usage, [DONE]"
    assert connection.ids == sorted(set(connection.ids))


def test_a_finished_job_is_read_again_from_any_event(stack: Stack) -> None:
    echo_worker(stack, delay_ms=1)
    connection, job_id = open_stream(stack.port, {**LONG, "max_tokens": 50})
    whole = list(connection.events())
    again = resume(stack.port, job_id, None)
    again.head()
    blocks = list(again.events())
    assert (text_of(blocks), blocks[0], blocks[-2:]) == (text_of(whole), whole[0], whole[-2:])
    for after, expected in ((50, [51, 53]), (51, [53]), (53, [])):
        tail = resume(stack.port, job_id, after)
        tail.head()
        list(tail.events())
        assert tail.ids == expected
    reply = get(stack.port, f"/v1/jobs/{job_id}/events?starting_after=51")
    assert reply.body == b"id: 53\ndata: [DONE]\n\n"


@pytest.mark.parametrize("job_id", ["nonsense", "echo.01ARZ3NDEKTSV4RRFFQ69G5FAV", "other.01ARZ3NDEKTSV4RRFFQ69G5FAV"])
def test_a_job_that_is_not_there_is_404(echo_stack: Stack, job_id: str) -> None:
    for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events"):
        reply = get(echo_stack.port, path)
        assert (reply.status, reply.error()["code"]) == (404, "job_not_found")
    assert post(echo_stack.port, {}, path=f"/v1/jobs/{job_id}/cancel").status == 404


def test_an_event_id_that_is_no_number_is_400(echo_stack: Stack) -> None:
    reply = get(echo_stack.port, "/v1/jobs/echo.01ARZ3NDEKTSV4RRFFQ69G5FAV/events", last_event_id="abc")
    assert (reply.status, reply.error()["code"]) == (400, "invalid_event_id")


def test_a_job_tells_its_state_its_place_and_its_attempts(stack: Stack) -> None:
    first = echo_worker(stack, "--slots", "1", "--drain-s", "0")
    connection, running = open_stream(stack.port)
    waiting = start_stream(stack.port)
    _, head = waiting.head()
    state = get(stack.port, f"/v1/jobs/{head['x-job-id']}").json()
    assert (state["object"], state["id"], state["model"]) == ("job", head["x-job-id"], "echo")
    assert (state["state"], state["position"], state["attempts"]) == ("queued", 1, [])
    first.stop()
    echo_worker(stack, "--slots", "1", delay_ms=1)
    assert text_of(list(connection.events())).split() == WORDS
    state = get(stack.port, f"/v1/jobs/{running}").json()
    assert (state["state"], state["tokens"], state["position"]) == ("succeeded", len(WORDS), None)
    assert [attempt["outcome"] for attempt in state["attempts"]] == ["released", "succeeded"]
    assert state["usage"]["completion_tokens"] == len(WORDS)
    list(waiting.events())
    assert get(stack.port, f"/v1/jobs/{head['x-job-id']}").json()["state"] == "succeeded"


def test_cancelling_a_job_ends_its_stream_and_a_second_time_changes_nothing(stack: Stack) -> None:
    echo_worker(stack)
    connection, job_id = open_stream(stack.port, ENDLESS)
    reply = post(stack.port, {}, path=f"/v1/jobs/{job_id}/cancel")
    assert (reply.status, reply.json()["state"]) == (200, "cancelled")
    last = json.loads(list(connection.events())[-1].removeprefix("data: "))
    assert last["error"]["code"] == "cancelled"
    wait_until(lambda: stack.running("echo") == 0, "the slot is free")
    assert post(stack.port, {}, path=f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"


def test_a_job_that_is_to_continue_is_done_without_its_client(stack: Stack) -> None:
    echo_worker(stack, delay_ms=5)
    connection, job_id = open_stream(stack.port, {**LONG, "on_disconnect": "continue"})
    connection.close()
    wait_until(lambda: get(stack.port, f"/v1/jobs/{job_id}").json()["state"] == "succeeded", "it is done")
    later = resume(stack.port, job_id, None)
    later.head()
    assert text_of(list(later.events())).split() == WORDS
    job = keys.model_keys("echo").job(job_id.rpartition(".")[2])
    assert stack.redis.ttl(job) > 3600, "kept for a client that may come much later"


def test_the_same_idempotency_key_attaches_to_the_running_job_and_streams_it_whole(stack: Stack) -> None:
    echo_worker(stack)
    other = second_api(stack)
    wait_until(lambda: get(other, "/readyz").status == 200, "ready")
    first, job_id = open_stream(stack.port, idempotency_key="k1")
    text = text_of(events_until(first, 30))
    second, same = open_stream(other, idempotency_key="k1")
    assert same == job_id
    assert text_of(list(second.events())).split() == WORDS, "from the beginning"
    assert (text + text_of(list(first.events()))).split() == WORDS
    third, same = open_stream(stack.port, idempotency_key="k1")
    assert same == job_id, "and after the end"
    assert text_of(list(third.events())).split() == WORDS
    assert len(stack.records("echo")) == 1


def test_an_idempotency_key_with_another_body_is_422_and_the_order_of_fields_is_no_other_body(stack: Stack) -> None:
    echo_worker(stack, delay_ms=1)
    reply = post(stack.port, {**LONG, "max_tokens": 5}, headers={"idempotency-key": "k"})
    assert reply.status == 200
    other = post(stack.port, {**LONG, "max_tokens": 6}, headers={"idempotency-key": "k"})
    assert (other.status, other.error()["code"]) == (422, "idempotency_key_reused")
    turned = dict(reversed({**LONG, "max_tokens": 5}.items()))
    assert post(stack.port, turned, headers={"idempotency-key": "k"}).json() == reply.json()
    long_key = post(stack.port, LONG, headers={"idempotency-key": "k" * 256})
    assert (long_key.status, long_key.error()["code"]) == (400, "invalid_idempotency_key")


def test_the_reply_of_a_failed_job_names_the_job(echo_stack: Stack) -> None:
    reply = post(echo_stack.port, {"model": "echo", "messages": [{"role": "system", "content": "x"}]})
    assert reply.status == 400
    assert reply.headers["x-job-id"].startswith("echo.")


def test_a_client_that_reads_slowly_gets_everything_and_the_server_stays_small(stack: Stack) -> None:
    """Its events are not kept for it: they are read from the log as it comes for them."""
    echo_worker(stack, delay_ms=0)
    body = {**LONG, "messages": [{"role": "user", "content": "x" * 2000 + " y"}], "ignore_eos": True}
    connection, job_id = open_stream(stack.port, {**body, "max_tokens": 20_000})
    wait_until(lambda: stack.live("echo") == 0, "the job is done, though its client reads nothing", timeout_s=60)
    wait_until(lambda: get(stack.port, f"/v1/jobs/{job_id}").json()["state"] == "succeeded", "done")
    text = text_of(list(connection.events()))
    assert text == ("x" * 2000 + " y") * 10_000


def test_a_ping_between_two_events_is_nothing_to_the_official_client() -> None:
    """Its decoder keeps the last id: an empty line behind a comment would make an event without data of it."""
    writer = ChunkWriter(View("JOB", "m", 0, "hi"))
    wire = (
        writer.role()
        + writer.events([Delta(1, 1, (Piece((1,), "a"),))])
        + PING
        + writer.events([Delta(2, 1, (Piece((2,), "b"),))])
    )
    found = [event.json()["choices"][0]["delta"]["content"] for event in SSEDecoder().iter_bytes(iter([wire]))]
    assert found == ["", "a", "b"]
