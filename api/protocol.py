"""HTTP/1.1 as uvicorn speaks it, with the limits that it lacks: on the size of a head, and on the time that one takes.

What cannot be parsed is answered with OpenAI's error object, as everything else.
"""

import asyncio
import contextlib
import json
import re
from http import HTTPStatus
from typing import Any

import httptools
import structlog
from ulid import ULID
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastchat_q.errors import InvalidRequestError

log = structlog.get_logger()

MAX_HEAD_BYTES = 32 * 1024
"""Of the request line and all headers."""
HEAD_TIMEOUT_S = 30.0
"""How long a connection may take to send a head; between two requests uvicorn's own limit is shorter."""
LINGER_S = 2.0
"""What comes behind a refused head is read and thrown away for so long, so that the client gets to see the answer."""

FRAMING = (b"content-length", b"transfer-encoding")
REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ \S+ HTTP/1\.[01]\r?\n")
METHODS = "DELETE, GET, HEAD, OPTIONS, POST"
"""Those that some path takes."""
CODES = {400: "invalid_http", 405: "method_not_allowed", 408: "request_timeout", 431: "headers_too_large"}


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    _in_head = False
    _unread = 0
    """Bytes since the parser last told of anything: of a head, of trailers, of the extensions of a chunk."""
    _refused = False
    _declined = False
    """The parser is being brought to where it can read the body of a request whose offer to upgrade is declined."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to count the time of the first head."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the count."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, unless the connection is refused already."""
        if self._refused:
            return
        self._unread += len(data)
        self._feed(data)
        if self._unread > MAX_HEAD_BYTES + len(data) and not self._refused:
            self._refuse(431, _too_large())

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline(data[upgrade.args[0] :])
        except httptools.HttpParserInvalidMethodError:
            if REQUEST_LINE.match(data) and not self._refused:
                method = data.partition(b" ")[0][:80].decode()
                self._refuse(405, f"The server knows no method {method}. It knows {METHODS}.")
            else:
                self.send_400_response("")
        except httptools.HttpParserError:
            self.send_400_response("")

    def _decline(self, rest: bytes) -> None:
        """Goes on in HTTP/1.1 behind a head that offers another protocol, as Java's and curl's clients do.

        The parser takes what follows for that protocol, the body as well. So another one gets the head again, as far
        as it says how long the body is.
        """
        framing = [(name, value) for name, value in self.headers if name in FRAMING]
        self.parser = httptools.HttpRequestParser(self)
        self._declined = True
        head = b"".join([b"%b: %b\r\n" % header for header in framing])
        self._feed(b"POST / HTTP/1.1\r\n" + head + b"\r\n")
        self._declined = False
        if rest and not self._refused:
            self._feed(rest)

    def on_url(self, url: bytes) -> None:
        """Takes the target of the request."""
        if not self._declined:
            super().on_url(url)

    def on_message_complete(self) -> None:
        """Ends the request, unless the parser has yet to see its body."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_message_begin(self) -> None:
        """Begins to count the time of a further head."""
        if self._declined:
            return
        super().on_message_begin()
        self._in_head, self._unread = True, 0
        if self._timer is None:
            self._arm()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header; those behind a body are left out."""
        if self._in_head:  # not where an offer was declined either: these are known
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begins the request, if its head is not too large."""
        if self._declined:
            return
        self._in_head, self._unread = False, 0
        self._disarm()
        if len(self.url) + sum([len(name) + len(value) + 4 for name, value in self.headers]) > MAX_HEAD_BYTES:
            self._refuse(431, _too_large())
            raise InvalidRequestError(_too_large())  # ends the parsing
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Takes a part of the body."""
        self._unread = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Answers what cannot be parsed."""
        if not self._refused:
            self._refuse(400, "This is no HTTP request that the server understands.")

    def _arm(self) -> None:
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._in_head:
            self._refuse(408, f"The head of the request was not whole within {HEAD_TIMEOUT_S:g} seconds.")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answers and closes; where another answer is under way, the connection just ends."""
        self._refused = True
        self._disarm()
        cycle: Any = self.cycle
        under_way = cycle is not None and not cycle.response_complete
        if under_way:
            cycle.disconnected = True
            cycle.message_event.set()
        if self.transport.is_closing():
            return
        if under_way and (cycle.response_started or self._in_head or status == 431):
            self.transport.close()
            return
        request_id = f"req_{ULID()}"
        log.info("refused", status=status, reason=message, request_id=request_id)
        error = InvalidRequestError(message, code=CODES[status])
        body = json.dumps(error.body()).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\nx-request-id: {request_id}\r\n"
        )
        if status == 405:
            head += f"allow: {METHODS}\r\n"
        self.transport.write(f"{head}\r\n".encode() + body)
        with contextlib.suppress(NotImplementedError, OSError):
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def _too_large() -> str:
    return f"The request line and the headers have more than {MAX_HEAD_BYTES} bytes together."
