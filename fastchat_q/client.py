"""How our own commands talk to an API server: where it is, with which key, and what to say when it fails.

For the commands only. Programs use OpenAI's clients, which work unchanged.
"""

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx2

from . import __version__
from .addresses import http_base, is_loopback
from .cli_common import EXIT_AWAY, EXIT_FAILED, EXIT_NOT_FOUND, fail
from .credentials import KEY_FILE
from .errors import ConfigurationError, FastchatQError
from .settings import Settings

CONNECT_S = 5.0
SILENCE_S = 60.0
"""A stream says something at least every 15 s; one that is silent for so long is dead."""
RETRIES = 2
MAX_WAIT_S = 30.0
"""A server that asks for more patience than this is not asked again."""
T = TypeVar("T")


class ServerAwayError(FastchatQError):
    """No server answers, or it hung up in the middle of an answer."""


class RefusedError(FastchatQError):
    """The server answered with an error; it is passed on as the server said it."""

    def __init__(self, status: int, error: Mapping[str, Any], retry_after_s: float | None = None) -> None:
        super().__init__(str(error.get("message") or f"HTTP status {status}"), param=error.get("param"))
        self.status, self.code, self.wait_s = status, error.get("code"), retry_after_s


@dataclass(frozen=True, slots=True)
class Server:
    """An API server and the key for it."""

    url: str
    """Without ``/v1``."""
    api_key: str | None = None

    @classmethod
    def find(cls, settings: Settings, base_url: str | None = None, api_key: str | None = None) -> "Server":
        """The server that was named; else the one that ``up`` runs on the state directory; else where one would listen.

        The key of the state directory is sent to that server and to loopback addresses only.

        Raises:
            ConfigurationError: the URL is none.
        """
        own = running(settings.state_dir) or http_base(settings.host, settings.port)
        named = base_url or settings.base_url
        url = re.sub(r"(/v1)?/*$", "", named.strip()) if named else own
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ConfigurationError(f"--base-url {named!r}: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigurationError(f"--base-url {named!r} is no address: expected such as http://127.0.0.1:8000/v1")
        key = api_key or (settings.api_key.get_secret_value() if settings.api_key else None)
        if key is None and (url == own or is_loopback(parsed.host)):
            key = _read(settings.state_dir / KEY_FILE)
        return cls(url, key)


def running(state_dir: Path) -> str | None:
    """The address of the ``up`` that runs on a state directory; None: there is none."""
    found = re.fullmatch(r"pid (\d+), (https?://\S+)", _read(state_dir / "up.lock") or "")
    if found is None:
        return None
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it is somebody else's
        pass
    return found[2]


class ServerEvent(NamedTuple):
    """Of a stream: an event with its data, or a comment."""

    id: str | None
    data: str | None
    comment: str | None = None


class Api:
    """One server. Requests that it has no room for (429, 503) are sent again as it says, a few times.

    Args:
        waits: told before such a pause: its seconds and what the server said.
    """

    def __init__(self, server: Server, waits: Callable[[float, str], None] = lambda wait_s, why: None) -> None:
        self.server = server
        self._waits = waits
        headers = {"user-agent": f"fastchat-q/{__version__}"}
        if server.api_key:
            headers["authorization"] = f"Bearer {server.api_key}"
        self.http = httpx2.Client(
            base_url=server.url,
            headers=headers,
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            trust_env=not is_loopback(httpx2.URL(server.url).host),  # no proxy to this very machine
        )

    def __enter__(self) -> "Api":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def get(self, path: str, **params: Any) -> Any:
        """The JSON of a GET; parameters that are None are left out."""
        return self.call("GET", path, params={name: value for name, value in params.items() if value is not None})

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        """The JSON of a POST."""
        return self.call("POST", path, json=body, **options)

    def delete(self, path: str) -> Any:
        """The JSON of a DELETE."""
        return self.call("DELETE", path)

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of a reply.

        Raises:
            RefusedError: the server said no.
            ServerAwayError: it said nothing.
        """
        with self.open(method, path, **options) as response:
            try:
                return json.loads(response.read())
            except ValueError as error:
                raise ServerAwayError(f"{self.server.url} is no fastchat-q: it answers {path} without JSON.") from error

    @contextmanager
    def open(self, method: str, path: str, **options: Any) -> Iterator[httpx2.Response]:
        """A reply with its body still to be read.

        Raises:
            RefusedError, ServerAwayError: as `call`; the latter also while the body is read.
        """
        with self._translated():
            for retries_left in range(RETRIES, -1, -1):
                with self.http.stream(method, path, **options) as response:
                    if response.is_success:
                        yield response
                        return
                    refusal = refused(response)
                wait_s = refusal.wait_s
                if not retries_left or wait_s is None or wait_s > MAX_WAIT_S:
                    raise refusal
                self._waits(wait_s, refusal.message)
                time.sleep(wait_s * random.uniform(1.0, 1.25))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise ServerAwayError(
                f"No server answers at {self.server.url} ({str(error) or 'timeout'}). `fastchat-q up` starts one; "
                "--base-url or FASTCHAT_Q_BASE_URL names another."
            ) from error
        except (httpx2.RequestError, httpx2.StreamError) as error:
            raise ServerAwayError(f"{self.server.url} hung up ({str(error) or type(error).__name__}).") from error


def refused(response: httpx2.Response) -> RefusedError:
    """What an error's body says, OpenAI's or any other."""
    try:
        raw = response.read()
    except httpx2.RequestError:
        raw = b""
    try:
        error = json.loads(raw)["error"]
        error = error if isinstance(error, dict) else {"message": str(error)}
    except (ValueError, KeyError, TypeError):
        error = {"message": f"HTTP status {response.status_code} {response.reason_phrase}"}
    after = response.headers.get("retry-after", "")
    wait_s = float(after) if response.status_code in (429, 503) and re.fullmatch(r"\d+(\.\d+)?", after) else None
    return RefusedError(response.status_code, error, wait_s)


def server_events(chunks: Iterator[bytes]) -> Iterator[ServerEvent]:
    """The events and comments of a stream; what came of a last one that was cut off is dropped.

    By hand: readers of lines take U+2028 for the end of one, which JSON may hold, and readers of events drop comments,
    which say the place in the queue.
    """
    name: str | None = None
    data: list[str] = []
    for line in _lines(chunks):
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line.startswith(":"):
            yield ServerEvent(None, None, value)
        elif key == "data":
            data.append(value)
        elif key == "id":
            name = value
        elif not line and data:
            yield ServerEvent(name, "\n".join(data))
            name, data = None, []


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode(errors="replace")


def exit_code(error: FastchatQError) -> int:
    """Of a command that failed so: 3: no server, 4: no such thing, 1: anything else."""
    if isinstance(error, ServerAwayError):
        return EXIT_AWAY
    return EXIT_NOT_FOUND if error.status == 404 else EXIT_FAILED


def told(error: FastchatQError) -> str:
    """An error in a line, with the way out that only the command line knows."""
    if isinstance(error, RefusedError) and error.status == 401:
        return f"{error.message} Give one with --api-key or FASTCHAT_Q_API_KEY."
    return error.message


def with_server(server: Server, action: Callable[[Api], T], waits: Callable[[float, str], None] | None = None) -> T:
    """Runs ``action`` with the server; what the server says against it ends the command, in a line and an exit code."""
    try:
        with Api(server, waits) if waits else Api(server) as api:
            return action(api)
    except (RefusedError, ServerAwayError) as error:
        fail(told(error), exit_code(error))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
