"""Streams of the echo engine as tests open and read them: a long question, its worker, the text of the events."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from .http_client import Connection
from .servers import free_port
from .stack import Process, Stack

WORDS = [f"w{number}" for number in range(400)]
LONG: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": " ".join(WORDS)}]}
"""400 tokens; the echo engine answers with the question."""
ENDLESS: dict[str, Any] = {**LONG, "ignore_eos": True, "max_tokens": 100_000}


def echo_worker(stack: Stack, *arguments: str, delay_ms: int = 10, **start: Any) -> Process:
    """A worker of model ``echo`` at this pace a token."""
    flags = ("--model", "echo", "--engine", "echo", "--token-delay-ms", str(delay_ms))
    return stack.start_worker(*flags, *arguments, **start)


def second_api(stack: Stack, *arguments: str, **start: Any) -> int:
    """Another API server of the same stack; returns its port. It may not know the workers yet."""
    port = free_port()
    stack.start_api(port, *arguments, **start)
    return port


def start_stream(port: int, body: dict[str, Any] = LONG, **headers: str) -> Connection:
    """Asks for a stream; header names with underscores. The head is still to be read."""
    connection = Connection(port)
    named: dict[str, str | None] = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.send({**body, "stream": True}, headers=named)
    return connection


def open_stream(port: int, body: dict[str, Any] = LONG, **headers: str) -> tuple[Connection, str]:
    """A stream and its public job id."""
    connection = start_stream(port, body, **headers)
    status, head = connection.head()
    assert status == 200, head
    return connection, head["x-job-id"]


def events_until(connection: Connection, last: int) -> list[str]:
    """The data of events up to the one with this id or a later one."""
    blocks = []
    for block in connection.events():
        blocks.append(block)
        if connection.ids and connection.ids[-1] >= last:
            break
    return blocks


def resume(port: int, public_id: str, after: int | str | None) -> Connection:
    """Asks for a job's events behind the one with this id (None: for all). The head is still to be read."""
    connection = Connection(port)
    headers: dict[str, str | None] = {"content-type": None, "content-length": None}
    if after is not None:
        headers["last-event-id"] = str(after)
    connection.send(b"", path=f"/v1/jobs/{public_id}/events", method="GET", headers=headers)
    return connection


def block_text(block: str) -> str:
    """The text of an event, which may be empty; fails on an error event."""
    if not block.startswith("data: {"):
        return ""  # a comment, or the end
    chunk = json.loads(block.removeprefix("data: "))
    assert "choices" in chunk, chunk
    return chunk["choices"][0]["delta"].get("content") or "" if chunk["choices"] else ""


def text_of(blocks: Iterable[str]) -> str:
    """The text of events; fails on an error event."""
    return "".join(map(block_text, blocks))


def stream_text(connection: Connection) -> Iterator[str]:
    """The text of a stream, piece by piece; fails on an error event."""
    return map(block_text, connection.events())


def read_words(pieces: Iterator[str], count: int) -> str:
    """The text of a stream until so many words are there."""
    text = ""
    while len(text.split()) < count:
        text += next(pieces)
    return text
