"""A fake OpenAI-compatible server on raw asyncio: no model, no queue, no framework.

What the load generator is tried against, and the most that a relay in Python could reach: every write is serialised
before the first request. It reads only what it needs of a request, and expects one in flight per connection.

    python bench/fake_openai.py --port 8001 --delay-ms 20
"""

import argparse
import asyncio
import json
import re
from functools import cache
from typing import Any, cast

import uvloop

HOST = "127.0.0.1"
WORD = " word"
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)


def _body(kind: str, choices: list[dict[str, Any]], tokens: int | None = None) -> bytes:
    """A completion or a chunk, with usage if `tokens` are told."""
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1} if tokens else None
    body = {"id": "chatcmpl-fake", "object": kind, "created": 1, "model": "fake", "choices": choices, "usage": usage}
    return json.dumps(body, separators=(",", ":")).encode()


def _event(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: %b\n\n" % _body("chat.completion.chunk", [choice])


def _framed(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


@cache
def stream_writes(tokens: int, tokens_per_event: int) -> tuple[bytes, ...]:
    """A streamed answer: head and role event, the content events, then finish, usage and `[DONE]`."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    sizes = [min(tokens_per_event, tokens - done) for done in range(0, tokens, tokens_per_event)]
    closing = _event({}, "length") + b"data: %b\n\ndata: [DONE]\n\n" % _body("chat.completion.chunk", [], tokens)
    return (
        head + _framed(_event({"role": "assistant", "content": ""})),
        *(_framed(_event({"content": WORD * size})) for size in sizes),
        _framed(closing) + b"0\r\n\r\n",
    )


@cache
def whole_write(tokens: int) -> bytes:
    """An answer in one body."""
    message = {"role": "assistant", "content": WORD * tokens}
    body = _body("chat.completion", [{"index": 0, "message": message, "finish_reason": "length"}], tokens)
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class Connection(asyncio.Protocol):
    """Answers one request after another; each write has a loop turn of its own, so it is a send of its own."""

    _transport: asyncio.Transport

    def __init__(self, delay_s: float, tokens_per_event: int) -> None:
        self._delay_s = delay_s  # before every write but an answer's first
        self._tokens_per_event = tokens_per_event
        self._loop = asyncio.get_running_loop()
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = _CONTENT_LENGTH.search(head)
        if not found or not length or len(body) < int(length[1]):
            return
        self._received = b""
        request = json.loads(body)
        if request["stream"]:
            self._write(stream_writes(request["max_tokens"], self._tokens_per_event), 0, self._loop.time())
        else:
            self._transport.write(whole_write(request["max_tokens"]))

    def _write(self, writes: tuple[bytes, ...], number: int, due_s: float) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(writes[number])
        if number + 1 == len(writes):
            return
        if self._delay_s:
            self._loop.call_at(due_s + self._delay_s, self._write, writes, number + 1, due_s + self._delay_s)
        else:
            self._loop.call_soon(self._write, writes, number + 1, due_s)


async def serve(port: int, delay_s: float, tokens_per_event: int) -> None:
    """Serve until it is killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(delay_s, tokens_per_event), HOST, port, backlog=2048)
    print(f"listening url=http://{HOST}:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A fake OpenAI-compatible server on raw asyncio, on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=8001, help="0 for any (default: %(default)s)")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="before every write (default: %(default)s)")
    parser.add_argument("--tokens-per-event", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.delay_ms / 1e3, options.tokens_per_event))


if __name__ == "__main__":
    main()
