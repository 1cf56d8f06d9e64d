"""What somebody else wrote, or an older or newer version, ends no process and holds nobody else up."""

import json
from collections.abc import Iterator

import pytest

from fastchat_q import keys
from fastchat_q.events import parse_line

from .faults.kit import Recorder
from .http_client import get, post
from .stack import API_KEY, Stack, wait_until
from .streams import LONG, WORDS, echo_worker, resume

LINES = (
    b"a 1 1 {}",
    b"a 1 1 null",
    b'a 1 1 {"t":5,"s":""}',
    b"a 1 end []",
    b"a 1 end {}",
    b'a 1 end {"state":"x","reason":"","result":[1]}',
    b'a 1 end {"state":"succeeded","reason":"","result":{"usage":{"a":1}}}',
)


@pytest.fixture
def running(stack: Stack) -> Iterator[tuple[Stack, Recorder]]:
    """A stack with a stream under way, which must come to its end."""
    echo_worker(stack)
    recorder = Recorder(stack.port)
    recorder.wait_words(20)
    yield stack, recorder
    assert recorder.finish(60).split() == WORDS


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_another_shape_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="event"):
        parse_line(line)


def test_foreign_messages_end_neither_an_api_server_nor_a_worker(running: tuple[Stack, Recorder]) -> None:
    stack, _ = running
    for channel in (*stack.redis.pubsub_channels(keys.inbox("*")), *stack.redis.pubsub_channels("fq:hint:*")):
        for line in (*LINES, b"\xff\xfe"):
            assert stack.redis.publish(channel, line) == 1


@pytest.mark.parametrize("event_id", ["4294967296", "9" * 26, "9" * 5000])
def test_an_event_id_that_is_none_is_refused_and_holds_no_other_stream_up(
    running: tuple[Stack, Recorder], event_id: str
) -> None:
    stack, recorder = running
    path = f"/v1/jobs/{recorder.public_id}/events"
    status, _ = resume(stack.port, str(recorder.public_id), event_id).head()
    assert status == 400
    assert get(stack.port, f"{path}?starting_after={event_id}").status in (400, 431)
    second = Recorder(stack.port, behind=(str(recorder.public_id), 0))
    assert second.finish(60).split() == WORDS


def test_a_damaged_log_ends_the_streams_of_its_job_alone(running: tuple[Stack, Recorder]) -> None:
    stack, recorder = running
    other = post(stack.port, {**LONG, "max_tokens": 5})
    names = keys.model_keys("echo")
    log = names.log(other.headers["x-job-id"].rpartition(".")[2])
    for damage in (lambda: stack.redis.xadd(log, {"x": "y"}, id="0-999"), lambda: stack.redis.set(log, "x")):
        damage()
        reply = get(stack.port, f"/v1/jobs/{other.headers['x-job-id']}/events")
        assert b"stream_diverged" in reply.body
    second = Recorder(stack.port, behind=(str(recorder.public_id), 0))
    assert second.finish(60).split() == WORDS


def test_a_field_more_in_a_newer_workers_model_card_is_left_out(running: tuple[Stack, Recorder]) -> None:
    stack, _ = running
    [name] = list(stack.redis.scan_iter(keys.worker("*")))
    entry = stack.redis.hgetall(name)
    card = {**json.loads(entry["card"]), "from_the_future": 1}
    newer = {**entry, "worker_id": "w-newer", "card": json.dumps(card)}
    stack.redis.hset(keys.worker("w-newer"), mapping=newer)
    stack.redis.zadd(keys.WORKERS, {"w-newer": 2**53})
    wait_until(lambda: get(stack.port, "/readyz").status == 200, "ready")
    assert post(stack.port, {**LONG, "max_tokens": 5}).status == 200


def test_a_traceback_in_the_log_shows_no_key(stack: Stack) -> None:
    """The bug is a stand-in: a record that its reader takes for JSON."""
    echo_worker(stack)
    done = post(stack.port, {**LONG, "max_tokens": 1})
    name = keys.model_keys("echo").job(done.headers["x-job-id"].rpartition(".")[2])
    stack.redis.hset(name, "view", "no json")
    assert get(stack.port, f"/v1/jobs/{done.headers['x-job-id']}/events").status == 500
    logs = "".join(path.read_text() for path in stack.folder.rglob("*.log"))
    assert "Traceback" in logs
    assert API_KEY not in logs


def test_a_post_without_a_body_needs_no_content_type(stack: Stack) -> None:
    echo_worker(stack)
    recorder = Recorder(stack.port)
    recorder.wait_words(5)
    bare: dict[str, str | None] = {"content-type": None, "content-length": None}
    reply = post(stack.port, b"", path=f"/v1/jobs/{recorder.public_id}/cancel", headers=bare)
    assert (reply.status, reply.json()["state"]) == (200, "cancelled")
    assert post(stack.port, b"", headers=bare).error()["code"] == "missing_body"
    recorder.close()
