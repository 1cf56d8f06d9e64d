"""What comes back from a worker: `Delta` (tokens) and `End` (exactly one a job), and how they look on the wire.

A published message is one or more lines; a line is ``<job id> <n> <k> <payload>`` for k tokens that bring the count to
n, or ``<job id> <n> end <json>``. The token log holds the same payload under the id ``0-<n>``.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import orjson

from .errors import DeadlineError, FastchatQError, InvalidRequestError, JobFailedError, QueueUnavailableError
from .versions import known_fields

TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled", "expired", "dead"})
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class ToolCallDelta(NamedTuple):
    """A part of a tool call: ``id`` and ``name`` come with its first part, ``arguments`` (JSON text) in fragments."""

    call: int
    """Which of the answer's calls, from 0."""
    arguments: str = ""
    id: str | None = None
    name: str | None = None


LOG_OF_0 = float("-inf")
"""Of a token that cannot come; null in JSON."""


SPELT = "bytes:"
_SPELT_BYTES = re.compile(r"bytes:(?:\\x[0-9a-f]{2})+")


class Alternative(NamedTuple):
    """A token that the model might have chosen."""

    id: int
    token: str
    """What it decodes to by itself; see `TokenLogprob`."""
    logprob: float
    """Natural logarithm."""


class TokenLogprob(NamedTuple):
    """What the model thought of a token before temperature and penalties, and of the likeliest others.

    A token that is a part of a character is told by its bytes (`spelt`), or as U+FFFD where they are not known.
    """

    id: int
    token: str
    logprob: float
    top: tuple[Alternative, ...] = ()


def spelt(raw: bytes) -> str:
    r"""The text of a token; ``bytes:\xf0\x9f`` if it makes no characters by itself, as OpenAI's completions have it."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return SPELT + "".join([f"\\x{byte:02x}" for byte in raw])


def token_bytes(token: str) -> bytes | None:
    """The bytes of a token by its text; None: they are not known."""
    if _SPELT_BYTES.fullmatch(token):
        return bytes.fromhex(token.removeprefix(SPELT).replace("\\x", ""))
    return None if "\ufffd" in token else token.encode()


class Piece(NamedTuple):
    """What some tokens of one choice say. What may be shown can lag behind the ids (``engines/processing/text.py``)."""

    ids: tuple[int, ...] = ()
    text: str = ""
    """Content that may be shown."""
    choice: int = 0
    """Which of the answers (of embeddings: which of the inputs) it belongs to."""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    """This choice ends here. Only in jobs with several choices: of a job with one, its end says it."""
    vector: str = ""
    """Of an embedding: base64 of little-endian float32. Of a reranker: the same, one score."""
    units: int = 0
    """What it counts for in the log if it has no ids: one for what an upstream server sent, or for an embedding."""
    echo: bool = False
    """It is the prompt, told back before the answer. Its first token has no log probability: 0 stands for none."""

    @property
    def k(self) -> int:
        """What it counts for in the log."""
        return self.units or len(self.ids)

    @property
    def is_plain(self) -> bool:
        """Whether ids and text are all there is to it."""
        return self[2:] == PLAIN

    @property
    def said(self) -> str:
        """All that it says, in whatever part of the answer."""
        return self.reasoning + self.text + "".join([call.arguments for call in self.tool_calls])


PLAIN = Piece()[2:]


def merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Pieces that go out together: one for each choice (and its prompt), in the order in which they came."""
    if all(piece.is_plain for piece in pieces):
        if len(pieces) == 1:
            return (pieces[0],)
        return (Piece(tuple([i for piece in pieces for i in piece.ids]), "".join([piece.text for piece in pieces])),)
    by_choice: dict[tuple[int, bool], list[Piece]] = {}
    for piece in pieces:
        by_choice.setdefault((piece.choice, piece.echo), []).append(piece)
    return tuple([some[0] if len(some) == 1 else _joined(some) for some in by_choice.values()])


def _joined(pieces: list[Piece]) -> Piece:
    """Pieces of one choice as one."""
    return Piece(
        ids=tuple([i for piece in pieces for i in piece.ids]),
        text="".join([piece.text for piece in pieces]),
        choice=pieces[0].choice,
        reasoning="".join([piece.reasoning for piece in pieces]),
        tool_calls=_joined_calls([call for piece in pieces for call in piece.tool_calls]),
        logprobs=tuple([one for piece in pieces for one in piece.logprobs]),
        finish=pieces[-1].finish,
        vector="".join([piece.vector for piece in pieces]),
        units=sum([piece.units for piece in pieces]),
        echo=pieces[0].echo,
    )


def _joined_calls(calls: Iterable[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    by_call: dict[int, ToolCallDelta] = {}
    for call in calls:
        first = by_call.get(call.call)
        by_call[call.call] = call if first is None else first._replace(arguments=first.arguments + call.arguments)
    return tuple(by_call.values())


@dataclass(frozen=True)
class Delta:
    """Tokens n-k+1 … n of a job."""

    n: int
    k: int
    pieces: tuple[Piece, ...]

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """The ids of all pieces, one after another."""
        if len(self.pieces) == 1:
            return self.pieces[0].ids
        return tuple([i for piece in self.pieces for i in piece.ids])

    @cached_property
    def said(self) -> str:
        """All that the pieces say, one after another."""
        return "".join([piece.said for piece in self.pieces])

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is tokens and text of a single answer."""
        return len(self.pieces) == 1 and self.pieces[0].is_plain


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of the whole job, over all its attempts."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens

    def to_dict(self) -> dict[str, int]:
        """OpenAI's ``usage`` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """How a job that a worker ended came out: a finish reason and usage, or an error object with its HTTP status."""

    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: dict[str, Any] | None = None
    stop: str | None = None
    """The stop string of the request that ended the answer; None: none did, or its engine does not tell which."""

    def to_json(self) -> bytes:
        """JSON without nulls."""
        fields = {
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "error": self.error,
            "stop": self.stop,
        }
        return orjson.dumps({name: value for name, value in fields.items() if value is not None})

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Result":
        """The inverse of `to_json`, from the decoded object."""
        usage = raw.get("usage")
        counts = Usage(**known_fields(Usage, usage)) if usage else None
        return cls(raw.get("finish_reason"), counts, raw.get("error"), raw.get("stop"))

    @classmethod
    def from_error(cls, error: FastchatQError) -> "Result":
        """A failed job's result."""
        return cls(error={**error.body()["error"], "status": error.status})


@dataclass(frozen=True, slots=True)
class End:
    """The terminal event."""

    n: int
    state: str
    reason: str
    result: Result | None
    ended_ms: int | None = field(default=None, compare=False)
    """When the job ended; None: it goes on for all that is known, and only its reader is given up."""

    def error(self) -> FastchatQError | None:
        """None if the job succeeded, else the exception that says why not."""
        if self.state == "succeeded":
            return None
        if self.result is not None and self.result.error is not None:
            return JobFailedError(**self.result.error)
        if self.state == "expired":
            return DeadlineError("The job was not done by its deadline. Try again when the queue is shorter.")
        if self.state == "cancelled":
            return InvalidRequestError(f"The job was cancelled ({self.reason}).", code="cancelled")
        if self.state == "lost":
            return QueueUnavailableError("The queue lost this job (Redis restarted without its data). Send it again.")
        return JobFailedError(f"The job could not be finished: {self.reason}.", code="job_dead")


Event = Delta | End


def encode_payload(pieces: Sequence[Piece]) -> bytes:
    """The payload of a log entry on one line: ``{"t": [token ids], "s": "text", …}``, or a list of such objects.

    The other fields are there if they say something: ``c`` choice, ``r`` reasoning, ``f`` parts of tool calls, ``l``
    log probabilities, ``e`` finish reason, ``v`` vector, ``u`` units, ``p`` prompt; in the order of the fields of their
    types.
    """
    objects = [_to_object(piece) for piece in pieces]
    return orjson.dumps(objects[0] if len(objects) == 1 else objects, default=tuple)


def _to_object(piece: Piece) -> dict[str, Any]:
    found: dict[str, Any] = {"t": piece.ids, "s": piece.text}
    if not piece.is_plain:
        extra = zip("crflevup", piece[2:], PLAIN, strict=True)
        found |= {name: value for name, value, default in extra if value != default}
    return found


def _from_object(raw: dict[str, Any]) -> Piece:
    if len(raw) == len(("t", "s")):
        return Piece(tuple(raw["t"]), raw["s"])
    return Piece(
        tuple(raw["t"]),
        raw["s"],
        raw.get("c", 0),
        raw.get("r", ""),
        tuple([ToolCallDelta(*call) for call in raw.get("f", ())]),
        tuple([_to_logprob(*one) for one in raw.get("l", ())]),
        raw.get("e"),
        raw.get("v", ""),
        raw.get("u", 0),
        raw.get("p", False),
    )


def _to_logprob(token_id: int, token: str, logprob: float | None, top: list[list[Any]]) -> TokenLogprob:
    others = [Alternative(other, name, LOG_OF_0 if value is None else value) for other, name, value in top]
    return TokenLogprob(token_id, token, LOG_OF_0 if logprob is None else logprob, tuple(others))


def decode_delta(n: int, k: int, payload: bytes) -> Delta:
    """A log entry or the rest of a published line."""
    raw = orjson.loads(payload)
    return Delta(n, k, (_from_object(raw),) if isinstance(raw, dict) else tuple([_from_object(one) for one in raw]))


def decode_end(n: int, body: bytes) -> End:
    """The JSON of a terminal line."""
    raw = orjson.loads(body)
    result = raw["result"]
    return End(n, raw["state"], raw["reason"], None if result is None else Result.from_dict(result), raw.get("t"))


def parse_line(line: bytes) -> tuple[str, Event]:
    """One published line -> (job id, event).

    Raises:
        ValueError: not such a line.
    """
    job_id, n, k, body = line.split(b" ", 3)
    try:
        event = decode_end(int(n), body) if k == b"end" else decode_delta(int(n), int(k), body)
    except (AttributeError, KeyError, TypeError) as error:  # JSON, but of another shape
        raise ValueError(f"not an event: {error!r}") from error
    return job_id.decode(), event
