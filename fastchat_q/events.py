"""What comes back from a worker: `Delta` (tokens) and `End` (exactly one a job), and how they look on the wire.

A published message is one or more lines; a line is ``<job id> <n> <k> <payload>`` for k tokens that bring the count to
n, or ``<job id> <n> end <json>``. The token log holds the same payload under the id ``0-<n>``.
"""

from dataclasses import dataclass
from typing import Any, Literal

import orjson

from .errors import DeadlineError, FastchatQError, InvalidRequestError, JobFailedError, QueueUnavailableError
from .versions import known_fields

TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled", "expired", "dead"})
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Delta:
    """Tokens n-k+1 … n of a job. ``text`` may lag behind the ids (incomplete characters, possible stop strings)."""

    n: int
    k: int
    ids: tuple[int, ...]
    text: str


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

    def to_json(self) -> bytes:
        """JSON without nulls."""
        fields = {"finish_reason": self.finish_reason, "usage": self.usage, "error": self.error}
        return orjson.dumps({name: value for name, value in fields.items() if value is not None})

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Result":
        """The inverse of `to_json`, from the decoded object."""
        usage = raw.get("usage")
        return cls(raw.get("finish_reason"), Usage(**known_fields(Usage, usage)) if usage else None, raw.get("error"))

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


def encode_payload(ids: tuple[int, ...], text: str) -> bytes:
    """The payload of a log entry: ``{"t": [token ids], "s": "text"}`` on one line."""
    return orjson.dumps({"t": ids, "s": text})


def decode_delta(n: int, k: int, payload: bytes) -> Delta:
    """A log entry or the rest of a published line."""
    raw = orjson.loads(payload)
    return Delta(n, k, tuple(raw["t"]), raw["s"])


def decode_end(n: int, body: bytes) -> End:
    """The JSON of a terminal line."""
    raw = orjson.loads(body)
    result = raw["result"]
    return End(n, raw["state"], raw["reason"], None if result is None else Result.from_dict(result))


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
