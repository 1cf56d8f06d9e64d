"""Web pages of other origins: off unless set; preflights need no key, and every answer can be read by the page."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from fastchat_q.settings import Settings

from .http_client import CHAT, Connection, Reply, get, post
from .servers import free_port
from .stack import Stack, running_stack

PAGE, STRANGER = "https://chat.example.org", "https://elsewhere.example"
HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello you"}]}
EXPOSED = {"x-request-id", "x-job-id", "retry-after", "x-ratelimit-remaining-tokens", "openai-processing-ms"}


@pytest.fixture(scope="module")
def folder_of_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("c")


@pytest.fixture(scope="module")
def pages(folder_of_module: Path) -> Iterator[tuple[Stack, int, int]]:
    """A stack without the setting, and the ports of two API servers with it: for one origin, and for all."""
    with running_stack(folder_of_module) as stack:
        stack.start_worker("--model", "echo", "--engine", "echo")
        stack.start_api(some := free_port(), FASTCHAT_Q_CORS_ORIGINS=f"http://localhost:3000, {PAGE}")
        stack.start_api(every := free_port(), FASTCHAT_Q_CORS_ORIGINS="*")
        yield stack, some, every


def preflight(port: int, origin: str, method: str = "POST", path: str = CHAT) -> Reply:
    """What a browser asks before it sends JSON and a key to another origin."""
    asked: dict[str, str | None] = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-os,idempotency-key",
    }
    unasked = {"authorization": None, "content-type": None, "content-length": None}
    return post(port, b"", method="OPTIONS", path=path, headers=asked | unasked)


def test_without_the_setting_no_page_may_ask(pages: tuple[Stack, int, int]) -> None:
    port = pages[0].port
    reply = post(port, HELLO, headers={"origin": PAGE})
    assert reply.status == 200
    assert not [name for name in (*reply.headers, *preflight(port, PAGE).headers) if "access-control" in name]


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_a_preflight_needs_no_key_and_allows_what_clients_send(pages: tuple[Stack, int, int], method: str) -> None:
    reply = preflight(pages[1], PAGE, method)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (204, PAGE)
    assert method in reply.headers["access-control-allow-methods"]
    assert "idempotency-key" in reply.headers["access-control-allow-headers"]
    assert "Origin" in reply.headers["vary"]
    assert "access-control-allow-credentials" not in reply.headers


def test_a_page_of_another_origin_is_refused(pages: tuple[Stack, int, int]) -> None:
    reply = preflight(pages[1], STRANGER)
    assert (reply.status, reply.error()["code"]) == (403, "origin_not_allowed")
    for answer in (reply, post(pages[1], HELLO, headers={"origin": STRANGER})):
        assert "access-control-allow-origin" not in answer.headers


def test_every_origin_is_allowed_without_credentials(pages: tuple[Stack, int, int]) -> None:
    for reply in (preflight(pages[2], STRANGER), post(pages[2], HELLO, headers={"origin": STRANGER})):
        assert reply.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in reply.headers


def test_a_page_reads_answers_their_headers_and_errors(pages: tuple[Stack, int, int]) -> None:
    port, origin = pages[1], {"origin": PAGE}
    replies = {
        200: post(port, HELLO, headers=origin),
        400: post(port, b"{", headers=origin),
        401: post(port, HELLO, headers={**origin, "authorization": None}),
        404: post(port, {**HELLO, "model": "nobody"}, headers=origin),
        405: get(port, CHAT, **origin),
        413: post(port, b" " * 2**21, headers=origin),
        415: post(port, b"x", headers={**origin, "content-type": "text/plain"}),
    }
    for status, reply in replies.items():
        assert reply.status == status
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert {name.strip() for name in reply.headers["access-control-expose-headers"].split(",")} >= EXPOSED
        assert reply.headers["x-request-id"]


def test_an_answer_that_nobody_expected_can_be_read_by_a_page_too(pages: tuple[Stack, int, int]) -> None:
    stack, port, _ = pages
    public_id = post(port, HELLO).headers["x-job-id"]
    model, _, name = public_id.partition(".")
    stack.redis.hset(f"fq:{{{model}}}:j:{name}", "view", "no json")
    reply = get(port, f"/v1/jobs/{public_id}/events", origin=PAGE)
    assert (reply.status, reply.error()["type"]) == (500, "server_error")
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert reply.headers["x-request-id"]


def test_a_page_reads_a_stream(pages: tuple[Stack, int, int]) -> None:
    connection = Connection(pages[1])
    connection.send({**HELLO, "stream": True}, headers={"origin": PAGE, "sec-fetch-mode": "cors"})
    status, headers = connection.head()
    assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
    assert headers["content-type"].startswith("text/event-stream")
    assert list(connection.events())[-1] == "data: [DONE]"


@pytest.mark.parametrize("wrong", ["example.org", "https://a.b/path", "https://a.b/", "https://*.b", "null"])
def test_what_is_no_origin_stops_the_server_at_its_start(wrong: str) -> None:
    with pytest.raises(ValidationError, match="no origin"):
        Settings(cors_origins=wrong)
