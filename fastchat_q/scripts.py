"""Loads and calls the Lua scripts of ``lua/``: by digest, all of them loaded together when the server forgot them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

Arg = str | bytes | int
TOKEN_PATH = ("emit", "renew")
"""Scripts that touch a job's record, log and lease alone: they carry no more of the shared code, and fewer KEYS."""
TRANSITIONS = (
    "enqueue",
    "claim",
    "finish",
    "release",
    "disown",
    "cancel",
    "attach",
    "restore",
    "reap",
    "reconcile",
    "revive",
    "drop",
    "forget",
)
STANDALONE = ("limit", "file_add", "file_remove", "batch_put")
"""Scripts with KEYS of their own, and no shared code."""
NAMES = (*TOKEN_PATH, *TRANSITIONS, *STANDALONE)

LOADS = 3
"""So often scripts are loaded for one call: a server can forget them again before the call comes."""


@dataclass(frozen=True, slots=True)
class Script:
    """One script as the server gets it."""

    source: str
    sha: str


@cache
def script(name: str) -> Script:
    """The script ``lua/<name>.lua``."""
    folder = files(__package__) / "lua"
    shared = () if name in STANDALONE else ("prelude",) if name in TOKEN_PATH else ("prelude", "transitions")
    source = "\n".join((folder / f"{part}.lua").read_text() for part in (*shared, name))
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def read_all() -> None:
    """Reads the files now: a package that is upgraded under a running process must not mix the two."""
    for name in NAMES:
        script(name)


@dataclass(frozen=True, slots=True)
class Call:
    """One script call: its name, KEYS and ARGV."""

    name: str
    keys: Sequence[str]
    args: Sequence[Arg]


async def call(redis: "Redis", name: str, keys: Sequence[str], args: Sequence[Arg]) -> Any:
    """Runs one script.

    Raises:
        redis.RedisError: the server is away or refuses (``OutOfMemoryError`` at maxmemory).
    """
    sha = script(name).sha
    for _ in range(LOADS):
        try:
            return await redis.evalsha(sha, len(keys), *keys, *args)  # type: ignore[misc, arg-type]
        except NoScriptError:
            await load_all(redis)
    return await redis.evalsha(sha, len(keys), *keys, *args)  # type: ignore[misc, arg-type]


async def call_many(redis: "Redis", calls: Iterable[Call]) -> list[Any]:
    """Runs scripts in order in one round trip; a failed one stands as its exception in the list.

    After a server forgot the scripts all calls are sent again: every script is idempotent, and none may be skipped
    while a later one of the same job ran.
    """
    calls = list(calls)
    replies = await _pipeline(redis, calls)
    for _ in range(LOADS):
        if not any(isinstance(reply, NoScriptError) for reply in replies):
            break
        await load_all(redis)
        replies = await _pipeline(redis, calls)
    return replies


async def load_all(redis: "Redis") -> None:
    """SCRIPT LOAD for all scripts, in one round trip."""
    pipe = redis.pipeline(transaction=False)
    for name in NAMES:
        pipe.script_load(script(name).source)
    await pipe.execute()


async def _pipeline(redis: "Redis", calls: list[Call]) -> list[Any]:
    pipe = redis.pipeline(transaction=False)
    for c in calls:
        pipe.evalsha(script(c.name).sha, len(c.keys), *c.keys, *c.args)  # type: ignore[arg-type]
    return await pipe.execute(raise_on_error=False)
