"""Events become OpenAI's bytes. The frame of a stream's chunks is encoded once; a token costs one string encoding."""

import time
from collections.abc import Sequence
from typing import Any

import orjson

from fastchat_q.errors import FastchatQError
from fastchat_q.events import Delta, End, Event, Usage
from fastchat_q.jobs import Job, Lane

DONE = b"data: [DONE]\n\n"
SERVICE_TIERS: dict[Lane, str] = {"hi": "default", "lo": "flex"}


def to_json(body: dict[str, Any]) -> bytes:
    """The bytes of a JSON answer."""
    return orjson.dumps(body)


def completion_id(job: Job) -> str:
    """The ``id`` of the completion, and of each of its chunks."""
    return f"chatcmpl-{job.id}"


def completion(job: Job, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The ``chat.completion`` object of a job that succeeded."""
    text = "".join(event.text for event in events if isinstance(event, Delta))
    result = end.result
    return {
        "id": completion_id(job),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": job.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": result.finish_reason if result else "stop",
            }
        ],
        "usage": usage(result.usage if result else None),
        "service_tier": SERVICE_TIERS[job.lane],
        "system_fingerprint": None,
    }


def usage(counts: Usage | None) -> dict[str, int] | None:
    """The ``usage`` object."""
    if counts is None:
        return None
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }


class ChunkWriter:
    """Writes one stream's server-sent events."""

    def __init__(self, job: Job, include_usage: bool) -> None:
        self._head = orjson.dumps(
            {
                "id": completion_id(job),
                "object": "chat.completion.chunk",
                "created": int(time.time()),
                "model": job.model,
                "service_tier": SERVICE_TIERS[job.lane],
                "system_fingerprint": None,
            }
        )[:-1]
        self._usage_field = b',"usage":null' if include_usage else b""
        self._include_usage = include_usage
        self._content_open = b"data: " + self._head + b',"choices":[{"index":0,"delta":{"content":'
        self._content_close = b'},"logprobs":null,"finish_reason":null}]' + self._usage_field + b"}\n\n"

    def role(self) -> bytes:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None}, None)

    def events(self, events: Sequence[Event]) -> bytes:
        """The chunks of some events: text that came together goes out together."""
        text = "".join(event.text for event in events if isinstance(event, Delta))
        body = self._content_open + orjson.dumps(text) + self._content_close if text else b""
        last = events[-1]
        return body + self._end(last) if isinstance(last, End) else body

    def _end(self, end: End) -> bytes:
        error = end.error()
        if error is not None:
            return error_event(error)
        result = end.result
        body = self._chunk({}, result.finish_reason if result else "stop")
        if self._include_usage:
            counts = orjson.dumps(usage(result.usage if result else None))
            body += b"data: " + self._head + b',"choices":[],"usage":' + counts + b"}\n\n"
        return body + DONE

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = orjson.dumps({"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason})
        return b"data: " + self._head + b',"choices":[' + choice + b"]" + self._usage_field + b"}\n\n"


def error_event(error: FastchatQError) -> bytes:
    """An error after the first byte, which the official clients raise. No [DONE] follows: the answer is not whole."""
    return b"data: " + orjson.dumps(error.body()) + b"\n\n"


def queue_comment(place: int | None) -> bytes:
    """A comment that keeps a waiting stream alive; clients ignore it, people read it."""
    return b": waiting for the first token\n\n" if place is None else b": queued position=%d\n\n" % place
