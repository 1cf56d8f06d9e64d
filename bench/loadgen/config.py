"""What a run is asked to do, checked, and the bytes of the request that it sends again and again."""

import ipaddress
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

SERIAL = "{serial}"
"""Stands in a prompt for a number of eight digits that is another one for each request: a server that remembers
prompts has not seen it."""


class ConfigError(ValueError):
    """The run cannot start as asked: the message names the value and what would be accepted."""


@dataclass(frozen=True, slots=True)
class Config:
    """One run. `pids` maps a name to the process whose CPU time is read before and after (Linux only)."""

    base_url: str
    model: str
    concurrency: int
    requests: int
    max_tokens: int
    prompt: str
    stream: bool = True
    api_key: str = field(default="", repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)  # added to the request body
    pids: Mapping[str, int] = field(default_factory=dict)
    timeout_s: float = 60.0  # one request, sent -> ended
    expected: str | None = None  # the text that every stream must have, if it matters
    peer: bool = False  # another server, whose streams need not be whole by OpenAI's rules: see PeerAnswer


class Target(NamedTuple):
    """Where the requests go."""

    host: str
    port: int
    path: str


def parse_target(base_url: str) -> Target:
    """Split a base URL, with or without a trailing `/v1`. Raises ConfigError if it is not http on this host."""
    url = urlsplit(base_url)
    try:
        host, port = url.hostname or "", url.port or 80
    except ValueError as error:
        raise ConfigError(f"base URL {base_url!r}: {error}") from error
    if url.scheme != "http":
        raise ConfigError(f"base URL {base_url!r}: only http:// is spoken")
    if not _is_loopback(host):
        raise ConfigError(f"base URL {base_url!r}: only a loopback host may be loaded (127.0.0.1, ::1, localhost)")
    prefix = url.path.rstrip("/").removesuffix("/v1")
    return Target(host=host, port=port, path=f"{prefix}/v1/chat/completions")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build_request(config: Config, target: Target) -> bytes:
    """Head and body. Raises ConfigError for a value that makes no request, or no run."""
    for name in ("concurrency", "requests", "max_tokens", "timeout_s"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}: it must be above 0 and finite")
    if not (config.api_key.isascii() and config.api_key.isprintable()):
        raise ConfigError("the API key must be printable ASCII: it travels in a header")
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": "user", "content": config.prompt}],
        "max_tokens": config.max_tokens,
        "stream": config.stream,
    }
    if config.stream and not config.peer:
        body["stream_options"] = {"include_usage": True}
    if set_twice := sorted(body.keys() & config.extra.keys()):
        raise ConfigError(f"extra sets {', '.join(set_twice)}, which the other options set")
    content = json.dumps(body | dict(config.extra)).encode()
    host = f"[{target.host}]" if ":" in target.host else target.host
    lines = [
        f"POST {target.path} HTTP/1.1",
        f"Host: {host}:{target.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        f"Accept: {'text/event-stream' if config.stream else 'application/json'}",
    ]
    if config.api_key:
        lines.append(f"Authorization: Bearer {config.api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + content
