"""The lines of a batch's input: read from the storage block by block, checked, and made into jobs."""

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson
from ulid import ULID

from fastchat_q.errors import FastchatQError, InvalidRequestError
from fastchat_q.jobs import Job
from fastchat_q.settings import Settings
from fastchat_q.storage import Storage

from .asked import Asked
from .endpoints import ENDPOINTS
from .guard import check_json
from .render import View

BLOCK = 1024 * 1024
"""Bytes that are read at a time."""
ENVELOPE = 16 * 1024
"""What a line may have beside its body."""
MAX_CUSTOM_ID = 512
BOM = b"\xef\xbb\xbf"


class RawLine(NamedTuple):
    """A line as it stands in the file, without its newline; a line too long has no bytes."""

    number: int
    offset: int
    size: int
    raw: bytes
    """Empty: the line is longer than a line may be."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a line says around its body."""

    custom_id: str
    body: dict[str, Any]
    model: str


class LineError(Exception):
    """A line that is no request. One of them fails the batch."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param

    def to_dict(self, number: int | None) -> dict[str, Any]:
        """As the batch object shows it, for a line or the whole input."""
        return {"code": self.code, "line": number, "message": self.message, "param": self.param}


def max_line(settings: Settings) -> int:
    """Bytes that a line may have: as a request, images included."""
    return max(settings.max_body_bytes, settings.max_image_body_bytes) + ENVELOPE


class Lines:
    """The lines of an object from a place on, in order. Blank ones are counted and left out.

    It holds one block, or one line. Between two blocks nothing is open, so it may be left lying for as long as one
    likes.
    """

    def __init__(self, storage: Storage, key: str, longest: int, number: int = 1, offset: int = 0) -> None:
        self._storage, self._key, self._longest = storage, key, longest
        self.number, self.offset = number, offset
        """Of the next line."""
        self._buffer = b""
        self._at = 0
        self._fetched = offset
        self._end = False

    @property
    def done(self) -> bool:
        """Whether the end was reached."""
        return self._end and self._at >= len(self._buffer)

    async def next(self) -> RawLine | None:
        """The next line; None: there are no more."""
        while True:
            end = self._buffer.find(b"\n", self._at)
            if end < 0 and not self._end:
                if len(self._buffer) - self._at > self._longest:
                    return await self._skip()
                await self._fetch()
                continue
            if end < 0:
                if self._at >= len(self._buffer):
                    return None
                end = len(self._buffer)
            raw = self._buffer[self._at : end]
            size = len(raw)
            found = RawLine(self.number, self.offset, size, raw if size <= self._longest else b"")
            self._pass(min(end + 1, len(self._buffer)))
            if size > self._longest or raw.strip():
                return found

    def _pass(self, end: int) -> None:
        self.number, self.offset = self.number + 1, self.offset + end - self._at
        self._at = end

    async def _fetch(self) -> None:
        block = await self._storage.get_range(self._key, self._fetched, BLOCK)
        self._fetched += len(block)
        self._end = len(block) < BLOCK
        self._buffer, self._at = self._buffer[self._at :] + block, 0

    async def _skip(self) -> RawLine:
        """Goes behind a line that is too long, without holding it."""
        number, start, size = self.number, self.offset, len(self._buffer) - self._at
        self._buffer, self._at = b"", 0
        while True:
            await self._fetch()
            end = self._buffer.find(b"\n")
            if end >= 0 or self._end:
                size += end if end >= 0 else len(self._buffer)
                self._at = end + 1 if end >= 0 else len(self._buffer)
                self.number, self.offset = number + 1, start + size + 1
                return RawLine(number, start, size, b"")
            size, self._buffer = size + len(self._buffer), b""


async def lines_at(storage: Storage, key: str, places: "tuple[tuple[int, int, int], ...]") -> AsyncIterator[RawLine]:
    """Lines whose places are known, in order; those that stand together are read together."""
    some: list[tuple[int, int, int]] = []
    for place in (*sorted(places), None):
        if place is not None and (not some or place[1] + place[2] - some[0][1] <= BLOCK):
            some.append(place)
            continue
        if some:
            start = some[0][1]
            block = await storage.get_range(key, start, some[-1][1] + some[-1][2] - start)
            for number, offset, size in some:
                yield RawLine(number, offset, size, block[offset - start : offset - start + size])
        some = [place] if place is not None else []


def envelope(line: RawLine, endpoint: str) -> Envelope:
    """Reads a line.

    Raises:
        LineError: it is no request of this batch.
    """
    if not line.raw:
        raise LineError("line_too_long", f"The line has {line.size} bytes, which is more than a request may have.")
    try:
        found = orjson.loads(_json(line))
    except orjson.JSONDecodeError as error:
        raise LineError("invalid_json_line", f"This line is not parseable as valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise LineError("invalid_json_line", "This line is not a JSON object.")
    custom_id, body = found.get("custom_id"), found.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise LineError(
            "missing_required_parameter" if custom_id is None else "invalid_custom_id",
            f"A line needs a 'custom_id': a text of 1 to {MAX_CUSTOM_ID} characters.",
            "custom_id",
        )
    if found.get("method") != "POST":
        raise LineError("invalid_method", f"Invalid method: {str(found.get('method'))[:80]!r}. Send 'POST'.", "method")
    if found.get("url") != endpoint:
        raise LineError(
            "mismatched_url",
            f"The URL of this line is {str(found.get('url'))[:80]!r}, the endpoint of the batch is {endpoint!r}.",
            "url",
        )
    if not isinstance(body, dict):
        raise LineError("missing_required_parameter", "A line needs a 'body': the JSON object of the request.", "body")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise LineError("missing_required_parameter", "The body names no 'model'.", "body.model")
    if body.get("stream"):
        raise LineError("unsupported_parameter", "Batches do not stream: leave 'stream' out.", "body.stream")
    return Envelope(custom_id, body, model)


def checked_envelope(line: RawLine, endpoint: str) -> Envelope:
    """Reads a line for the first time, as strictly as a body over HTTP is read.

    Raises:
        LineError: it is no request of this batch, or has a name twice in one object.
    """
    found = envelope(line, endpoint)
    try:
        check_json(_json(line))
    except InvalidRequestError as error:
        raise LineError("invalid_json_line", error.message) from None
    return found


def _json(line: RawLine) -> bytes:
    return line.raw.removeprefix(BOM) if line.number == 1 else line.raw


def job_id(batch_id: str, number: int) -> str:
    """The id of a line's job: the same each time, so that a line which is enqueued again finds its own job."""
    began = ULID.from_str(batch_id.removeprefix("batch_")).bytes[:6]
    return str(ULID(began + hashlib.blake2b(f"{batch_id} {number}".encode(), digest_size=10).digest()))


def asked(line: RawLine, found: Envelope, endpoint: str, settings: Settings) -> Asked:
    """What a line asks for.

    Raises:
        InvalidRequestError: as over HTTP.
    """
    return ENDPOINTS[endpoint].parse(found.body, settings, line.size)


def as_batch_job(what: Asked, batch_id: str, number: int, model: str) -> tuple[Job, View]:
    """The same as a job of the batch lane, under the line's own id."""
    name = job_id(batch_id, number)
    job = what.job.model_copy(update={"id": name, "model": model, "lane": "lo"})
    return job, replace(what.view, job_id=name, lane="lo", spelt=what.spelt)


def request_id(batch_id: str, number: int) -> str:
    """The id of a line in the files of results."""
    return f"batch_req_{job_id(batch_id, number).lower()}"


def answer_line(batch_id: str, number: int, custom_id: str, answered_by: str, body: dict[str, Any]) -> bytes:
    """A line of the output file."""
    return _line(batch_id, number, custom_id, {"status_code": 200, "request_id": answered_by, "body": body}, None)


def error_line(batch_id: str, number: int, custom_id: str, answered_by: str, error: FastchatQError) -> bytes:
    """A line of the error file: the request was answered with an error."""
    response = {"status_code": error.status, "request_id": answered_by, "body": error.body()}
    return _line(batch_id, number, custom_id, response, None)


def expired_line(batch_id: str, number: int, custom_id: str) -> bytes:
    """A line of the error file: the request was not answered in time."""
    message = "This request could not be executed before the completion window expired."
    return _line(batch_id, number, custom_id, None, {"code": "batch_expired", "message": message})


def _line(batch_id: str, number: int, custom_id: str, response: Any, error: Any) -> bytes:
    found = {"id": request_id(batch_id, number), "custom_id": custom_id, "response": response, "error": error}
    return orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE)


def no_such_input(file_id: str) -> LineError:
    """The input file of a batch is gone."""
    return LineError("file_not_found", f"The input file {file_id!r} is not there any more.", "input_file_id")
