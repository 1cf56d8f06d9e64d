"""The layer around all routes: request id, bearer key, scope, and a body that is JSON, in time and not too large.

What a route does not answer is answered here, so that this answer has a request id as well.
"""

import asyncio
import contextlib
import json
import re
import time
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from fastchat_q.errors import (
    AuthenticationError,
    FastchatQError,
    InvalidRequestError,
    RequestTimeoutError,
    RequestTooLargeError,
)

from .anthropic.errors import speaks_anthropic
from .auth import Authenticator, check_scope, required_scope
from .problems import BUG, error_response

log = structlog.get_logger()

TAKES_IMAGES = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize")
TAKES_FORMS = ("/v1/files",)
"""Their bodies pass unread: the route reads them piece by piece, within limits of its own."""
IMAGE = re.compile(rb'"data:image\\?/[^"]*"|"data"\s*:\s*"[^"]*"')
"""A data URL in JSON, or the data of an image block: left out of the size here. Whether it is one is seen when it
is read."""
DRAIN_LIMIT = 64 * 1024 * 1024
DRAIN_S = 30.0
"""What still comes of a refused body is read and thrown away, so much of it and for so long: a client that reads
nothing before all is sent would meet a closed connection, and see no answer."""
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)
"""What a client may call its request: anything else gets an id of ours."""
INLINE_BYTES = 256 * 1024
"""A larger body is parsed on another thread: other streams must not wait for that."""


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is not JSON, or not a form where one is taken."""

    status = 415
    code = "unsupported_media_type"


class Guard:
    """ASGI middleware for the whole application.

    Args:
        max_body_bytes: of a body, its images not counted.
        max_image_body_bytes: of a body with images.
        body_timeout_s: how long a body may take to come.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        max_body_bytes: int,
        max_image_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._max_body_bytes = max_body_bytes
        self._max_image_body_bytes = max(max_body_bytes, max_image_body_bytes)
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = scope["path"].rstrip("/") or "/"  # a redirect would name another address behind a proxy
        headers, began, started = Headers(scope=scope), time.perf_counter(), False
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        names = ("x-request-id", "request-id") if speaks_anthropic(scope) else ("x-request-id",)

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                added = MutableHeaders(scope=message)
                added["openai-processing-ms"] = str(round((time.perf_counter() - began) * 1000))
                for name in names:
                    added[name] = request_id
            await send(message)

        incoming = Incoming(receive)
        try:
            receive = await self._checked(scope, headers, incoming)
        except AuthenticationError as error:
            await error_response(error, scope, {"www-authenticate": "Bearer"})(scope, incoming, send_with_id)
            return
        except FastchatQError as error:
            response = error_response(error, scope, {"connection": "close"})
            late = isinstance(error, RequestTimeoutError)  # waited for long enough
            await response(scope, incoming, send_with_id if late else incoming.outlasting(send_with_id))
            return
        if scope["method"] == "HEAD" and takes_head(scope["path"]):
            scope = {**scope, "method": "GET"}  # the server, which has the original, leaves the body out
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.error("unexpected error", path=scope["path"], request_id=request_id, exc_info=error)
            if started:
                raise
            await error_response(FastchatQError(BUG), scope)(scope, receive, send_with_id)

    async def _checked(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Lets a request in, and returns what its body comes from."""
        needed = required_scope(scope["path"])
        if needed is not None and scope["method"] != "OPTIONS":
            caller = await self._authenticator.caller(headers.get("authorization"), headers.get("x-api-key"))
            check_scope(caller, needed, scope["path"])
            scope["state"]["caller"] = caller
        if scope["method"] not in ("POST", "PUT", "PATCH") or not _has_body(headers):
            return receive
        if scope["path"] in TAKES_FORMS:
            check_is_form(headers)
            return receive
        return await self._read_body(headers, receive, scope["path"] in TAKES_IMAGES)

    async def _read_body(self, headers: Headers, receive: Receive, takes_images: bool) -> Receive:
        """Reads the body within the limit and returns a receive that gives it again, whole."""
        content_type = media_type(headers)
        if content_type != "application/json" and not content_type.endswith("+json"):
            raise UnsupportedMediaTypeError(
                f"Content-Type {content_type!r} is not supported. Send JSON, with Content-Type: application/json."
            )
        declared = headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() else 0
        limit = self._max_image_body_bytes if takes_images else self._max_body_bytes
        setting = "FASTCHAT_Q_MAX_IMAGE_BODY_BYTES" if takes_images else "FASTCHAT_Q_MAX_BODY_BYTES"
        if size > limit:
            raise _too_large(f"{size} bytes", limit, setting)
        parts: list[bytes] = []
        total, more = 0, True
        deadline = asyncio.get_running_loop().time() + self._body_timeout_s
        while more:
            message = await self._next(receive, deadline, total)
            if message["type"] == "http.disconnect":
                return _replay(message, receive)
            parts.append(message.get("body", b""))
            total += len(parts[-1])
            if total > limit:
                raise _too_large(f"more than {limit} bytes", limit, setting)
            more = message.get("more_body", False)
        body = b"".join(parts)
        del parts
        if total > self._max_body_bytes:
            check_rest(total, sum(len(found[0]) for found in IMAGE.finditer(body)), self._max_body_bytes)
        if total <= INLINE_BYTES:
            check_json(body)
        else:
            await asyncio.to_thread(check_json, body)
        return _replay({"type": "http.request", "body": body, "more_body": False}, receive)

    async def _next(self, receive: Receive, deadline: float, total: int) -> Message:
        try:
            async with asyncio.timeout_at(deadline):
                return await receive()
        except TimeoutError:
            raise RequestTimeoutError(
                f"The request body was not whole within {self._body_timeout_s:g} seconds; {total} bytes came."
            ) from None


class Incoming:
    """What a client sends of a body, and whether more of it may come."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._more = True

    async def __call__(self) -> Message:
        """ASGI's receive."""
        message = await self._receive()
        self._more = message.get("more_body", False)
        return message

    def outlasting(self, send: Send) -> Send:
        """A send that holds back the end of an answer, at which the connection is closed, while a body still comes.

        The client has the whole answer before: how long it is stands in its head.
        """

        async def send_and_drain(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await self._drain()
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        return send_and_drain

    async def _drain(self) -> None:
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._more and size <= DRAIN_LIMIT:
                    size += len((await self()).get("body", b""))


def takes_head(path: str) -> bool:
    """Whether HEAD is GET without its body; a stream has nothing but its body."""
    return not path.endswith("/events")


def check_json(body: bytes) -> None:
    """Refuses what is no JSON, and an object that has a name twice: which one counts is for no parser to guess.

    Raises:
        InvalidRequestError: the message says where.
    """
    if not body:
        return
    try:
        json.loads(body.decode(), object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        raise _no_json(f"{error.msg} (line {error.lineno}, column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise _no_json(f"it is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise _no_json("it is nested too deeply") from error
    except ValueError as error:  # an integer with more digits than Python converts
        raise _no_json("it holds a number that is too large") from error


def _each_once(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) < 2:
        return
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise _no_json(f"it has {name[:80]!r} twice in one object")
        seen.add(name)


def _no_json(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"We could not parse the JSON body of your request: {reason}.", code="invalid_json")


def media_type(headers: Headers) -> str:
    """The Content-Type without its parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def check_is_form(headers: Headers) -> None:
    """Raises UnsupportedMediaTypeError for a body that is no form."""
    if media_type(headers) != "multipart/form-data":
        raise UnsupportedMediaTypeError(
            f"Content-Type {media_type(headers)!r} is not supported here. Send a form: multipart/form-data."
        )


def check_rest(size: int, image_bytes: int, limit: int) -> None:
    """Raises RequestTooLargeError if a body of so many bytes is too large without its images."""
    if size - image_bytes > limit:
        images = f", the limit is {limit}" if not image_bytes else f" beside its images, the limit is {limit}"
        raise RequestTooLargeError(
            f"The request body has {size - image_bytes} bytes{images}. "
            "Shorten the messages, or raise FASTCHAT_Q_MAX_BODY_BYTES on the server."
        )


def _too_large(size: str, limit: int, setting: str) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"The request body has {size}, the limit is {limit}. Shorten the messages, or raise {setting} on the server."
    )


def _request_id(headers: Headers) -> str:
    """The client's, where it is one that can be logged and sent back as it is; else a new one."""
    for name in ("x-request-id", "x-client-request-id"):
        if REQUEST_ID.fullmatch(given := headers.get(name, "")):
            return given
    return f"req_{ULID()}"


def _has_body(headers: Headers) -> bool:
    """Without one there is nothing to check: ``curl -X POST`` of a cancel sends neither a body nor its type."""
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _replay(first: Message, receive: Receive) -> Receive:
    waiting: list[Message] = [first]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
