"""The job: what the API hands to a worker. Frozen, with its JSON codec beside it; it knows no HTTP and no Redis."""

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import InvalidRequestError

CHARACTERS_PER_TOKEN = 4
ASSUMED_TOKENS = 256
"""What an answer is taken to have when its length is not limited."""

Lane = Literal["hi", "lo"]
Role = Literal["system", "user", "assistant"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Message(_Frozen):
    """One turn of a conversation, as a chat template takes it."""

    role: Role
    content: str
    name: str | None = None


class Sampling(_Frozen):
    """How tokens are chosen and when generation ends. ``seed`` is always set, so that a resumed job draws the same."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Upper bound on generated tokens; None: what is left of the context."""
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class Job(_Frozen):
    """A chat generation job. ``v`` is the version of this format."""

    v: Literal[1] = 1
    id: str
    """ULID, unique over all models."""
    model: str
    lane: Lane = "hi"
    messages: tuple[Message, ...] = Field(min_length=1)
    sampling: Sampling = Sampling()

    @property
    def cost(self) -> int:
        """What it may cost, in tokens, for fair queueing and limits; corrected by what it really used."""
        characters = sum(len(message.content) for message in self.messages)
        return max(math.ceil(characters / CHARACTERS_PER_TOKEN), 1) + (self.sampling.max_tokens or ASSUMED_TOKENS)

    def to_spec(self) -> str:
        """JSON for the job record, without default values."""
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_spec(cls, spec: str | bytes) -> Self:
        """Reads a job record's spec.

        Raises:
            InvalidRequestError: the spec is not a job (code ``bad_spec``); the job fails, the worker lives on.
        """
        try:
            return cls.model_validate_json(spec)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "spec"
            raise InvalidRequestError(f"job spec: {where}: {first['msg']}", code="bad_spec") from error
