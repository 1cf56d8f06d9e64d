"""Batches as tests make and check them: inputs, uploads, waiting, and what must be true of files of results."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import openai
from openai.types import Batch

from .servers import wait_until

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
CHAT: Endpoint = "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")


def line(number: int, text: str = "hello", *, model: str = "echo", url: str = CHAT, **body: Any) -> dict[str, Any]:
    """A line of an input: the chat request ``line-<number>``."""
    messages = [{"role": "user", "content": text}]
    request = {"model": model, "messages": messages, **body}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": request}


def jsonl(lines: Iterable[Any]) -> bytes:
    """An input file."""
    return b"".join([json.dumps(one).encode() + b"\n" for one in lines])


def create(
    client: openai.OpenAI, content: bytes, *, endpoint: Endpoint = CHAT, window: str = "24h", **more: Any
) -> Batch:
    """Uploads an input and makes a batch of it."""
    file = client.files.create(file=("input.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,
        completion_window=window,  # type: ignore[arg-type]
        **more,
    )


def ended(client: openai.OpenAI, batch: Batch, timeout_s: float = 60.0) -> Batch:
    """The batch when it is over."""
    found = [batch]

    def over() -> bool:
        found[0] = client.batches.retrieve(batch.id)
        return found[0].status in OVER

    wait_until(over, "the batch ends", timeout_s)
    return found[0]


def results(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a file of results."""
    return parsed(client.files.content(file_id).read()) if file_id else []


def parsed(content: bytes) -> list[dict[str, Any]]:
    """Lines of results, each of which must be whole."""
    assert not content or content.endswith(b"\n"), content[-200:]
    return [json.loads(one) for one in content.splitlines()]


def ids(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The custom_ids, each of which must be there once."""
    found = [one["custom_id"] for one in lines]
    assert len(set(found)) == len(found), "a custom_id came twice"
    return found
