"""The outermost layer: request id, bearer key, scope, content type and body size, checked before anything is parsed."""

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from fastchat_q.errors import AuthenticationError, FastchatQError, InvalidRequestError, RequestTooLargeError

from .auth import Authenticator, check_scope, required_scope
from .problems import error_response

TAKES_IMAGES = ("/v1/chat/completions", "/tokenize")
IMAGE = re.compile(rb'"data:image\\?/[^"]*"')
"""A data URL in JSON: it is left out of the size here. Whether it is an image is seen when it is read."""
DRAIN_LIMIT = 64 * 1024 * 1024
"""A refused body is read and thrown away up to here, so that the client gets to see the answer."""


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is not JSON."""

    status = 415
    code = "unsupported_media_type"


class Guard:
    """ASGI middleware for the whole application.

    Args:
        max_body_bytes: of a body, its images not counted.
        max_image_body_bytes: of a body with images.
    """

    def __init__(
        self, app: ASGIApp, authenticator: Authenticator, max_body_bytes: int, max_image_body_bytes: int
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._max_body_bytes = max_body_bytes
        self._max_image_body_bytes = max(max_body_bytes, max_image_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")[:128] or f"req_{ULID()}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            needed = required_scope(scope["path"])
            if needed is not None:
                caller = await self._authenticator.caller(headers.get("authorization"))
                check_scope(caller, needed, scope["path"])
                scope.setdefault("state", {})["caller"] = caller
            if scope["method"] in ("POST", "PUT", "PATCH") and _has_body(headers):
                receive = await self._read_body(headers, receive, scope["path"] in TAKES_IMAGES)
        except AuthenticationError as error:
            await error_response(error, {"www-authenticate": "Bearer"})(scope, receive, send_with_id)
        except FastchatQError as error:
            await error_response(error, {"connection": "close"})(scope, receive, send_with_id)
        else:
            await self._app(scope, receive, send_with_id)

    async def _read_body(self, headers: Headers, receive: Receive, takes_images: bool) -> Receive:
        """Reads the body within the limit and returns a receive that gives it again, whole."""
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json" and not content_type.endswith("+json"):
            raise UnsupportedMediaTypeError(
                f"Content-Type {content_type!r} is not supported. Send JSON, with Content-Type: application/json."
            )
        declared = headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() else 0
        limit = self._max_image_body_bytes if takes_images else self._max_body_bytes
        too_large = size > limit
        parts: list[bytes] = []
        total = 0
        more = size <= DRAIN_LIMIT
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return _replay(message, receive)
            part = message.get("body", b"")
            total += len(part)
            more = message.get("more_body", False) and total <= DRAIN_LIMIT
            too_large = too_large or total > limit
            if not too_large:
                parts.append(part)
        body = b"" if too_large else b"".join(parts)
        del parts
        if not too_large and total > self._max_body_bytes:
            check_rest(total, sum(len(found[0]) for found in IMAGE.finditer(body)), self._max_body_bytes)
        if too_large:
            setting = "FASTCHAT_Q_MAX_IMAGE_BODY_BYTES" if takes_images else "FASTCHAT_Q_MAX_BODY_BYTES"
            raise RequestTooLargeError(
                f"The request body has {max(size, total)} bytes, the limit is {limit}. "
                f"Shorten the messages, or raise {setting} on the server."
            )
        return _replay({"type": "http.request", "body": body, "more_body": False}, receive)


def check_rest(size: int, image_bytes: int, limit: int) -> None:
    """Raises RequestTooLargeError if a body of so many bytes is too large without its images."""
    if size - image_bytes > limit:
        images = f", the limit is {limit}" if not image_bytes else f" beside its images, the limit is {limit}"
        raise RequestTooLargeError(
            f"The request body has {size - image_bytes} bytes{images}. "
            "Shorten the messages, or raise FASTCHAT_Q_MAX_BODY_BYTES on the server."
        )


def _has_body(headers: Headers) -> bool:
    """Without one there is nothing to check: ``curl -X POST`` of a cancel sends neither a body nor its type."""
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _replay(first: Message, receive: Receive) -> Receive:
    waiting: list[Message] = [first]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
