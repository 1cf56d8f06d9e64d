"""The Responses API through the whole path: official client, real API process, real Redis, real workers."""

import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from fastchat_q import keys
from fastchat_q.events import Piece, ToolCallDelta

from .http_client import Connection, get, post
from .scripted_worker import script
from .servers import wait_until
from .stack import Stack

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
ENDLESS: dict[str, Any] = {
    "model": "echo",
    "input": "on and on",
    "max_output_tokens": 100_000,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def client(echo_stack: Stack) -> Iterator[openai.OpenAI]:
    with echo_stack.client() as client:
        yield client


def record_of(response: Response) -> str:
    """The key of its job's record."""
    slug, _, job_id = response.id.removeprefix("resp_").rpartition(".")
    return keys.model_keys(slug).job(job_id)


def said_by(job: str) -> list[tuple[str, Any]]:
    """(role, content) of the turns of a job that the scripted worker has shown."""
    return [(turn["role"], turn.get("content")) for turn in json.loads(job)["messages"]]


def test_input_tokens_are_those_that_the_response_has(echo_stack: Stack, client: openai.OpenAI) -> None:
    first = client.responses.create(model="echo", input="one two three")
    more: dict[str, Any]
    for more in (
        {},
        {"previous_response_id": first.id},
        {"instructions": "Be brief.", "max_output_tokens": 99, "stream": True},
    ):
        body = {"model": "echo", "input": "four five", **more}
        reply = post(echo_stack.port, body, path=f"{PATH}/input_tokens")
        assert reply.status == 200, reply.body
        usage = client.responses.create(**{**body, "stream": False}).usage
        assert usage is not None
        assert reply.json() == {"object": "response.input_tokens", "input_tokens": usage.input_tokens}
    assert client.responses.input_tokens.count(model="echo", input="four five").input_tokens > 0


def test_compact_is_not_there(echo_stack: Stack) -> None:
    reply = post(echo_stack.port, {"model": "echo", "input": "hello"}, path=f"{PATH}/compact")
    assert (reply.status, reply.error()["code"]) == (404, "not_found")


def test_a_response_has_openais_shape_to_the_field(echo_stack: Stack) -> None:
    reply = post(echo_stack.port, {"model": "echo", "input": "the quick  brown 🦊"}, path=PATH)
    assert reply.status == 200, reply.body
    body = reply.json()
    Response.model_validate(body, strict=True)
    job_id = reply.headers["x-job-id"]
    assert body.pop("id") == f"resp_{job_id}"
    assert isinstance(body.pop("created_at"), int)
    assert isinstance(body.pop("completed_at"), int)
    assert body == {
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "model": "echo",
        "output": [
            {
                "id": f"msg_0_{job_id}",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "the quick  brown 🦊", "annotations": [], "logprobs": []}],
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 4,
            "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 8,
        },
        "user": None,
    }


def test_what_is_retrieved_is_what_was_answered(client: openai.OpenAI) -> None:
    answered = client.responses.create(
        model="echo",
        input="one two three four",
        instructions="Be brief.",
        max_output_tokens=2,
        metadata={"a": "b"},
        temperature=0.5,
        top_p=0.9,
        user="u",
        safety_identifier="s",
        prompt_cache_key="p",
        max_tool_calls=3,
        parallel_tool_calls=False,
        truncation="disabled",
    )
    assert (answered.status, answered.output_text) == ("incomplete", "one two")
    assert answered.incomplete_details is not None
    assert answered.incomplete_details.reason == "max_output_tokens"
    assert (answered.instructions, answered.metadata, answered.user) == ("Be brief.", {"a": "b"}, "u")
    assert (answered.temperature, answered.top_p, answered.max_tool_calls) == (0.5, 0.9, 3)
    assert client.responses.retrieve(answered.id) == answered


def test_a_stream_ends_with_what_is_retrieved_and_its_pieces_add_up(client: openai.OpenAI) -> None:
    events: list[Any] = list(client.responses.create(model="echo", input="a b c d", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "a b c d"
    assert events[-1].type == "response.completed"
    assert client.responses.retrieve(events[-1].response.id) == events[-1].response
    again: list[Any] = list(client.responses.retrieve(events[-1].response.id, stream=True))
    assert again == events


def test_the_helpers_of_the_official_client_work(client: openai.OpenAI) -> None:
    with client.responses.stream(model="echo", input="a b c d") as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == "a b c d"
    with client.responses.stream(response_id=final.id, starting_after=4) as stream:
        kinds = [event.type for event in stream]
    assert kinds[-1] == "response.completed"


async def test_the_asynchronous_client_works(echo_stack: Stack) -> None:
    base = f"http://127.0.0.1:{echo_stack.port}/v1"
    key = echo_stack.client().api_key
    async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as client:
        stream = await client.responses.create(model="echo", input="a b", stream=True)
        last = [event async for event in stream][-1]
        assert last.type == "response.completed"
        items = [item async for item in client.responses.input_items.list(last.response.id)]
        assert len(items) == 1
        started = await client.responses.create(**ENDLESS, background=True)
        cancelled = await client.responses.cancel(started.id)
        assert cancelled.status == "cancelled"
        await client.responses.delete(started.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(started.id)


def test_a_response_in_the_background_is_queued_then_grows_and_is_kept(client: openai.OpenAI) -> None:
    started = client.responses.create(model="echo", input=" ".join(["word"] * 60), background=True)
    assert (started.status, started.background, started.output) == ("queued", True, [])
    seen = []

    def done() -> bool:
        seen.append(client.responses.retrieve(started.id))
        return seen[-1].status == "completed"

    wait_until(done, "it is completed")
    growing = [response for response in seen if response.status == "in_progress" and response.output]
    assert growing, "what is there so far is shown"
    assert growing[0].output[0].status == "in_progress"
    assert seen[-1].output_text == " ".join(["word"] * 60)
    assert seen[-1].completed_at is not None


def test_cancelling_keeps_what_came_and_a_second_time_changes_nothing(echo_stack: Stack, client: openai.OpenAI) -> None:
    started = client.responses.create(**ENDLESS, background=True)
    wait_until(lambda: client.responses.retrieve(started.id).output_text.count("on") > 5, "it says something")
    cancelled = client.responses.cancel(started.id)
    assert cancelled.status == "cancelled"
    assert cancelled.output_text.startswith("on and on")
    assert cancelled.output[0].status == "incomplete"
    assert client.responses.cancel(started.id) == cancelled == client.responses.retrieve(started.id)
    events: list[Any] = list(client.responses.retrieve(started.id, stream=True))
    assert (events[-1].type, events[-1].response) == ("response.incomplete", cancelled)
    wait_until(lambda: echo_stack.live("echo") == 0, "nothing runs on")


def test_only_what_goes_on_in_the_background_is_cancelled(client: openai.OpenAI) -> None:
    answered = client.responses.create(model="echo", input="a")
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        client.responses.cancel(answered.id)


def test_a_background_response_goes_on_when_its_stream_is_left(echo_stack: Stack, client: openai.OpenAI) -> None:
    words = " ".join(f"w{number}" for number in range(300))
    with client.responses.create(model="echo", input=words, background=True, stream=True) as stream:
        kinds = []
        for event in stream:
            kinds.append(event.type)
            if event.type == "response.created":
                response_id = event.response.id
            if event.type == "response.output_text.delta":
                last = event.sequence_number
                break
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    wait_until(lambda: client.responses.retrieve(response_id).status == "completed", "done without a reader")
    rest: list[Any] = list(client.responses.retrieve(response_id, stream=True, starting_after=last))
    assert [event.sequence_number for event in rest] == list(range(last + 1, last + 1 + len(rest)))
    assert rest[-1].response.output_text == words


def test_a_response_that_is_not_stored_cannot_be_had_again(echo_stack: Stack, client: openai.OpenAI) -> None:
    answered = client.responses.create(model="echo", input="a", store=False)
    assert answered.output_text == "a"
    calls = (client.responses.retrieve, client.responses.delete, client.responses.input_items.list)
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call(answered.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="echo", input="b", previous_response_id=answered.id)
    assert refused.value.code == "previous_response_not_found"
    assert 0 < echo_stack.redis.ttl(record_of(answered)) <= 120
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="echo", input="b", background=True, store=False)
    assert refused.value.param == "background"


def test_a_stored_response_is_kept_for_a_day_and_anew_when_it_is_gone_on_with(
    echo_stack: Stack, client: openai.OpenAI
) -> None:
    first = client.responses.create(model="echo", input="a")
    assert 86_000 < echo_stack.redis.ttl(record_of(first)) <= 86_400
    echo_stack.redis.expire(record_of(first), 100)
    client.responses.create(model="echo", input="b", previous_response_id=first.id)
    assert 86_000 < echo_stack.redis.ttl(record_of(first)) <= 86_400


def test_a_deleted_response_leaves_nothing_of_what_was_said(echo_stack: Stack, client: openai.OpenAI) -> None:
    answered = client.responses.create(model="echo", input="a secret")
    reply = post(echo_stack.port, b"", path=f"{PATH}/{answered.id}", method="DELETE", headers={"content-type": None})
    assert (reply.status, reply.json()) == (200, {"id": answered.id, "object": "response", "deleted": True})
    for path in (PATH, "/v1/jobs"):
        events = "events" if path == "/v1/jobs" else "input_items"
        assert get(echo_stack.port, f"{path}/{answered.id.removeprefix('resp_')}/{events}").status == 404
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.retrieve(answered.id)
    assert missing.value.param == "id"
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(answered.id)
    left = echo_stack.redis.hgetall(record_of(answered))
    assert "secret" not in str(left)
    assert echo_stack.redis.ttl(record_of(answered)) <= 120


def test_deleting_a_running_response_ends_it_and_its_stream(echo_stack: Stack, client: openai.OpenAI) -> None:
    with client.responses.create(**ENDLESS, background=True, stream=True) as stream:
        events = iter(stream)
        response_id = next(events).response.id  # type: ignore[union-attr]
        next(event for event in events if event.type == "response.output_text.delta")
        client.responses.delete(response_id)
        last = list(events)[-1]
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")  # type: ignore[union-attr]
    wait_until(lambda: echo_stack.live("echo") == echo_stack.running("echo") == 0, "it is not submitted again")


def test_input_items_come_in_pages_and_either_order(client: openai.OpenAI) -> None:
    texts = [f"number {number}" for number in range(7)]
    given: Any = [{"role": "user", "content": text} for text in texts]
    given[2] = {"role": "user", "content": [{"type": "input_text", "text": texts[2]}], "id": "msg_mine"}
    answered = client.responses.create(model="echo", input=given)
    items: Any = list(client.responses.input_items.list(answered.id, limit=3, order="asc"))
    assert [item.content[0].text for item in items] == texts
    assert items[2].id == "msg_mine"
    assert len({item.id for item in items}) == 7
    assert [item.id for item in client.responses.input_items.list(answered.id)] == [item.id for item in items][::-1]
    page = client.responses.input_items.list(answered.id, after=items[4].id, order="asc")
    assert [item.id for item in page.data] == [items[5].id, items[6].id]
    with pytest.raises(openai.BadRequestError):
        client.responses.input_items.list(answered.id, after="msg_other")


def test_a_conversation_of_three_turns_reaches_the_model_whole_and_instructions_are_not_carried_on(
    scripted_stack: Stack,
) -> None:
    with scripted_stack.client() as client:
        said = (Piece((1,), reasoning="Hm."), Piece((2,), "Fine."))
        first = client.responses.create(model="script", input=script(*said), instructions="Be rude.")
        call = Piece((1,), tool_calls=(ToolCallDelta(0, '{"city": "Rome"}', "call_1", "get_weather"),))
        second = client.responses.create(
            model="script",
            input=script(call, finish="tool_calls"),
            previous_response_id=first.id,
            tools=[WEATHER],  # type: ignore[list-item]
        )
        third = client.responses.create(
            model="script",
            input=[
                {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
                {"role": "user", "content": "job"},
            ],
            previous_response_id=second.id,
            instructions="Be kind.",
        )
        fourth = client.responses.create(model="script", input="job", previous_response_id=first.id)
    turns = json.loads(third.output_text)["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant", "tool", "user"]
    assert turns[0]["content"] == "Be kind."
    assert (turns[2]["reasoning_content"], turns[2]["content"]) == ("Hm.", "Fine.")
    assert turns[4]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert (turns[5]["content"], turns[5]["tool_call_id"]) == ("sunny", "call_1")
    assert [role for role, _ in said_by(fourth.output_text)] == ["user", "assistant", "user"], "a branch"


def test_items_are_sent_back_by_hand_or_by_their_ids(scripted_stack: Stack) -> None:
    with scripted_stack.client() as client:
        said = (Piece((1,), reasoning="Hm."), Piece((2,), "Fine."))
        first = client.responses.create(model="script", input=script(*said))
        own = [item.model_dump() for item in first.output]
        ask: Any = {"role": "user", "content": "job"}
        by_hand = client.responses.create(model="script", input=[{"role": "user", "content": "x"}, *own, ask])  # type: ignore[list-item]
        references: Any = [{"type": "item_reference", "id": item.id} for item in first.output]
        by_id = client.responses.create(model="script", input=[{"role": "user", "content": "x"}, *references, ask])
        assert json.loads(by_hand.output_text)["messages"] == json.loads(by_id.output_text)["messages"]
        assert json.loads(by_id.output_text)["messages"][1]["reasoning_content"] == "Hm."
        nothing: Any = [{"type": "item_reference", "id": "msg_0_script.01ARZ3NDEKTSV4RRFFQ69G5FAV"}]
        with pytest.raises(openai.BadRequestError) as missing:
            client.responses.create(model="script", input=nothing)
        assert missing.value.param == "input[0].id"


def test_sealed_reasoning_comes_back_as_what_was_thought(scripted_stack: Stack) -> None:
    with scripted_stack.client() as client:
        said = (Piece((1,), reasoning="Hm."), Piece((2,), "Fine."))
        first = client.responses.create(
            model="script", input=script(*said), store=False, include=["reasoning.encrypted_content"]
        )
        thought, message = (item.model_dump() for item in first.output)
        thought["content"] = None
        again = client.responses.create(model="script", input=[thought, message, {"role": "user", "content": "job"}])
        assert json.loads(again.output_text)["messages"][0]["reasoning_content"] == "Hm."
        thought["encrypted_content"] = "gAAAA"
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="script", input=[thought, message])
        assert refused.value.param == "input[0].encrypted_content"


def test_a_response_that_failed_or_has_not_ended_is_not_gone_on_with(client: openai.OpenAI) -> None:
    started = client.responses.create(**ENDLESS, background=True)
    for _ in range(2):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="echo", input="b", previous_response_id=started.id)
        assert refused.value.code == "previous_response_not_completed"
        assert refused.value.param == "previous_response_id"
        client.responses.cancel(started.id)
    cut = client.responses.create(model="echo", input="a b c", max_output_tokens=1)
    assert client.responses.create(model="echo", input="b", previous_response_id=cut.id).output_text == "b"


@pytest.mark.parametrize("previous", ["nonsense", "resp_nonsense", "resp_echo.01ARZ3NDEKTSV4RRFFQ69G5FAV"])
def test_a_previous_response_that_is_not_there_is_400(client: openai.OpenAI, previous: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="echo", input="b", previous_response_id=previous)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(previous)


def test_a_conversation_grows_up_to_the_limit_of_a_body(client: openai.OpenAI) -> None:
    long: dict[str, Any] = {"model": "echo", "input": "x " * 60_000, "max_output_tokens": 1}
    previous = client.responses.create(**long)
    for _ in range(7):
        previous = client.responses.create(**long, previous_response_id=previous.id)
    with pytest.raises(openai.APIStatusError) as refused:
        client.responses.create(**long, previous_response_id=previous.id)
    assert (refused.value.status_code, refused.value.param) == (413, "previous_response_id")


def test_an_answer_of_a_chat_is_no_response(echo_stack: Stack, client: openai.OpenAI) -> None:
    chat = post(echo_stack.port, {"model": "echo", "messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(f"resp_{chat.headers['x-job-id']}")


def test_responses_are_their_tenants_alone(echo_stack: Stack) -> None:
    mine = echo_stack.client()
    key = echo_stack.make_key("--tenant", "other")
    theirs = openai.OpenAI(base_url=mine.base_url, api_key=key, max_retries=0)
    answered = theirs.responses.create(model="echo", input="a")
    another = openai.OpenAI(base_url=mine.base_url, api_key=echo_stack.make_key("--tenant", "third"), max_retries=0)
    responses = another.responses
    for call in (responses.retrieve, responses.delete, responses.cancel, responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            call(answered.id)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(answered.id, stream=True)
    with pytest.raises(openai.BadRequestError):
        responses.create(model="echo", input="b", previous_response_id=answered.id)
    with pytest.raises(openai.BadRequestError):
        responses.create(model="echo", input=[{"type": "item_reference", "id": answered.output[0].id}])
    assert theirs.responses.retrieve(answered.id) == answered


def test_tools_are_streamed_as_calls_with_their_arguments(tiny_stack: Stack) -> None:
    ask: dict[str, Any] = {
        "model": "tiny",
        "input": "What is the weather in Rome?",
        "tools": [WEATHER],
        "temperature": 0,
    }
    with tiny_stack.client() as client:
        whole = client.responses.create(**ask)
        events: list[Any] = list(client.responses.create(**ask, stream=True))
        [call] = [item for item in whole.output if item.type == "function_call"]
        assert (call.name, json.loads(call.arguments), call.status) == ("get_weather", {"city": "Rome"}, "completed")
        arguments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(arguments) == call.arguments
        [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert done.arguments == call.arguments
        streamed = events[-1].response.output[-1]
        answer = client.responses.create(
            model="tiny",
            temperature=0,
            tools=[WEATHER],  # type: ignore[list-item]
            previous_response_id=events[-1].response.id,
            input=[{"type": "function_call_output", "call_id": streamed.call_id, "output": '{"weather": "sunny"}'}],
        )
        assert "sunny" in answer.output_text
        named = client.responses.create(
            model="tiny",
            input="Hello!",
            tools=[WEATHER],  # type: ignore[list-item]
            tool_choice={"type": "function", "name": "get_weather"},
            max_output_tokens=400,
        )
        assert [item.type for item in named.output] == ["function_call"]


class Point(BaseModel):
    """What is to be parsed."""

    axis: Literal["x", "y"]
    positive: bool


def test_a_schema_is_followed_and_parsed(tiny_stack: Stack) -> None:
    with tiny_stack.client() as client:
        parsed = client.responses.parse(model="tiny", input="A point", text_format=Point)
        with client.responses.stream(
            model="tiny", input="A point", text_format=Point, extra_body={"seed": 7}
        ) as stream:
            streamed = stream.get_final_response()
        free = client.responses.create(
            model="tiny", input="JSON", text={"format": {"type": "json_object"}}, max_output_tokens=900
        )
    for one in (parsed, streamed):
        assert one.status == "completed"
        assert isinstance(one.output_parsed, Point)
        assert json.loads(one.output_text) == one.output_parsed.model_dump()
    assert free.output_text.lstrip().startswith("{")
    shown: Any = parsed.text
    assert (shown.format.type, shown.format.name, shown.format.strict) == ("json_schema", "Point", True)
    assert shown.format.schema_["required"] == ["axis", "positive"]


def test_log_probabilities_come_with_the_text(tiny_stack: Stack) -> None:
    with tiny_stack.client() as client:
        ask: dict[str, Any] = {
            "model": "tiny",
            "input": "Hello!",
            "temperature": 0,
            "top_logprobs": 2,
            "include": ["message.output_text.logprobs"],
        }
        answered = client.responses.create(**ask)
        events: list[Any] = list(client.responses.create(**ask, stream=True))
    found: Any = answered.output[0].content[0].logprobs  # type: ignore[union-attr]
    assert "".join(one.token for one in found).removesuffix("<|im_end|>") == answered.output_text
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in found)
    deltas = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    done = next(event for event in events if event.type == "response.output_text.done")
    assert [one.token for one in done.logprobs] == [one.token for one in found]
    assert [one.token for one in deltas] == [one.token for one in found][: len(deltas)]


def test_who_waits_is_shown_its_response_before_the_first_token(stack: Stack) -> None:
    stack.start_worker("--model", "echo", "--engine", "echo", "--slots", "1", "--token-delay-ms", "20")
    with stack.client() as client:
        running = client.responses.create(**ENDLESS, background=True)
        connection = Connection(stack.port)
        connection.send({"model": "echo", "input": "a b", "stream": True}, path=PATH)
        connection.head()
        blocks = connection.events()
        assert json.loads(next(blocks).partition("data: ")[2])["type"] == "response.created"
        assert json.loads(next(blocks).partition("data: ")[2])["type"] == "response.in_progress"
        wait_until(lambda: ": queued position=1" in connection.peek(), "its place is told")
        client.responses.cancel(running.id)
        assert "response.completed" in list(blocks)[-1]
        running = client.responses.create(**ENDLESS, background=True)
        with client.responses.create(model="echo", input="a b", stream=True) as stream:
            first = next(iter(stream))
            wait_until(lambda: stack.live("echo") == 2, "it waits")
            time.sleep(2.5)  # for comments, which the official client must not take for events
            client.responses.cancel(running.id)
            assert [first.type, [event.type for event in stream][-1]] == ["response.created", "response.completed"]


def test_an_idempotency_key_finds_the_response_as_it_is_by_now(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> Any:
        return client.responses.create(model="echo", input="a b", extra_headers={"idempotency-key": "k7"}, **fields)

    started = ask(background=True)
    wait_until(lambda: client.responses.retrieve(started.id).status == "completed", "it is done")
    assert ask(background=True) == client.responses.retrieve(started.id)


def test_an_alias_is_answered_under_its_name_and_found_by_its_model(echo_stack: Stack, client: openai.OpenAI) -> None:
    echo_stack.redis.hset(keys.ALIASES, "Chatty", '{"echo": 1}')
    wait_until(lambda: get(echo_stack.port, "/v1/models/Chatty").status == 200, "the alias is known")
    answered = client.responses.create(model="Chatty", input="a b")
    assert (answered.model, answered.id[: len("resp_echo.")]) == ("Chatty", "resp_echo.")
    assert client.responses.retrieve(answered.id) == answered
    echo_stack.redis.hdel(keys.ALIASES, "Chatty")
