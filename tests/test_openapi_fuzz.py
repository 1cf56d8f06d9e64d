"""What /openapi.json promises, tried out on every operation with requests that fit it and requests that do not."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
from fastchat_q.api.openapi import ANTHROPIC_ERROR, ERROR
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, GenerationMode

from .conftest import shared_stack
from .http_client import get, post
from .stack import API_KEY, Stack

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tool's
WITH_A_BODY, WITHOUT = 25, 6
"""Requests for an operation and a mode."""
CHATS = ("/v1/chat/completions", "/v1/messages")
MODELS = {"/v1/embeddings": "embedder", "/v1/rerank": "ranker"}


@pytest.fixture(scope="module")
def served() -> Iterator[Stack]:
    """A server with a worker of each kind, for chats an echo."""
    with shared_stack("--model", "echo", "--engine", "echo", "--token-delay-ms", "0") as stack:
        for model, kind in (("script", "chat"), ("embedder", "embed"), ("ranker", "rerank")):
            stack.start_scripted_worker(model, kind)
        stack.redis.set("fuzz:job", post(stack.port, chat()).headers["x-job-id"])
        yield stack


def chat() -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


def operations(stack: Stack) -> list[APIOperation]:
    schema = schemathesis.openapi.from_url(f"{stack.base}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_whatever_is_sent_the_answer_is_one_that_the_document_names_and_no_5xx(
    served: Stack, mode: GenerationMode
) -> None:
    tried, answers = 0, dict[int, int]()
    job_id = served.redis.get("fuzz:job")
    with requests.Session() as session:
        session.headers["authorization"] = f"Bearer {API_KEY}"
        for operation in operations(served):

            @settings(
                max_examples=WITH_A_BODY if operation.body else WITHOUT,
                derandomize=True,
                database=None,
                deadline=None,
                phases=(Phase.explicit, Phase.generate),
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode), aimed=st.sampled_from(("", "some", "whole")))
            def send(case: Case, aimed: str) -> None:
                nonlocal tried
                tried += 1
                if aimed:  # else it would hardly ever name what there is, or get beyond its first message
                    aim(case, job_id, whole=aimed == "whole")
                response = case.call(base_url=served.base, session=session, timeout=30)
                answers[response.status_code] = answers.get(response.status_code, 0) + 1
                check(case, response)

            with contextlib.suppress(Unsatisfiable):  # nothing in it can be made wrong
                send()
    assert tried > 100
    assert answers.get(200), answers
    assert answers.get(400), answers
    assert get(served.port, "/readyz").status == 200


def aim(case: Case, job_id: str, whole: bool) -> None:
    """Names a model and a job that there are; ``whole``: a model that can do everything, asked for something."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODELS.get(case.operation.path, "echo")
        if whole and case.operation.path in CHATS:
            case.body |= {"model": "script", "messages": [{"role": "user", "content": "job"}]}
        if case.body.get("ignore_eos") is True:
            case.body["max_tokens"] = case.body["max_completion_tokens"] = 50  # an echo has no end of its own
    for name, value in (("model", "echo"), ("job_id", job_id)):
        if name in case.path_parameters:
            case.path_parameters[name] = value


def check(case: Case, response: Any) -> None:
    """Fails if an answer is none that the document names, or an error of another shape."""
    status, shown = response.status_code, f"{case.as_curl_command()}\n{response.status_code} {response.text[:1000]}"
    assert status < 500, shown
    documented = {int(code) for code in case.operation.definition.raw["responses"]}
    assert status in documented | {405, 431}, shown
    media = response.headers.get("content-type", [""])[0].partition(";")[0]
    if status >= 400:
        assert media == "application/json", shown
        jsonschema.validate(response.json(), ANTHROPIC_ERROR if case.operation.path in ANTHROPIC else ERROR)
        assert response.json()["error"]["type"] in TYPES, shown
    elif status == 200:
        assert media in case.operation.definition.raw["responses"]["200"]["content"], shown
    assert response.headers["x-request-id"], shown


ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
TYPES = {
    "invalid_request_error",
    "permission_denied",
    "rate_limit_error",
    "insufficient_quota",
    "not_found_error",
    "authentication_error",
    "permission_error",
    "request_too_large",
}


def test_the_document_says_what_each_operation_needs_and_answers(served: Stack) -> None:
    document = get(served.port, "/openapi.json", authorization=None).json()
    assert document["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    ids = [operation["operationId"] for _, operation in each(document)]
    assert len(ids) == len(set(ids))
    for path, operation in each(document):
        assert operation["summary"], path
        if path.startswith("/v1/"):
            assert operation["security"] == [{"bearer": []}], path
            for status in ("401", "403", "500", "503"):
                content = operation["responses"][status]["content"]["application/json"]
                kind = "AnthropicError" if path in ANTHROPIC else "Error"
                assert content["schema"] == {"$ref": f"#/components/schemas/{kind}"}, path
        if "requestBody" in operation:
            assert {"400", "413", "415", "429"} <= operation["responses"].keys(), path
    chats = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chats["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert (
        post(served.port, chats["requestBody"]["content"]["application/json"]["example"] | {"model": "echo"}).status
        == 200
    )


def each(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            yield path, operation
