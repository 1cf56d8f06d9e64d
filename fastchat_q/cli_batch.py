"""``fastchat-q batch``: many requests in a file, done when there is room. It is a client of the API server."""

import errno
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import UnsupportedOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Protocol

import typer

from .cli_common import (
    EXIT_FAILED,
    EXIT_USAGE,
    ApiKey,
    AsJson,
    BaseUrl,
    StateDir,
    duration,
    fail,
    load_settings,
    print_json,
    print_table,
    printable,
    say,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from .client import Api, Server

POLL_S = 1.0
AWAY_S = 60.0
"""A watched batch goes on without us: a server that is away may come back for so long."""
UNFINISHED = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
MAX_LINE = 32 * 1024 * 1024
STDIN = Path("-")
STORED_S = 600.0
"""An upload that has been sent is stored by then."""

Id = Annotated[str, typer.Argument(metavar="ID", help="As `batch create` and `batch ls` print it.")]
Watch = Annotated[bool, typer.Option("--watch", help="Follow it to its end.")]

app = typer.Typer(name="batch", help="Many requests in a file.", no_args_is_help=True, rich_markup_mode=None)


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...


@app.command()
def create(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines, as OpenAI's Batch API takes them; -: stdin.")
    ],
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="Such as /v1/chat/completions. [default: the first line's url]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Ask this model, whatever the lines say. [default: as they say]")
    ] = None,
    window: Annotated[str, typer.Option("--completion-window", help="What is not done by then expires.")] = "24h",
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Kept with it; may be repeated.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end.")] = False,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
) -> None:
    """Upload a file and have its requests done."""
    from .client import ANSWER_S

    pairs = _pairs(metadata or [])
    server = _server(state_dir, base_url, api_key)
    with _opened(file) as opened:
        url = endpoint or _first_url(file, opened)

        def make(api: "Api") -> dict[str, Any]:
            with _uploading(opened) as content:
                lines: _Readable = _Asking(content, model) if model else content
                parts = {"file": ("stdin.jsonl" if file == STDIN else file.name, lines, "application/jsonl")}
                purpose = {"purpose": "batch"}
                uploaded = api.call("POST", "/v1/files", data=purpose, files=parts, timeout=STORED_S)
            body = {"input_file_id": uploaded["id"], "endpoint": url, "completion_window": window, "metadata": pairs}
            batch: dict[str, Any] = api.post("/v1/batches", body, timeout=ANSWER_S)
            return batch

        batch = _with(server, make)
    if wait:
        say(batch["id"])
        batch = _watch(server, batch["id"])
        _finish(batch, as_json)
    elif as_json:
        print_json(batch)
    else:
        print(batch["id"])
        say(f"Follow it: fastchat-q batch status {batch['id']} --watch")


@app.command("ls")
def list_batches(
    limit: Annotated[int, typer.Option("--limit", min=1, max=100)] = 20,
    after: Annotated[
        str | None, typer.Option("--after", metavar="ID", help="Those that are older than this one.")
    ] = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
) -> None:
    """The latest batches, the newest first."""
    found = _with(_server(state_dir, base_url, api_key), lambda api: api.get("/v1/batches", limit=limit, after=after))
    if as_json:
        print_json(found)
        return
    print_table(("id", "status", "done", "failed", "total", "endpoint", "age"), [_row(one) for one in found["data"]])
    if found["has_more"]:
        say(f"There are more. See further with --after {found['last_id']}.")


@app.command()
def status(
    batch: Id,
    watch: Watch = False,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
) -> None:
    """How far a batch is."""
    server = _server(state_dir, base_url, api_key)
    if watch:
        _finish(_watch(server, batch), as_json)
        return
    found = _with(server, lambda api: _read(api, batch))
    print_json(found) if as_json else _show(found)


@app.command()
def results(
    batch: Id,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file. [default: stdout]")] = None,
    errors: Annotated[bool, typer.Option("--errors", help="The requests that failed instead.")] = False,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
) -> None:
    """Print the answers: all of them, or of a batch that still runs those that are there."""
    from .client import SILENCE_S

    def fetch(api: "Api") -> None:
        found = _read(api, batch)
        file = found["error_file_id" if errors else "output_file_id"]
        if file is not None:
            path = f"/v1/files/{file}/content"
        elif found["status"] in UNFINISHED:
            path = f"/v1/batches/{batch}/{'errors' if errors else 'output'}"
            counts = found["request_counts"]
            say(f"It still runs: {counts['completed'] + counts['failed']} of {counts['total']} requests are done.")
        else:
            say(f"The batch ({found['status']}) has no {'errors' if errors else 'output'}.")
            return
        with api.open("GET", path, timeout=SILENCE_S) as response, _target(output) as target:
            for chunk in response.iter_bytes():
                target.write(chunk)

    _with(_server(state_dir, base_url, api_key), fetch)


@app.command()
def cancel(
    batch: Id,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
) -> None:
    """End a batch. What it has answered stays."""
    from .client import ANSWER_S

    path = f"/v1/batches/{batch}/cancel"
    found = _with(_server(state_dir, base_url, api_key), lambda api: api.post(path, timeout=ANSWER_S))
    print_json(found) if as_json else _show(found)


class _Asking:
    """A file of requests, each for one model."""

    def __init__(self, file: _Readable, model: str) -> None:
        self._file, self._model = file, model
        self._rest, self._ready = b"", b""

    def seek(self, offset: int, /) -> int:
        """To its beginning only: an upload that the server had no room for is sent again."""
        if offset:
            raise UnsupportedOperation("a file of requests is read from its beginning")
        self._rest, self._ready = b"", b""
        return self._file.seek(0)

    def read(self, size: int = -1, /) -> bytes:
        """Some more of it; empty at its end."""
        while not self._ready:
            chunk = self._file.read(size if size > 0 else 1 << 16)
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if not chunk:
                lines, self._rest = [self._rest] if self._rest else [], b""
            self._ready = b"".join(self._changed(line) for line in lines)
            if not chunk:
                break
        ready, self._ready = self._ready, b""
        return ready

    def _changed(self, line: bytes) -> bytes:
        try:
            request = json.loads(line, object_pairs_hook=_each_once)
            request["body"]["model"] = self._model
            return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        except (ValueError, TypeError, KeyError, RecursionError):
            return line + b"\n"  # the server says what is wrong with it, and where


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _pairs(words: list[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or not name:
            fail(f"--metadata {word!r}: expected NAME=VALUE.", EXIT_USAGE)
        pairs[name] = value
    return pairs


def _first_url(path: Path, file: BinaryIO) -> str:
    line = next((line for line in iter(lambda: file.readline(MAX_LINE), b"") if line.strip()), b"")
    file.seek(0)
    try:
        url = json.loads(line)["url"]
    except (ValueError, KeyError, TypeError, RecursionError):
        url = None
    if not isinstance(url, str):
        fail(
            f"{path}: its first line is no request with a url. Expected such as "
            '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {…}}.',
            EXIT_USAGE,
        )
    return url


def _server(state_dir: Path | None, base_url: str | None, api_key: str | None) -> "Server":
    from .client import Server

    return Server.find(load_settings(state_dir=state_dir), base_url, api_key)


def _with(server: "Server", action: Any) -> Any:
    from .client import with_server

    return with_server(server, action)


def _read(api: "Api", batch: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/v1/batches/{batch}")
    return found


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file that can be read more than once: what comes through a pipe is put into one first."""
    try:
        source = sys.stdin.buffer if path == STDIN else path.open("rb")
        with source:
            if path != STDIN and source.seekable():
                yield source
                return
            with tempfile.TemporaryFile() as whole:
                shutil.copyfileobj(source, whole)
                whole.seek(0)
                yield whole
    except OSError as error:
        fail(f"{path}: {error.strerror}.", EXIT_USAGE)


@contextmanager
def _uploading(file: BinaryIO) -> Iterator[_Readable]:
    """The file, with a bar on a terminal."""
    size = os.fstat(file.fileno()).st_size
    if not sys.stderr.isatty():
        yield file
        return
    from rich.console import Console
    from rich.progress import wrap_file

    with wrap_file(file, size, description="uploading", console=Console(stderr=True), transient=True) as shown:
        yield shown


@contextmanager
def _target(output: Path | None) -> Iterator[BinaryIO]:
    """What results are written to. A file has its name when it is whole."""
    try:
        if output is None:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        elif output.exists() and not stat.S_ISREG(output.stat().st_mode):  # a device or a pipe
            with output.open("wb") as opened:
                yield opened
        else:
            with _whole(output.resolve()) as opened:
                yield opened
    except OSError as error:
        if error.errno == errno.EPIPE:  # who reads has seen enough
            raise
        fail(f"{output or 'stdout'}: {error.strerror}.", EXIT_FAILED)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of another when all is written, and is gone when that fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as opened:
            yield opened
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _watch(server: "Server", batch: str) -> dict[str, Any]:
    """Follows a batch to its end, with a bar on a terminal and lines elsewhere; Ctrl-C leaves it to itself."""
    from .client import ServerAwayError

    def follow(api: "Api") -> dict[str, Any]:
        with _bar() as bar:
            task = bar.add_task(batch, total=None, status="", failed=0)
            seen_at = time.monotonic()
            last = ""
            while True:
                try:
                    found = _read(api, batch)
                    seen_at = time.monotonic()
                except ServerAwayError:
                    if time.monotonic() - seen_at > AWAY_S:
                        raise
                    time.sleep(POLL_S)
                    continue
                counts = found["request_counts"]
                done = counts["completed"] + counts["failed"]
                fields = {"status": found["status"], "failed": counts["failed"]}
                bar.update(task, completed=done, total=counts["total"] or None, **fields)
                if found["status"] not in UNFINISHED:
                    return found
                line = f"{found['status']} {done}/{counts['total']}"
                if not bar.console.is_terminal and line != last:
                    say(f"{batch} {line}")
                    last = line
                time.sleep(POLL_S)

    try:
        found: dict[str, Any] = _with(server, follow)
    except KeyboardInterrupt:
        say(f"It goes on. Look again: fastchat-q batch status {batch} --watch")
        raise typer.Exit(130) from None
    return found


def _bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}  {task.fields[status]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("failed {task.fields[failed]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _finish(batch: dict[str, Any], as_json: bool) -> None:
    """Says how a batch ended, in the exit code as well."""
    print_json(batch) if as_json else _show(batch)
    if batch["status"] != "completed":
        raise typer.Exit(EXIT_FAILED)


def _row(batch: dict[str, Any]) -> tuple[Any, ...]:
    counts = batch["request_counts"]
    age = duration(max(time.time() - batch["created_at"], 0))
    return (
        batch["id"],
        batch["status"],
        counts["completed"],
        counts["failed"],
        counts["total"],
        batch["endpoint"],
        age,
    )


def _show(batch: dict[str, Any]) -> None:
    counts = batch["request_counts"]
    print(f"{batch['id']}  {batch['status']}")
    print(f"  requests  {counts['completed']} done, {counts['failed']} failed, {counts['total']} in all")
    for name in ("input_file_id", "output_file_id", "error_file_id"):
        if batch.get(name):
            print(f"  {name.removesuffix('_file_id'):9} {batch[name]}")
    if batch["status"] in UNFINISHED and batch.get("expires_at"):
        print(f"  expires   {datetime.fromtimestamp(batch['expires_at'], UTC).isoformat(timespec='seconds')}")
    for error in (batch.get("errors") or {}).get("data", ()):
        where = f"line {error['line']}: " if error.get("line") is not None else ""
        print(printable(f"  error     {where}{error['message']}"))
