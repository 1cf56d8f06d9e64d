"""One SSE stream as a client sees it: which token came when, and the text. For some hundred streams, not for load."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from loadgen.framing import Framing

READ_BYTES = 65536
UNDER_WAY_S = 0.1


class BrokenStreamError(Exception):
    """The answer is none, carries an error, repeats an event, or has ended early."""


class _Framing(Framing):
    """Framing that keeps the headers."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        super().__init__()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()


class Stream:
    """A job's text and when its pieces came, over as many connections as it takes to read it."""

    def __init__(self, port: int) -> None:
        self.job_id = ""
        """The public one; empty until an answer's head has come."""
        self.text = ""
        self.arrivals_s: list[float] = []
        """When content came, on `time.perf_counter`'s clock."""
        self.last_event = 0
        self.done = False
        self._port = port

    async def ask(self, body: Mapping[str, Any], enough: Callable[[], bool] = lambda: False) -> None:
        """Posts a chat completion and reads it to the end, or hangs up when `enough` says so.

        Raises:
            BrokenStreamError: it is no whole stream.
            OSError: the server cannot be reached.
        """
        content = json.dumps({**body, "stream": True}).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
        await self._read(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode(), content, enough)

    async def resume(self) -> None:
        """Reads on behind the last event that came. Raises as `ask` does."""
        head = f"GET /v1/jobs/{self.job_id}/events HTTP/1.1\r\nlast-event-id: {self.last_event}\r\n"
        await self._read(head.encode(), b"", lambda: False)

    def pause_around(self, moment_s: float) -> tuple[float, float]:
        """How long no content came around a moment, and when it came again.

        What was under way at that moment still comes; so the pause may begin up to `UNDER_WAY_S` later.
        """
        pairs = zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        latest_s = moment_s + UNDER_WAY_S
        return max((after - before, after) for before, after in pairs if before < latest_s and after > moment_s)

    async def _read(self, head: bytes, content: bytes, enough: Callable[[], bool]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(head + b"host: 127.0.0.1\r\n\r\n" + content)
            framing, pending = _Framing(), b""
            while not framing.done and not enough():
                data = await reader.read(READ_BYTES)
                if not data:
                    raise BrokenStreamError(f"closed after event {self.last_event}")
                pending += framing.feed(data)
                if framing.status not in (0, 200) and framing.done:
                    raise BrokenStreamError(f"HTTP {framing.status}: {pending[:200]!r}")
                self.job_id = framing.headers.get("x-job-id", self.job_id)
                *events, pending = pending.split(b"\n\n")
                for event in events:
                    self._take(event)
            if framing.done and not self.done:
                raise BrokenStreamError(f"ended after event {self.last_event} without [DONE]")
        finally:
            writer.transport.abort()

    def _take(self, event: bytes) -> None:
        fields = dict(line.split(b": ", 1) for line in event.split(b"\n") if not line.startswith(b":"))
        if b"data" not in fields:
            return  # a comment
        if fields[b"data"] == b"[DONE]":
            self.done = True
            return
        chunk = json.loads(fields[b"data"])
        if "choices" not in chunk:
            raise BrokenStreamError(f"an error: {chunk}")
        delta = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
        event_id = int(fields[b"id"])
        if delta:
            if event_id <= self.last_event:
                raise BrokenStreamError(f"event {event_id} after {self.last_event}")
            self.text += delta
            self.arrivals_s.append(time.perf_counter())
        self.last_event = event_id
