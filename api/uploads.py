"""Forms with a file in them, as they arrive: the file's bytes pass through, the other fields are kept and checked.

It knows what a form may hold, and nothing of where the bytes go.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from fastchat_q.errors import InvalidRequestError, RequestTooLargeError

from .guard import DRAIN_LIMIT

PURPOSES = ("fine-tune", "assistants", "batch", "user_data", "vision", "evals")
"""What a client may say that a file is for."""
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FIELDS = ("file", "purpose", ANCHOR, SECONDS)
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000
BATCH_EXPIRY_S = MAX_EXPIRY_S
"""Files for batches do not stay for ever unless they are asked to."""
MAX_FIELD = 1024
MAX_FILENAME = 512
FRAMING = 64 * 1024
"""What a form may hold beside the file, in bytes."""
UNNAMED = "upload"


class StalledUploadError(InvalidRequestError):
    """The client sends nothing any more."""

    status = 408
    code = "upload_stalled"


class Body:
    """A request's body, read piece by piece.

    Args:
        patience_s: how long the client may send nothing.
    """

    def __init__(self, request: Request, patience_s: float) -> None:
        self._request, self._patience_s = request, patience_s
        self._more = True

    async def pieces(self) -> AsyncIterator[bytes]:
        """What is left of it.

        Raises:
            ClientDisconnect: the client hung up before its end.
            StalledUploadError: it sends nothing.
        """
        while self._more:
            try:
                async with asyncio.timeout(self._patience_s):
                    message = await self._request.receive()
            except TimeoutError as error:
                self._more = False
                raise StalledUploadError(
                    f"The upload has stood still for {self._patience_s:g} s. Nothing was kept; send it again."
                ) from error
            if message["type"] == "http.disconnect":
                self._more = False
                raise ClientDisconnect
            self._more = message.get("more_body", False)
            yield message.get("body", b"")

    async def drain(self) -> bool:
        """Reads what is left and throws it away, so that the client gets to see an answer; False: it was too much."""
        size = 0
        async for piece in self.pieces():
            size += len(piece)
            if size > DRAIN_LIMIT:
                break
        return not self._more


class UploadForm:
    """The form of an upload. Fields may come before or behind the file; each is checked when it is there.

    Args:
        content_type: the request's header, with the boundary.
        check_size: raises when a file of so many bytes is too much.

    Raises:
        InvalidRequestError: here and from every method: what is wrong with the form, in OpenAI's words.
    """

    def __init__(self, content_type: str, check_size: Callable[[int], None]) -> None:
        self.filename: str | None = None
        self.size = 0
        self._fields: dict[str, str] = {}
        self._check_size = check_size
        self._pieces: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._header_name, self._header_value = b"", b""
        self._name = ""
        self._value = b""
        self._ended = False
        callbacks: Any = {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise _junk("its Content-Type names no boundary")
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise _junk(str(error)) from error

    async def file(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The bytes of the file as they come; behind them, the whole form has been read and is in order."""
        async for piece in body:
            try:
                self._parser.write(piece)
            except FormParserError as error:
                raise _junk(str(error)) from error
            pieces, self._pieces = self._pieces, []
            for piece_of_file in pieces:
                yield piece_of_file
        if not self._ended:
            raise _junk("it ends before its last boundary")
        for name, there in (("file", self.filename), ("purpose", self._fields.get("purpose"))):
            if there is None:
                raise InvalidRequestError(
                    f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
                )
        if (ANCHOR in self._fields) != (SECONDS in self._fields):
            name = ANCHOR if SECONDS in self._fields else SECONDS
            raise InvalidRequestError(
                f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
            )

    @property
    def purpose(self) -> str:
        """What the file is for."""
        return self._fields["purpose"]

    @property
    def expires_after_s(self) -> int | None:
        """How long the file is to be kept; None: until it is deleted."""
        if SECONDS in self._fields:
            return int(self._fields[SECONDS])
        return BATCH_EXPIRY_S if self.purpose == "batch" else None

    def _on_part_begin(self) -> None:
        self._headers = {}
        self._name, self._value = "", b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name, self._header_value = b"", b""

    def _on_headers_finished(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        if disposition != b"form-data" or b"name" not in options:
            raise _junk("a part has no Content-Disposition: form-data with a name")
        name = _text(options[b"name"], "the name of a field")
        if name not in FIELDS:
            raise InvalidRequestError(f"Unknown parameter: '{name[:80]}'.", param=name[:80], code="unknown_parameter")
        if name in self._fields or (name == "file" and self.filename is not None):
            raise InvalidRequestError(
                f"The form has '{name}' more than once. Send one file in a request.",
                param=name,
                code="duplicate_parameter",
            )
        if name == "file":
            self.filename = _filename(options)
        self._name = name

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.size += end - start
            self._check_size(self.size)
            self._pieces.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD:
            raise InvalidRequestError(
                f"The value of '{self._name}' has more than {MAX_FIELD} bytes.", param=self._name, code="invalid_value"
            )

    def _on_part_end(self) -> None:
        if self._name != "file":
            value = _text(self._value, f"'{self._name}'")
            CHECKS[self._name](value)
            self._fields[self._name] = value

    def _on_end(self) -> None:
        self._ended = True


def check_declared(content_length: str | None, max_file_bytes: int) -> None:
    """Refuses what says of itself that it is too large.

    Raises:
        RequestTooLargeError: whatever else its form holds, the file in it is.
    """
    if content_length is not None and content_length.isdecimal():
        check_file_size(int(content_length) - FRAMING, max_file_bytes)


def check_file_size(size: int, limit: int) -> None:
    """Raises RequestTooLargeError if a file of so many bytes is too large."""
    if size > limit:
        raise RequestTooLargeError(
            f"The file has more than {limit} bytes, which is the limit. Split it, or raise FASTCHAT_Q_MAX_FILE_BYTES "
            "on the server."
        )


def _check_purpose(value: str) -> None:
    if value not in PURPOSES:
        raise _invalid("purpose", f"{value[:80]!r} is not one of {list(PURPOSES)}")


def _check_anchor(value: str) -> None:
    if value != "created_at":
        raise _invalid(ANCHOR, f"{value[:80]!r} is not 'created_at', the only anchor")


def _check_seconds(value: str) -> None:
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and MIN_EXPIRY_S <= int(value) <= MAX_EXPIRY_S):
        raise _invalid(SECONDS, f"{value[:80]!r} is not a whole number from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}")


CHECKS: Mapping[str, Callable[[str], None]] = {
    "purpose": _check_purpose,
    ANCHOR: _check_anchor,
    SECONDS: _check_seconds,
}


def _filename(options: Mapping[bytes, bytes]) -> str:
    """As the client says it, without the folders that some put before it. ``%22`` is how clients spell a quote there:
    https://html.spec.whatwg.org/multipage/form-control-infrastructure.html#multipart-form-data
    """
    name = _text(options.get(b"filename", b""), "the filename").replace("%22", '"')
    name = name.replace("\\", "/").rpartition("/")[2]
    if len(name) > MAX_FILENAME:
        raise _invalid("file", f"its name has {len(name)} characters, the limit is {MAX_FILENAME}")
    if any(not character.isprintable() for character in name):
        raise _invalid("file", f"its name {json.dumps(name)[:80]} holds control characters")
    return name or UNNAMED


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The form cannot be read: {what} is not UTF-8.", code="invalid_multipart") from error


def _invalid(name: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid value for '{name}': {reason}.", param=name, code="invalid_value")


def _junk(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"The form cannot be read: {reason}.", code="invalid_multipart")
