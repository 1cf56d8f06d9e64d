"""What the commands for operators share: options, exit codes, one connection, tables and JSON."""

import functools
import inspect
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, get_type_hints

import typer

from .choices import flag

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .settings import Settings

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
EXIT_FAILED, EXIT_USAGE, EXIT_AWAY, EXIT_NOT_FOUND = 1, 2, 3, 4
REACH_S = 5.0

RedisUrl = Annotated[
    str | None,
    typer.Option("--redis-url", help="redis://, rediss://, unix:// or sentinel://; default: the embedded server."),
]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Where data, key and logs are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")]
BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", help="An API server, as http://host:port/v1. [default: the one that `up` runs]"),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="Others can see it in the list of processes: FASTCHAT_Q_API_KEY is safer."),
]
T = TypeVar("T")


def with_options(**kinds: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each field of some dataclasses; its arguments of these names get the objects."""

    def option(kind: type[Any], entry: "Field[Any]") -> inspect.Parameter:
        form: Any = Annotated
        annotation = form[get_type_hints(kind)[entry.name], typer.Option(flag(entry.name), **entry.metadata)]
        return inspect.Parameter(entry.name, KEYWORD_ONLY, default=entry.default, annotation=annotation)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name not in kinds]
        added = [option(kind, entry) for kind in kinds.values() for entry in fields(kind)]

        @functools.wraps(command)
        def run(*args: Any, **values: Any) -> None:
            groups = {
                name: kind(**{entry.name: values.pop(entry.name) for entry in fields(kind)})
                for name, kind in kinds.items()
            }
            command(*args, **groups, **values)

        run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)} | {"return": None}
        return run

    return decorate


def load_settings(**flags: Any) -> "Settings":
    """Settings with the flags that were given; says which variables are none."""
    from .settings import Settings, unknown_variables

    for variable in unknown_variables():
        print(f"fastchat-q: warning: {variable} is no setting of fastchat-q", file=sys.stderr)
    return Settings(**{name: value for name, value in flags.items() if value is not None})


def fail(message: str, code: int = EXIT_FAILED) -> NoReturn:
    """Says what, why and what next on stderr, and ends the command."""
    say(f"fastchat-q: {message}")
    raise typer.Exit(code)


def say(message: str) -> None:
    """A line for the person, on stderr: stdout is for results."""
    print(printable(message), file=sys.stderr, flush=True)


def with_redis(settings: "Settings", action: "Callable[[Redis], Awaitable[T]]") -> T:
    """Runs ``action`` on a connection of its own; Redis that is away is exit code 3, one that refuses is 1."""
    import asyncio

    from redis.exceptions import RedisError

    from .addresses import without_password
    from .connection import TRANSIENT, connect

    async def run() -> T:
        client = connect(settings.resolved_redis_url)
        try:
            async with asyncio.timeout(REACH_S):
                await client.ping()
            return await action(client)
        finally:
            await client.aclose()

    try:
        return asyncio.run(run())
    except (TimeoutError, *TRANSIENT) as error:
        why = str(error).rstrip(".") or f"no answer within {REACH_S:g} s"
        fail(
            f"Redis is not reachable at {without_password(settings.resolved_redis_url)}: {why}. "
            "`fastchat-q up` starts one; --redis-url or FASTCHAT_Q_REDIS_URL names another.",
            EXIT_AWAY,
        )
    except RedisError as error:
        fail(f"Redis refuses: {error}. Look at its memory and its log: fastchat-q redis INFO memory")


def print_json(document: Any) -> None:
    """The one JSON document of a command."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns, figures to the right; the head is bold on a terminal unless NO_COLOR is set."""
    cells = [["-" if value is None or value == "" else printable(str(value)) for value in row] for row in rows]
    widths = [
        max(len(column), *(len(row[i]) for row in cells)) if cells else len(column) for i, column in enumerate(columns)
    ]
    right = [bool(rows) and all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    head = line([column.upper() for column in columns])
    print(typer.style(head, bold=True) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else head)
    for row in cells:
        print(line(row))


def printable(line: str) -> str:
    """Without control characters: what clients and workers wrote must not drive the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in line)


def parse_duration(words: str) -> float:
    """Seconds of ``90``, ``5m`` or ``1h30m``; infinity for a negative number, as Ollama has it.

    Raises:
        ConfigurationError: it is none of these.
    """
    import re

    from .errors import ConfigurationError

    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    if re.fullmatch(r"-\d+(\.\d+)?(ms|s|m|h|d)?", words):
        return float("inf")
    if re.fullmatch(r"\d+(\.\d+)?", words):
        return float(words)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", words)
    if not parts or "".join(number + unit for number, unit in parts) != words:
        raise ConfigurationError(f"{words!r} is no duration: expected such as 300, 5m, 1h30m, or -1 for ever.")
    return sum(float(number) * units[unit] for number, unit in parts)


def duration(seconds: float | None) -> str | None:
    """``4.2s``, ``3m12s``, ``2h05m``, ``6d03h``."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"
