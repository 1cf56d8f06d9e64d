"""Raw HTTP for tests: what the official client would not send, and the bytes it would not show."""

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from .stack import API_KEY

CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The OpenAI error object; fails if the body has any other shape."""
        decoded = self.json()
        assert set(decoded) == {"error"}, decoded
        error: dict[str, Any] = decoded["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"]
        return error


class Connection:
    """One request on one socket, which the test may cut whenever it likes; else it is closed when the test ends."""

    all_open: ClassVar[list["Connection"]] = []

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.all_open.append(self)
        self._buffer = b""
        self.ids: list[Any] = []
        """The ids of the events so far; those with a point in them as text."""

    def send(
        self, body: Any, *, path: str = CHAT, method: str = "POST", headers: dict[str, str | None] | None = None
    ) -> None:
        """Sends a request; ``body`` as it is if bytes, else as JSON. A header of None is left out."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        values: dict[str, str | None] = {
            "host": "127.0.0.1",
            "authorization": f"Bearer {API_KEY}",
            "content-type": "application/json",
            "content-length": str(len(raw)),
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in values.items() if value is not None)
        self.socket.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + raw)

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers, as soon as they are there."""
        while b"\r\n\r\n" not in self._buffer:
            self._buffer += self._receive()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        return int(status.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}

    def events(self) -> Iterator[str]:
        """The blocks of an event stream, comments included, as they come; the ids go to `ids`."""
        text = b""
        for part in self._chunks():
            text += part
            while b"\n\n" in text:
                block, _, text = text.partition(b"\n\n")
                block = block.removeprefix(b": ping\n")
                if block.startswith(b"id: "):
                    event_id, _, block = block.removeprefix(b"id: ").partition(b"\n")
                    self.ids.append(int(event_id) if event_id.isdigit() else event_id.decode())
                yield block.decode()

    def reply(self) -> Reply:
        """The whole response."""
        status, headers = self.head()
        if headers.get("transfer-encoding") == "chunked":
            return Reply(status, headers, b"".join(self._chunks()))
        size = int(headers.get("content-length", "0"))
        while len(self._buffer) < size:
            self._buffer += self._receive()
        body, self._buffer = self._buffer[:size], self._buffer[size:]
        return Reply(status, headers, body)

    def peek(self) -> str:
        """Reads on until some bytes are there that no event was made of yet, and returns them."""
        if not self._buffer:
            self._buffer = self._receive()
        return self._buffer.decode()

    def rest(self) -> bytes:
        """What has come behind the head, undecoded."""
        return self._buffer

    def close(self) -> None:
        """Hangs up."""
        self.socket.close()

    def hang_up(self) -> None:
        """The same while another thread reads: it is woken."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _chunks(self) -> Iterator[bytes]:
        while True:
            while b"\r\n" not in self._buffer:
                self._buffer += self._receive()
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            size = int(line, 16)
            while len(self._buffer) < size + 2:
                self._buffer += self._receive()
            part, self._buffer = self._buffer[:size], self._buffer[size + 2 :]
            if size == 0:
                return
            yield part

    def _receive(self) -> bytes:
        part = self.socket.recv(65536)
        if not part:
            raise ConnectionError("the server closed the connection")
        return part


def post(port: int, body: Any, **options: Any) -> Reply:
    """One request, its whole response."""
    connection = Connection(port)
    try:
        connection.send(body, **options)
        return connection.reply()
    finally:
        connection.close()


def get(port: int, path: str, **headers: str | None) -> Reply:
    """A GET; header names with underscores."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return post(port, b"", path=path, method="GET", headers={"content-type": None, "content-length": None, **named})
