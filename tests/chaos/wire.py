"""A client's connection: raw HTTP/1.1 and server-sent events on one socket, which may be cut at any byte."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from httptools import HttpParserError, HttpResponseParser

CONNECT_S = 5.0
SILENCE_S = 40.0
"""A stream that says nothing for so long (pings come every 15 s) is given up."""
LOST = (OSError, EOFError, TimeoutError, HttpParserError)
"""What a request may raise when its server is killed, frozen or not there yet."""


@dataclass(slots=True)
class Event:
    """One server-sent event."""

    id: int | None
    data: str


@dataclass(slots=True)
class Wire:
    """One request and its response. The ``on_…`` methods are the parser's callbacks."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    _body: bytearray = field(default_factory=bytearray)
    _parser: HttpResponseParser = field(init=False)

    def __post_init__(self) -> None:
        self._parser = HttpResponseParser(self)

    @classmethod
    async def request(
        cls, port: int, bearer: str, method: str, path: str, body: dict[str, Any] | None, headers: Mapping[str, str]
    ) -> Self:
        """Sends a request and returns when the head of its response is there. Raises one of `LOST`."""
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        wire = cls(reader, writer)
        try:
            raw = b"" if body is None else json.dumps(body).encode()
            values = {
                "host": "127.0.0.1",
                "authorization": f"Bearer {bearer}",
                "content-type": "application/json",
                "content-length": str(len(raw)),
                **headers,
            }
            head = "".join(f"{name}: {value}\r\n" for name, value in values.items())
            writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + raw)
            while not wire.status:
                await wire._receive()
        except BaseException:
            wire.cut()
            raise
        return wire

    def cut(self) -> None:
        """Hangs up, without a word."""
        self.writer.transport.abort()

    async def json(self) -> Any:
        """The whole body, decoded. Raises one of `LOST`."""
        while not self.complete:
            await self._receive()
        self.cut()
        return json.loads(bytes(self._body))

    async def events(self) -> AsyncIterator[Event]:
        """The events, as they come, until the response is complete. Raises one of `LOST`."""
        while True:
            block, found, rest = bytes(self._body).partition(b"\n\n")
            if found:
                self._body = bytearray(rest)
                event = _event(block.decode())
                if event is not None:
                    yield event
            elif self.complete:
                return
            else:
                await self._receive()

    async def _receive(self) -> None:
        async with asyncio.timeout(SILENCE_S):
            data = await self.reader.read(65536)
        if not data:
            raise EOFError("the server closed the connection")
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        self.complete = True


def _event(block: str) -> Event | None:
    """An event of its lines; None for a comment."""
    fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
    if "data" not in fields:
        return None
    return Event(int(fields["id"]) if "id" in fields else None, fields["data"])
