"""Embeddings and rankings through the whole path, from an engine that computes small vectors."""

import base64
import struct
from typing import Any

import openai
import pytest

from fastchat_q import keys

from .http_client import Connection, get, post
from .scripted_worker import SIZE, score, vector
from .servers import wait_until
from .stack import Stack

EMBEDDINGS = "/v1/embeddings"
RERANK = "/v1/rerank"
DOCUMENTS = ["the moon", "a cat on the moon", "a cat", "cat moon dog"]


def embeddings(stack: Stack, **fields: Any) -> Any:
    return post(stack.port, {"model": "embedder", "input": "hi", **fields}, path=EMBEDDINGS)


def rerank(stack: Stack, **fields: Any) -> Any:
    return post(stack.port, {"model": "ranker", "query": "cat moon", "documents": DOCUMENTS, **fields}, path=RERANK)


def test_embeddings_have_openais_shape_to_the_field(scripted_stack: Stack) -> None:
    reply = embeddings(scripted_stack, input=["a", "b"], encoding_format="float", user="u")
    assert reply.status == 200
    assert reply.headers["x-job-id"].startswith("embedder.")
    assert reply.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": vector("a")},
            {"object": "embedding", "index": 1, "embedding": vector("b")},
        ],
        "model": "embedder",
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }


@pytest.mark.parametrize("encoding", ["base64", "float", None])
@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("one text", ["one text"]),
        (["a", "b", "a"], ["a", "b", "a"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_the_official_client_gets_a_vector_for_each_input_in_each_encoding(
    scripted_stack: Stack, given: Any, inputs: list[Any], encoding: Any
) -> None:
    """It asks for base64 by itself when nothing is said, and decodes it."""
    asked = {"encoding_format": encoding} if encoding else {}
    with scripted_stack.client() as client:
        answer = client.embeddings.create(model="embedder", input=given, **asked)
    got = [one.embedding for one in answer.data]
    if encoding == "base64":
        got = [list(struct.unpack(f"<{SIZE}f", base64.b64decode(str(one)))) for one in got]
    assert got == [vector(one) for one in inputs]
    assert [one.index for one in answer.data] == list(range(len(inputs)))


def test_dimensions_and_the_batch_lane_reach_the_worker(scripted_stack: Stack) -> None:
    reply = embeddings(scripted_stack, dimensions=3, service_tier="flex")
    assert reply.json()["data"][0]["embedding"] == vector("hi")[:3]
    job = keys.model_keys("embedder").job(reply.headers["x-job-id"].removeprefix("embedder."))
    assert scripted_stack.redis.hget(job, "lane") == "lo"


def test_2048_inputs_are_one_job_and_2049_are_refused(scripted_stack: Stack) -> None:
    inputs = [f"text {n}" for n in range(2048)]
    before = len(scripted_stack.records("embedder"))
    reply = embeddings(scripted_stack, input=inputs)
    assert [one["embedding"] for one in reply.json()["data"]] == [vector(one) for one in inputs]
    assert len(scripted_stack.records("embedder")) == before + 1
    refused = embeddings(scripted_stack, input=[*inputs, "one more"])
    assert (refused.status, refused.error()["param"]) == (400, "input")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [1, 2.5]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [[1], "a"]}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"normalize": True}, "normalize"),
        ({"model": "script"}, "model"),
        ({"model": "ranker"}, "model"),
    ],
)
def test_a_wrong_embedding_request_is_refused_by_name(scripted_stack: Stack, fields: Any, param: str) -> None:
    reply = embeddings(scripted_stack, **fields)
    assert (reply.status, reply.error()["type"]) == (400, "invalid_request_error")
    assert reply.error()["param"] == param
    assert param in reply.error()["message"]


def test_a_model_for_vectors_takes_no_chat_and_says_what_it_takes(scripted_stack: Stack) -> None:
    reply = post(scripted_stack.port, {"model": "embedder", "messages": [{"role": "user", "content": "hi"}]})
    assert (reply.status, reply.error()["param"], reply.error()["code"]) == (400, "model", "model_kind")
    assert EMBEDDINGS in reply.error()["message"]
    other = post(scripted_stack.port, {"model": "script", "input": "x"}, path=EMBEDDINGS).error()["message"]
    assert "POST /v1/chat/completions, /v1/responses, /v1/messages" in other
    kinds = {model["id"]: model["kind"] for model in get(scripted_stack.port, "/v1/models").json()["data"]}
    assert kinds == {"script": "chat", "embedder": "embed", "ranker": "rerank"}


def test_documents_come_in_the_order_of_their_relevance(scripted_stack: Stack) -> None:
    reply = rerank(scripted_stack)
    body = reply.json()
    assert body.pop("id").startswith("rerank-")
    assert body == {
        "model": "ranker",
        "results": [
            {"index": 1, "relevance_score": 1.0, "document": {"text": "a cat on the moon"}},
            {"index": 3, "relevance_score": 1.0, "document": {"text": "cat moon dog"}},
            {"index": 0, "relevance_score": 0.5, "document": {"text": "the moon"}},
            {"index": 2, "relevance_score": 0.5, "document": {"text": "a cat"}},
        ],
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
    assert [score("cat moon", DOCUMENTS[one["index"]]) for one in body["results"]] == [1.0, 1.0, 0.5, 0.5]


def test_a_ranking_can_be_cut_and_without_its_documents(scripted_stack: Stack) -> None:
    documents = [{"text": document} for document in DOCUMENTS]
    reply = rerank(scripted_stack, documents=documents, top_n=1, return_documents=False)
    assert reply.json()["results"] == [{"index": 1, "relevance_score": 1.0}]
    assert len(rerank(scripted_stack, top_n=0).json()["results"]) == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"),
        ({"query": ["a"]}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": ["a", 1]}, "documents[1]"),
        ({"documents": [{"text": "a", "image": "b"}]}, "documents[0]"),
        ({"documents": ["a"] * 2049}, "documents"),
        ({"top_n": -1}, "top_n"),
        ({"max_tokens_per_doc": 5}, "max_tokens_per_doc"),
        ({"model": "embedder"}, "model"),
    ],
)
def test_a_wrong_ranking_request_is_refused_by_name(scripted_stack: Stack, fields: Any, param: str) -> None:
    reply = rerank(scripted_stack, **fields)
    assert (reply.status, reply.error()["param"]) == (400, param)


@pytest.mark.parametrize(("path", "ask"), [(EMBEDDINGS, embeddings), (RERANK, rerank)])
def test_keys_and_jobs_are_as_in_chats(scripted_stack: Stack, path: str, ask: Any) -> None:
    body = (
        {"model": "embedder", "input": "x"}
        if ask is embeddings
        else {"model": "ranker", "query": "a", "documents": ["b"]}
    )
    headers = {"idempotency-key": f"vectors {path}"}
    first, second = (post(scripted_stack.port, body, path=path, headers=headers) for _ in range(2))
    assert first.json() == second.json()
    job_id = first.headers["x-job-id"]
    assert second.headers["x-job-id"] == job_id
    other = post(scripted_stack.port, {**body, "user": "another"}, path=path, headers=headers)
    assert (other.status, other.error()["code"]) == (422, "idempotency_key_reused")
    assert get(scripted_stack.port, f"/v1/jobs/{job_id}").json()["state"] == "succeeded"
    events = get(scripted_stack.port, f"/v1/jobs/{job_id}/events")
    assert (events.status, events.error()["type"]) == (400, "invalid_request_error")
    assert post(scripted_stack.port, body, path=path, headers={"authorization": None}).status == 401


def test_a_client_that_leaves_before_its_embeddings_come_cancels_them(stack: Stack) -> None:
    worker = stack.start_scripted_worker("embedder", "embed")
    worker.signal(19)  # SIGSTOP: it takes the job and does not answer
    connection = Connection(stack.port)
    connection.send({"model": "embedder", "input": "x"}, path=EMBEDDINGS)
    wait_until(lambda: stack.live("embedder") == 1, "the job is there")
    connection.close()
    wait_until(lambda: stack.live("embedder") == 0, "it is cancelled")
    worker.signal(18)


def test_the_official_client_raises_its_own_exceptions(scripted_stack: Stack) -> None:
    with scripted_stack.client() as client, pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="embeddr", input="x")
