"""``fastchat-q redis``: the real redis-cli or valkey-cli on the right socket, or a small prompt where there is none."""

import contextlib
import os
import shlex
import shutil
import sys
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.exceptions import RedisError

from . import sentinel
from .addresses import without_password

CLIENTS = ("valkey-cli", "redis-cli")
ENDLESS = ("subscribe", "psubscribe", "ssubscribe", "monitor")


def run(url: str, arguments: list[str]) -> int:
    """Runs one command, or a prompt when there are no arguments; returns the exit code."""
    if url.startswith(sentinel.SCHEME):
        url = sentinel.master_url(url)
    client = next((path for path in map(shutil.which, CLIENTS) if path), None)
    if client is not None:
        command = [client, *connection_arguments(url), *arguments]
        sys.stdout.flush()
        os.execv(client, command)
    connection = redis.Redis.from_url(url, decode_responses=True, encoding_errors="backslashreplace")
    try:
        if arguments:
            return execute(connection, arguments)
        return _loop(connection, url)
    finally:
        connection.close()


def connection_arguments(url: str) -> list[str]:
    """redis-cli's flags for a URL."""
    if url.startswith("unix://"):
        return ["-s", unquote(urlsplit(url).path)]
    return ["-u", url]


def execute(connection: "redis.Redis", arguments: list[str]) -> int:
    """One command, its reply printed as redis-cli prints it."""
    if arguments[0].lower() in ENDLESS:
        return _follow(connection, arguments)
    try:
        # redis-py turns some replies into Python objects; the protocol's own shape is what people know.
        connection.response_callbacks.clear()
        print(format_reply(connection.execute_command(*arguments)))  # type: ignore[no-untyped-call]
    except RedisError as error:
        print(f"(error) {error}")
        return 1
    return 0


def _follow(connection: "redis.Redis", arguments: list[str]) -> int:
    """A command whose replies do not end: prints them until Ctrl-C."""
    held = connection.connection_pool.get_connection()
    try:
        held.send_command(*arguments)
        while True:
            print(format_reply(held.read_response()), flush=True)
    except KeyboardInterrupt:
        return 0
    except RedisError as error:
        print(f"(error) {error}")
        return 1
    finally:
        held.disconnect()
        connection.connection_pool.release(held)


def format_reply(reply: Any, indent: str = "") -> str:
    """A reply in redis-cli's notation."""
    if reply is None:
        return "(nil)"
    if isinstance(reply, bool | int):
        return f"(integer) {int(reply)}"
    if isinstance(reply, list | tuple):
        if not reply:
            return "(empty array)"
        width = len(str(len(reply)))
        deeper = indent + " " * (width + 2)
        rows = [f"{number:>{width}}) {format_reply(item, deeper)}" for number, item in enumerate(reply, 1)]
        return ("\n" + indent).join(rows)
    text = str(reply)
    return text if "\n" in text else f'"{text}"'


def _loop(connection: "redis.Redis", url: str) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  history and line editing for input()
    print(
        f"No valkey-cli or redis-cli on the PATH: a small prompt on {without_password(url)}. Type a command, or exit."
    )
    while True:
        try:
            words = shlex.split(input("redis> "))
        except EOFError:
            return 0
        except ValueError as error:
            print(f"(error) {error}")
            continue
        if words[:1] in (["exit"], ["quit"]):
            return 0
        if words:
            execute(connection, words)
