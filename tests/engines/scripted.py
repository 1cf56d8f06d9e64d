"""A real HTTP server that answers as a script says: for APIs that cannot be reached from a test."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """A response: a JSON body, or the parts of an event stream.

    Args:
        cut: the connection breaks behind the last part.
        hold: the stream stays open behind the last part until the client hangs up.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    events: list[str] | None = None
    cut: bool = False
    hold: bool = False


@dataclass
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


Script = Callable[[Asked], Reply]


@dataclass
class Scripted:
    """The running server: what it was asked, and whether a client hung up on it."""

    base: str
    asked: list[Asked] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)

    @property
    def bodies(self) -> list[Any]:
        """The bodies of all POSTs."""
        return [asked.body for asked in self.asked if asked.method == "POST"]


@contextmanager
def scripted(script: Script, port: int = 0) -> Iterator[Scripted]:
    """Serves until the block ends."""
    server = _Server(("127.0.0.1", port), _Handler)
    server.state = state = Scripted(f"http://127.0.0.1:{server.server_port}")
    server.script = script
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    state: Scripted
    script: Script


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, body: Any) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, self.path, headers, body)
        self.server.state.asked.append(asked)
        reply = self.server.script(asked)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.events is None:
            self._whole(json.dumps(reply.body).encode())
        else:
            self._stream(reply)

    def _whole(self, raw: bytes) -> None:
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _stream(self, reply: Reply) -> None:
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in reply.events or ():
            raw = event.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
            self.wfile.flush()
        if reply.hold:
            self.connection.settimeout(30)
            if self.connection.recv(1) == b"":
                self.server.state.hung_up.set()
        if reply.cut or reply.hold:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        pass
