"""Responses whose servers die: what a second API server sends behind any event is, byte for byte, what was to come."""

import asyncio
import json
import urllib.parse
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fastchat_q.api.render import View
from fastchat_q.api.response_request import ResponseRequest

from fastchat_q import keys
from fastchat_q.connection import connect
from fastchat_q.events import Piece, ToolCallDelta
from fastchat_q.jobs import Message
from fastchat_q.queue import Claim, Queue, Terms
from fastchat_q.tokens import Chunk, Status, append

from .http_client import Connection, get, post
from .scripted_worker import script
from .servers import wait_until
from .stack import Stack
from .streams import WORDS, echo_worker, second_api

PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": "echo", "input": " ".join(WORDS)}


def start(port: int, body: dict[str, Any] = ASK) -> Connection:
    connection = Connection(port)
    connection.send({**body, "stream": True}, path=PATH)
    assert connection.head()[0] == 200
    return connection


def go_on(port: int, response_id: str, after: int | None = None, *, by_header: bool = False) -> Connection:
    connection = Connection(port)
    headers: dict[str, str | None] = {"content-type": None, "content-length": None}
    query = {"stream": "true"} | ({"starting_after": str(after)} if after is not None and not by_header else {})
    if after is not None and by_header:
        headers["last-event-id"] = str(after)
    path = f"{PATH}/{response_id}?{urllib.parse.urlencode(query)}"
    connection.send(b"", path=path, method="GET", headers=headers)
    return connection


def events(connection: Connection) -> Iterator[str]:
    """The blocks of events, without comments, as bytes say them but for their ids."""
    for block in connection.events():
        lines = [line for line in block.split("\n") if not line.startswith((":", "id: "))]
        if any(lines):
            yield "\n".join(lines)


def data(block: str) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(block.partition("data: ")[2])
    return decoded


def read_until(stream: Iterator[str], number: int) -> list[str]:
    """The events up to the one with this number."""
    found = []
    for block in stream:
        found.append(block)
        if data(block)["sequence_number"] >= number:
            return found
    raise AssertionError(f"it ended before {number}")


def id_of(blocks: list[str]) -> str:
    response_id: str = data(blocks[0])["response"]["id"]
    return response_id


def assert_is_one_stream(blocks: list[str], whole: list[str]) -> None:
    assert [data(block)["sequence_number"] for block in blocks] == list(range(len(blocks))), "none twice, none missing"
    assert blocks == whole


@pytest.mark.parametrize("background", [False, True])
def test_an_api_server_and_a_worker_are_killed_in_a_stream_that_goes_on_elsewhere(
    stack: Stack, background: bool
) -> None:
    worker = echo_worker(stack)
    other = second_api(stack)
    wait_until(lambda: get(other, "/readyz").status == 200, "ready")
    stream = events(start(stack.port, {**ASK, "background": background}))
    blocks = read_until(stream, 40)
    stack.api.kill()
    on = go_on(other, id_of(blocks), 40)
    assert on.head()[0] == 200
    rest = events(on)
    blocks += read_until(rest, 80)
    worker.kill()
    echo_worker_of(stack, other)
    blocks += list(rest)
    assert data(blocks[-1])["response"]["output"][0]["content"][0]["text"].split() == WORDS
    again = go_on(other, id_of(blocks))
    again.head()
    assert_is_one_stream(blocks, list(events(again)))


def test_every_event_of_a_rich_answer_can_be_gone_on_behind_on_another_server(stack: Stack) -> None:
    stack.start_scripted_worker("script")
    other = second_api(stack)
    wait_until(lambda: get(other, "/readyz").status == 200, "ready")
    steps = (
        Piece((1,), reasoning="Let me"),
        [Piece((2,), reasoning=" think", text="So")],
        Piece((3, 4), " it is"),
        Piece((5,), tool_calls=(ToolCallDelta(0, "{}", "a", "f"), ToolCallDelta(1, '{"x"', "b", "f"))),
        Piece((6,), tool_calls=(ToolCallDelta(1, ": 1}"),)),
    )
    body = {
        "model": "script",
        "input": script(*steps, finish="tool_calls"),
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    }
    stream = start(stack.port, body)
    whole = list(events(stream))
    assert stream.ids == list(range(len(whole))), "the id is the number"
    for after in range(len(whole)):
        rest = go_on(other, id_of(whole), after, by_header=bool(after % 2))
        assert rest.head()[0] == 200
        assert list(events(rest)) == whole[after + 1 :]
    beyond = go_on(other, id_of(whole), len(whole)).reply()
    assert (beyond.status, beyond.error()["code"]) == (400, "invalid_event_id")


def test_a_reader_that_comes_while_it_runs_gets_the_same_as_the_one_that_is_there(stack: Stack) -> None:
    echo_worker(stack, delay_ms=3)
    stream = events(start(stack.port))
    blocks = read_until(stream, 20)
    heads = [go_on(stack.port, id_of(blocks), after) for after in (0, 5, 20)]
    assert all(head.head()[0] == 200 for head in heads)
    readers = [events(head) for head in heads]
    blocks += list(stream)
    for after, reader in zip((0, 5, 20), readers, strict=True):
        assert list(reader) == blocks[after + 1 :]


def test_a_stream_goes_on_though_redis_loses_everything(stack: Stack) -> None:
    echo_worker(stack)
    stream = events(start(stack.port))
    blocks = read_until(stream, 30)
    stack.redis.flushall()
    blocks += list(stream)
    again = go_on(stack.port, id_of(blocks))
    again.head()
    assert_is_one_stream(blocks, list(events(again)))
    assert data(blocks[-1])["response"]["output"][0]["content"][0]["text"].split() == WORDS


def test_a_background_response_that_redis_has_lost_is_404(stack: Stack) -> None:
    echo_worker(stack)
    with stack.client() as client:
        started = client.responses.create(**ASK, background=True)
        stack.redis.flushall()
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(started.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.cancel(started.id)


def test_a_background_response_survives_all_processes(stack: Stack) -> None:
    first = echo_worker(stack)
    with stack.client() as client:
        started = client.responses.create(**ASK, background=True)
        wait_until(lambda: bool(client.responses.retrieve(started.id).output_text), "it has begun")
    first.kill()
    stack.api.kill()
    port = second_api(stack)
    echo_worker_of(stack, port)
    with stack.client(port) as client:
        wait_until(lambda: client.responses.retrieve(started.id).status == "completed", "it is done", timeout_s=30)
        assert client.responses.retrieve(started.id).output_text.split() == WORDS


def echo_worker_of(stack: Stack, port: int) -> None:
    """A worker that this API server knows, for the first one is gone."""
    stack.port = port
    echo_worker(stack)


def test_a_client_that_comes_back_in_time_finds_its_response_going_on(stack: Stack) -> None:
    echo_worker(stack)
    connection = start(stack.port)
    blocks = read_until(events(connection), 25)
    connection.close()
    on = go_on(stack.port, id_of(blocks), 25)
    assert on.head()[0] == 200
    blocks += list(events(on))
    assert data(blocks[-1])["type"] == "response.completed"


def test_what_is_not_stored_is_still_read_on_as_a_job(stack: Stack) -> None:
    """With `store: false` there is no response to retrieve, but for a while the job of the reply's `X-Job-Id`."""
    echo_worker(stack, delay_ms=1)
    stream = start(stack.port, {**ASK, "store": False})
    whole = list(events(stream))
    job_id = id_of(whole).removeprefix("resp_")
    assert go_on(stack.port, id_of(whole), 3).reply().status == 404
    for after in (None, 0, 3, 100):
        headers: dict[str, str | None] = {} if after is None else {"last-event-id": str(after)}
        tail = Connection(stack.port)
        tail.send(b"", path=f"/v1/jobs/{job_id}/events", method="GET", headers={"content-length": None, **headers})
        assert tail.head()[0] == 200
        assert list(events(tail)) == whole[0 if after is None else after + 1 :]


def test_a_response_whose_job_was_started_over_is_read_from_its_beginning_alone(stack: Stack) -> None:
    echo_worker(stack, delay_ms=1)
    whole = list(events(start(stack.port, {**ASK, "input": "a b c"})))
    key = keys.model_keys("echo").job(id_of(whole).rpartition(".")[2])
    stack.redis.hset(key, "void", "1")
    refused = go_on(stack.port, id_of(whole), 3).reply()
    assert (refused.status, refused.error()["code"]) == (400, "invalid_event_id")
    again = go_on(stack.port, id_of(whole))
    again.head()
    assert list(events(again)) == whole


def test_a_failure_in_a_stream_is_an_event_that_ends_it(stack: Stack) -> None:
    stack.start_scripted_worker("script")
    with stack.client() as client:
        steps = [Piece((number,), f" {number}") for number in range(1, 200)]
        body: dict[str, Any] = {"model": "script", "input": script(*steps, delay_ms=20)}
        with client.responses.create(**body, stream=True) as stream:
            events = iter(stream)
            response_id = next(events).response.id  # type: ignore[union-attr]
            next(event for event in events if event.type == "response.output_text.delta")
            job = keys.model_keys("script").job(response_id.rpartition(".")[2])
            expire(stack, job)
            last: Any = list(events)[-1]
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert last.response.error.code == "deadline_exceeded"
        assert last.response.output[0].status == "incomplete"
        kept = client.responses.retrieve(response_id)
        assert (kept.status, kept.error) == ("failed", last.response.error)
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="script", input="job", previous_response_id=response_id)
        assert refused.value.code == "previous_response_not_completed"


def expire(stack: Stack, job: str) -> None:
    """The job's time is over."""
    stack.redis.hset(job, "deadline_ms", 1)
    stack.redis.zadd(keys.model_keys("script").live, {job.rpartition(":")[2]: 1})


def test_an_error_before_the_first_byte_is_a_status(stack: Stack) -> None:
    reply = post(stack.port, {"model": "echo", "input": "x", "stream": True}, path=PATH)
    assert (reply.status, reply.error()["code"]) == (404, "model_not_found")


def test_numbers_are_void_once_a_failover_has_lost_entries_that_a_worker_wrote(stack: Stack) -> None:
    """What is written in their place may be cut otherwise: a number would stand for another event."""
    job_id = "01M7YSN24098N6EY5MJ6FR9HZN"
    names = keys.model_keys("solo")
    body = ResponseRequest.model_validate({"model": "solo", "input": "x", "background": True})
    view = View(job_id, "solo", 1, "hi", form="response", extra=body.to_extra([]))
    job = body.to_job([Message(role="user", content="x")]).model_copy(update={"id": job_id})

    async def begin() -> Claim:
        redis = connect(stack.server.url)
        queue = Queue(redis)
        await queue.enqueue(job, Terms(detached=True, tenant="default", view=view.to_json()))
        [held] = (await queue.claim("solo", "w", running=0, lanes=[("hi", 1)], nonce="n")).claims
        await append(redis, "solo", [Chunk(held, 2, (Piece((1, 2), "a b"),))])
        await append(redis, "solo", [Chunk(held, 4, (Piece((3, 4), " c d"),))])
        await redis.aclose()
        return held

    async def write(held: Claim, first: int) -> Status:
        redis = connect(stack.server.url)
        [status] = (await append(redis, "solo", [Chunk(held, first, (Piece((first,), "x"),))])).chunks
        await redis.aclose()
        return status

    held = asyncio.run(begin())
    response_id = f"resp_solo.{job_id}"
    on = go_on(stack.port, response_id, 4)
    assert on.head()[0] == 200
    on.close()
    stack.redis.xdel(names.log(job_id), "0-4")
    stack.redis.hset(names.job(job_id), "n", 2)
    assert asyncio.run(write(held, 5)) is Status.GAP
    refused = go_on(stack.port, response_id, 4).reply()
    assert (refused.status, refused.error()["code"]) == (400, "invalid_event_id")
    assert go_on(stack.port, response_id).head()[0] == 200
