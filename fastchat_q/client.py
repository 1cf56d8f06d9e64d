"""How our own commands talk to an API server: where it is, with which key, and what to say when it fails.

For the commands only. Programs use OpenAI's clients, which work unchanged.
"""

import contextlib
import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
ANSWER_S = 20.0
"""A reply that waits for no model begins, and goes on, within so long; else the server is as good as dead."""
SILENCE_S = 60.0
"""A stream says something at least every 15 s; one that is silent for so long is dead."""
RESUME_S = 60.0
"""A stream that was cut is tried to be continued for so long."""
RECONNECT_S = 0.5
RECONNECTING = "reconnecting"
CHAT = "/v1/chat/completions"
RETRIES = 2
MAX_WAIT_S = 30.0
"""A server that asks for more patience than this is not asked again."""
T = TypeVar("T")


class ServerAwayError(FastchatQError):
    """No server answers."""


class HungUpError(ServerAwayError):
    """The server had the request, and is gone before its answer was whole."""


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
        """The JSON of a GET, which waits for no model; parameters that are None are left out."""
        given = {name: value for name, value in params.items() if value is not None}
        return self.call("GET", path, params=given, timeout=ANSWER_S)

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        """The JSON of a POST. One that waits for a model may take its time: others give ``timeout``."""
        return self.call("POST", path, json=body, **options)

    def delete(self, path: str) -> Any:
        """The JSON of a DELETE."""
        return self.call("DELETE", path, timeout=ANSWER_S)

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
            raise HungUpError(f"{self.server.url} hung up ({str(error) or type(error).__name__}).") from error


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


class StreamedAnswer:
    """A chat's answer, read to its end though API servers die meanwhile: it goes on behind the last event that came.

    Args:
        body: of ``POST /v1/chat/completions``.
    """

    def __init__(self, api: Api, body: Mapping[str, Any]) -> None:
        self._api, self._body = api, {**body, "stream": True}
        self._key = uuid.uuid4().hex  # sent twice, the request is still one job
        self._last_id: str | None = None
        self.job_id: str | None = None

    def __iter__(self) -> Iterator[ServerEvent]:
        """All events but the last, ``[DONE]``; a comment ``reconnecting`` while no server answers.

        Raises:
            RefusedError: the request, or the job, failed.
            ServerAwayError: there is no server, or none came back within `RESUME_S`.
        """
        heard = time.monotonic()
        sent = False
        while True:
            try:
                with self._open() as response:
                    sent = True
                    self.job_id = response.headers.get("x-job-id") or self.job_id
                    for event in server_events(response.iter_bytes()):
                        heard = time.monotonic()
                        self._last_id = event.id or self._last_id
                        if event.data == "[DONE]":
                            return
                        _raise_if_failed(event)
                        yield event
                raise HungUpError(f"{self._api.server.url} hung up.")
            except ServerAwayError as error:
                sent = sent or isinstance(error, HungUpError)
                if not sent or time.monotonic() - heard > RESUME_S:
                    raise
            yield ServerEvent(None, None, RECONNECTING)
            time.sleep(RECONNECT_S)

    def cancel(self) -> None:
        """Ends the job; without a server, its own grace ends it."""
        if self.job_id is not None:
            with contextlib.suppress(RefusedError, ServerAwayError):
                self._api.call("POST", f"/v1/jobs/{self.job_id}/cancel", timeout=CONNECT_S)

    def _open(self) -> AbstractContextManager[httpx2.Response]:
        patience = httpx2.Timeout(SILENCE_S, connect=CONNECT_S)
        if self.job_id is None:
            headers = {"idempotency-key": self._key}
            return self._api.open("POST", CHAT, json=self._body, headers=headers, timeout=patience)
        headers = {} if self._last_id is None else {"last-event-id": self._last_id}
        return self._api.open("GET", f"/v1/jobs/{self.job_id}/events", headers=headers, timeout=patience)


def whole_answer(api: Api, body: Mapping[str, Any]) -> Any:
    """A chat's answer in one piece; asked for again, as the same job, when an API server dies over it."""
    headers = {"idempotency-key": uuid.uuid4().hex}
    gone: float | None = None
    while True:
        try:
            return api.post(CHAT, dict(body), headers=headers)
        except ServerAwayError as error:
            if gone is None and not isinstance(error, HungUpError):
                raise
            gone = gone or time.monotonic()
            if time.monotonic() - gone > RESUME_S:
                raise
        time.sleep(RECONNECT_S)


def _raise_if_failed(event: ServerEvent) -> None:
    """An error in a stream has no status."""
    if event.data is not None and event.data.startswith('{"error"'):
        error = json.loads(event.data)["error"]
        raise RefusedError(500, error if isinstance(error, dict) else {"message": str(error)})


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
