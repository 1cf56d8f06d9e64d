"""What HTTP itself allows: methods, heads and bodies of every kind get an answer in OpenAI's shape, or none at all."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fastchat_q.api.guard import check_json
from fastchat_q.api.protocol import MAX_HEAD_BYTES

from fastchat_q.errors import InvalidRequestError

from .http_client import CHAT, Connection, get, post
from .servers import free_port
from .stack import API_KEY, Stack, running_stack

HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {API_KEY}\r\ncontent-type: application/json\r\n"
COMPLETIONS = HEAD.replace(CHAT, "/v1/completions").encode()


def raw(port: int, *parts: bytes) -> Connection:
    """Sends bytes as they are, part by part."""
    connection = Connection(port)
    for part in parts:
        connection.socket.sendall(part)
    return connection


@pytest.fixture
def impatient(folder: Path) -> Iterator[Stack]:
    """A stack whose API server waits half a second for a body."""
    with running_stack(folder) as stack:
        stack.start_api(port := free_port(), FASTCHAT_Q_BODY_TIMEOUT_S="0.5")
        stack.port = port
        yield stack


@pytest.mark.parametrize("path", ["/", "/nothing", "/v1/nothing", "/v1", "/v1/chat", "/%0d%0ax:y", "/%ff"])
def test_an_unknown_path_is_404_in_openais_shape(echo_stack: Stack, path: str) -> None:
    reply = get(echo_stack.port, path)
    assert (reply.status, reply.error()["code"]) == (404, "not_found")
    assert reply.headers["x-request-id"].startswith("req_")
    assert "x" not in reply.headers


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "OPTIONS, POST"),
        ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"),
        ("PATCH", "/v1/models/echo", "GET, HEAD, OPTIONS"),
        ("PUT", "/healthz", "GET, HEAD, OPTIONS"),
        ("HEAD", "/v1/jobs/echo.x/events", "GET, OPTIONS"),
    ],
)
def test_another_method_is_405_and_allow_names_those_there_are(
    echo_stack: Stack, method: str, path: str, allowed: str
) -> None:
    connection = Connection(echo_stack.port)
    connection.send(b"{}", method=method, path=path)
    status, headers = connection.head()
    assert (status, headers["allow"]) == (405, allowed)
    assert headers["content-type"] == "application/json"


def test_options_tells_the_methods_and_needs_no_key(echo_stack: Stack) -> None:
    reply = post(echo_stack.port, b"", method="OPTIONS", headers={"authorization": None, "content-length": None})
    assert (reply.status, reply.headers["allow"]) == (204, "OPTIONS, POST")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", "/v1/models/echo"])
def test_head_is_get_without_the_body(echo_stack: Stack, path: str) -> None:
    connection = Connection(echo_stack.port)
    connection.send(b"", method="HEAD", path=path)
    status, headers = connection.head()
    whole = get(echo_stack.port, path)
    assert (status, headers["content-length"]) == (200, str(len(whole.body)))
    connection.send(b"", method="GET", path="/healthz")
    assert connection.reply().json() == {"status": "ok"}, "no body came in between"


def test_a_slash_at_the_end_of_a_path_changes_nothing(echo_stack: Stack) -> None:
    assert post(echo_stack.port, HELLO, path=CHAT + "/").status == 200
    assert get(echo_stack.port, "/v1/models/", authorization=None).status == 401


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{not json", "property name"),
        (b"\xff\xfe", "UTF-8 at byte 0"),
        (b'{"model": "\xc3"}', "UTF-8"),
        ('{"model": "echo"}'.encode("utf-16"), "UTF-8"),
        (b"[" * 100_000, "too deeply"),
        (b'{"a":' * 100_000, "too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"model": "echo", "model": "other", "messages": []}', "'model' twice"),
        (b'{"model": "echo", "metadata": {"a": "1", "b": "2", "\\u0061": "3"}, "messages": []}', "'a' twice"),
        (b'{"model": "echo"} {"model": "other"}', "Extra data"),
    ],
)
def test_what_is_no_json_is_400_and_says_where(echo_stack: Stack, body: bytes, says: str) -> None:
    reply = post(echo_stack.port, body)
    error = reply.error()
    assert (reply.status, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_json")
    assert says in error["message"]


def test_a_large_body_is_checked_as_a_small_one() -> None:
    for size in (10, 400_000):
        with pytest.raises(InvalidRequestError, match="twice"):
            check_json(json.dumps({"x": "y" * size})[:-1].encode() + b', "x": 1}')


def test_an_object_of_many_names_takes_no_longer_than_others() -> None:
    """It is checked between two steps of all other requests: a search of all names for each would take minutes."""
    names = ",".join(f'"{number}":0' for number in range(200_000))
    began = time.monotonic()
    with pytest.raises(InvalidRequestError, match="'199999' twice"):
        check_json(f'{{{names},"199999":0}}'.encode())
    assert time.monotonic() - began < 10


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def test_a_chunked_body_without_a_length_is_read(echo_stack: Stack) -> None:
    head = f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode()
    body = json.dumps(HELLO).encode()
    connection = raw(echo_stack.port, head, chunked(body[:10]), chunked(body[10:]), b"0\r\n\r\n")
    assert connection.reply().status == 200


def refused_while_sending(connection: Connection) -> None:
    connection.socket.settimeout(5)
    reply = connection.reply()
    assert (reply.status, reply.error()["code"]) == (413, "request_too_large")
    assert reply.headers["connection"] == "close"


def test_a_chunked_body_is_refused_when_the_limit_is_passed_and_not_at_its_end(echo_stack: Stack) -> None:
    connection = raw(echo_stack.port, COMPLETIONS + b"transfer-encoding: chunked\r\n\r\n")
    for _ in range(2**20 // 2**16):
        connection.socket.sendall(chunked(b" " * 2**16))
    connection.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        connection.socket.recv(1)
    connection.socket.sendall(chunked(b" "))
    refused_while_sending(connection)


def test_a_body_that_is_too_large_by_its_length_is_refused_before_it_comes(echo_stack: Stack) -> None:
    connection = raw(echo_stack.port, COMPLETIONS + b"content-length: 3000000\r\n\r\n", b" " * 1000)
    refused_while_sending(connection)


def test_what_comes_of_a_refused_body_is_taken_until_its_end_and_then_the_connection_ends(echo_stack: Stack) -> None:
    size = 20 * 2**20
    connection = raw(echo_stack.port, COMPLETIONS + f"content-length: {size}\r\n\r\n".encode())
    for _ in range(20):
        connection.socket.sendall(b" " * 2**20)
    refused_while_sending(connection)
    assert connection.socket.recv(1) == b""


def test_a_client_gets_no_leave_to_send_a_body_that_is_too_large(echo_stack: Stack) -> None:
    head = COMPLETIONS + b"content-length: 3000000\r\nexpect: 100-continue\r\n\r\n"
    refused_while_sending(raw(echo_stack.port, head))


def test_a_declared_length_beyond_all_limits_is_refused_before_the_body_comes(echo_stack: Stack) -> None:
    reply = raw(echo_stack.port, f"{HEAD}content-length: {10**12}\r\n\r\n".encode()).reply()
    assert (reply.status, reply.error()["code"]) == (413, "request_too_large")


def test_a_body_that_does_not_come_is_408_in_time(impatient: Stack) -> None:
    for framing in ("content-length: 100", "transfer-encoding: chunked"):
        began = time.monotonic()
        connection = raw(impatient.port, f"{HEAD}{framing}\r\n\r\n".encode())
        reply = connection.reply()
        assert (reply.status, reply.error()["code"]) == (408, "request_timeout")
        assert reply.headers["connection"] == "close"
        assert connection.socket.recv(1) == b""
        assert 0.4 < time.monotonic() - began < 5


def test_a_body_that_drips_is_408_in_time_too(impatient: Stack) -> None:
    connection = raw(impatient.port, f"{HEAD}content-length: 1000\r\n\r\n".encode())
    connection.socket.settimeout(0.1)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        connection.socket.sendall(b" ")
        try:
            assert connection.socket.recv(12) == b"HTTP/1.1 408"
            return
        except TimeoutError:
            continue
    raise AssertionError("it waited for ever")


@pytest.mark.parametrize(
    "head",
    [
        "x-long: " + "a" * (MAX_HEAD_BYTES + 1000),
        "\r\n".join(f"x-{number}: {'b' * 100}" for number in range(MAX_HEAD_BYTES // 100)),
        "x-huge: " + "c" * (3 * 2**20),
    ],
)
def test_headers_beyond_the_limit_are_431(echo_stack: Stack, head: str) -> None:
    connection = Connection(echo_stack.port)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.socket.sendall(f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n".encode())
    reply = connection.reply()
    assert (reply.status, reply.error()["code"]) == (431, "headers_too_large")


def test_a_path_beyond_the_limit_is_431_too(echo_stack: Stack) -> None:
    assert get(echo_stack.port, "/v1/models?" + "q" * MAX_HEAD_BYTES).status == 431


def flood(connection: Connection) -> None:
    """Sends until the server has had enough."""
    deadline = time.monotonic() + 20
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < deadline:
            connection.socket.sendall(b"a" * 2**16)
    assert time.monotonic() < deadline


def test_a_head_without_an_end_does_not_fill_the_memory(echo_stack: Stack) -> None:
    connection = raw(echo_stack.port, b"GET / HTTP/1.1\r\nx: ")
    flood(connection)
    assert get(echo_stack.port, "/healthz").status == 200


def test_headers_behind_the_body_are_left_out_and_do_not_fill_the_memory(echo_stack: Stack) -> None:
    head = f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode()
    body = chunked(json.dumps(HELLO).encode())
    assert raw(echo_stack.port, head, body, b"0\r\nauthorization: Bearer x\r\n\r\n").reply().status == 200
    connection = raw(echo_stack.port, head, body, b"0\r\nx: ")
    flood(connection)


@pytest.mark.parametrize(
    "words",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /v1/models HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST / HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
    ],
)
def test_what_is_no_http_is_400_in_openais_shape(echo_stack: Stack, words: bytes) -> None:
    reply = raw(echo_stack.port, words).reply()
    assert (reply.status, reply.error()["code"]) == (400, "invalid_http")


def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(echo_stack: Stack) -> None:
    body = json.dumps(HELLO).encode()
    connection = raw(echo_stack.port, f"{HEAD}content-length: {len(body)}\r\nexpect: 100-continue\r\n\r\n".encode())
    assert connection.head()[0] == 100
    connection.socket.sendall(body)
    assert connection.reply().status == 200


def test_a_client_without_a_key_gets_no_leave_to_send_its_body(echo_stack: Stack) -> None:
    head = f"{HEAD}content-length: 1000000\r\nexpect: 100-continue\r\n\r\n".replace(API_KEY, "wrong")
    assert raw(echo_stack.port, head.encode()).head()[0] == 401


def test_requests_that_come_at_once_are_answered_in_their_order(echo_stack: Stack) -> None:
    def request(words: str) -> bytes:
        body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": words}]}).encode()
        return f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body

    connection = raw(echo_stack.port, request("one two three four") + request("five") + request("six seven"))
    answers = [connection.reply() for _ in range(3)]
    for answer, words in zip(answers, ("one two three four", "five", "six seven"), strict=True):
        assert answer.json()["choices"][0]["message"]["content"].strip() == words


def test_a_client_that_offers_http2_goes_on_with_http1(echo_stack: Stack) -> None:
    body = json.dumps(HELLO).encode()
    upgrade = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    connection = raw(echo_stack.port, f"{HEAD}{upgrade}content-length: {len(body)}\r\n\r\n".encode() + body)
    assert connection.reply().status == 200
    chunks = b"transfer-encoding: chunked\r\n\r\n"
    connection.socket.sendall(f"{HEAD}{upgrade}".encode() + chunks + chunked(body[:9]))
    connection.socket.sendall(chunked(body[9:]) + b"0\r\n\r\n")
    assert connection.reply().status == 200
    connection.socket.sendall(f"GET /healthz HTTP/1.1\r\nhost: x\r\n{upgrade}\r\n".encode())
    connection.socket.sendall(b"GET /v1 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert [connection.reply().status for _ in range(2)] == [200, 404]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"x-request-id": "mine-1"}, "mine-1"),
        ({"x-client-request-id": "mine-2"}, "mine-2"),
        ({"x-request-id": "mine-1", "x-client-request-id": "mine-2"}, "mine-1"),
        ({"x-request-id": "a" * 128}, "a" * 128),
        ({"x-request-id": "a" * 129}, None),
        ({"x-request-id": "two words"}, None),
        ({"x-request-id": "clé"}, None),
        ({"x-request-id": ""}, None),
    ],
)
def test_a_request_id_is_sent_back_if_it_is_one(
    echo_stack: Stack, headers: dict[str, str | None], expected: str | None
) -> None:
    for reply in (post(echo_stack.port, HELLO, headers=headers), post(echo_stack.port, b"{", headers=headers)):
        given = reply.headers["x-request-id"]
        assert given == expected if expected else given.startswith("req_")
        assert 0 <= int(reply.headers["openai-processing-ms"]) < 30_000


def test_a_stream_has_the_headers_of_other_answers(echo_stack: Stack) -> None:
    connection = Connection(echo_stack.port)
    connection.send({**HELLO, "stream": True}, headers={"x-request-id": "s-1"})
    status, headers = connection.head()
    assert (status, headers["x-request-id"]) == (200, "s-1")
    assert {"x-job-id", "openai-processing-ms", "x-fastchat-q-model"} <= headers.keys()
    assert list(connection.events())[-1] == "data: [DONE]"


def test_an_error_within_a_stream_is_raised_by_the_official_client(echo_stack: Stack) -> None:
    words = " ".join(["word"] * 500)
    with echo_stack.client() as client:
        create = client.chat.completions.with_raw_response.create
        reply = create(model="echo", messages=[{"role": "user", "content": words}], stream=True)
        chunks = iter(reply.parse())
        next(chunks)
        assert post(echo_stack.port, b"", path=f"/v1/jobs/{reply.headers['x-job-id']}/cancel").status == 200
        with pytest.raises(openai.APIError, match="cancelled"):
            list(chunks)
