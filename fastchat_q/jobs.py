"""The job: what the API hands to a worker. Frozen, with its JSON codec beside it; it knows no HTTP and no Redis."""

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from .errors import InvalidRequestError

CHARACTERS_PER_TOKEN = 4
ASSUMED_TOKENS = 256
"""What an answer is taken to have when its length is not limited."""
IMAGE_TOKENS = 1024
"""What an image is taken to cost."""
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

CONTINUE = "continue_final_message"
"""In ``template_kwargs``: the answer goes on where the last message, the assistant's, stops."""

Lane = Literal["hi", "lo"]
Kind = Literal["chat", "completion", "tokenize", "detokenize", "embed", "rerank"]
"""What a job asks for; of a model, what it is for. One of kind ``chat`` may do the first four (its features say so),
one of kind ``completion`` has no chat template."""
Role = Literal["system", "user", "assistant", "tool"]
Feature = Literal[
    "n",
    "sampling",
    "penalties",
    "logprobs",
    "structured_outputs",
    "tools",
    "reasoning",
    "vision",
    "completions",
    "prompt_logprobs",
    "tokenize",
]
"""What an engine can do beyond plain generation. ``sampling``: top_k, min_p, min_tokens, stop_token_ids; ``penalties``:
those of presence, frequency and repetition, and logit_bias; ``prompt_logprobs``: echo with logprobs."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Part(_Frozen):
    """A part of a message: a text, or an image whose bytes lie beside the job."""

    type: Literal["text", "image"]
    text: str = ""
    blob: str = ""
    """SHA-256 of the image's bytes, in hex."""


class Message(_Frozen):
    """One turn of a conversation, as a chat template takes it."""

    role: Role
    content: str | tuple[Part, ...] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    """OpenAI's objects, with ``arguments`` as JSON text."""
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content without its images."""
        if isinstance(self.content, tuple):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def images(self) -> tuple[str, ...]:
        """The blobs of its images."""
        parts = self.content if isinstance(self.content, tuple) else ()
        return tuple(part.blob for part in parts if part.type == "image")


class Guide(_Frozen):
    """What an answer must look like, whatever the model would rather say."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: str = ""
    """The schema as JSON text, the regular expression, a JSON list of the choices, or a Lark grammar."""


class Sampling(_Frozen):
    """How tokens are chosen and when generation ends. ``seed`` is always set, so that a resumed job draws the same."""

    max_tokens: int | None = Field(default=None, ge=0)
    """Upper bound on generated tokens; None: what is left of the context. 0 only where the prompt is told back."""
    clip: bool = False
    """``max_tokens`` may be more than the context has left: then that is the bound."""
    min_tokens: int = Field(default=0, ge=0)
    """Nothing ends the answer before so many."""
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    """0: all of them."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    seeded: bool = False
    """The client named the seed; else it was drawn, and a server that takes none loses nothing that was asked for."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """None: none; else those of the chosen token and of so many likeliest ones."""
    guide: Guide | None = None

    def asks(self) -> dict[str, Feature]:
        """Request parameters that ask for more than plain generation, and the feature that each needs."""
        asked: dict[str, tuple[object, Feature]] = {
            "n": (self.n > 1, "n"),
            "top_k": (self.top_k, "sampling"),
            "min_p": (self.min_p, "sampling"),
            "min_tokens": (self.min_tokens, "sampling"),
            "stop_token_ids": (self.stop_token_ids, "sampling"),
            "presence_penalty": (self.presence_penalty, "penalties"),
            "frequency_penalty": (self.frequency_penalty, "penalties"),
            "repetition_penalty": (self.repetition_penalty != 1.0, "penalties"),
            "logit_bias": (self.logit_bias, "penalties"),
            "logprobs": (self.logprobs is not None, "logprobs"),
            "response_format": (self.guide and self.guide.kind.startswith("json"), "structured_outputs"),
            "structured_outputs": (self.guide and not self.guide.kind.startswith("json"), "structured_outputs"),
        }
        return {parameter: feature for parameter, (wanted, feature) in asked.items() if wanted}


class Job(_Frozen):
    """A job for one model. ``v`` is the version of this format."""

    v: Literal[1] = 1
    id: str
    """ULID, unique over all models."""
    model: str
    kind: Kind = "chat"
    lane: Lane = "hi"
    messages: tuple[Message, ...] = ()
    """Of a chat."""
    sampling: Sampling = Sampling()
    tools: tuple[dict[str, Any], ...] = ()
    """OpenAI's objects."""
    tool_choice: str = "auto"
    """``auto``, ``none``, ``required``, or ``function:<name>``."""
    parallel_tool_calls: bool = True
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """For the chat template, such as ``enable_thinking``, and ``reasoning_effort``: what the client sent."""
    generation_prompt: bool = True
    """The chat template begins the answer. Only what counts tokens may do without."""
    inputs: tuple[str | tuple[int, ...], ...] = ()
    """Texts or token ids: prompts to complete, what is to be embedded, or documents to rank; or one to tokenize."""
    special_tokens: bool | None = None
    """Whether the tokenizer puts its special tokens around; None: around a text, and not around messages."""
    echo: bool = False
    """Of a completion: each answer begins with its prompt."""
    tells: Literal["count", "ids", "strings"] = "ids"
    """Of a job that tokenizes: what it is to tell of the tokens; ``strings``: beside their ids."""
    query: str | None = None
    """What documents are ranked for."""
    dimensions: int | None = Field(default=None, ge=1)
    """Of an embedding: how many are wanted; None: all."""

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        of_messages = self.kind == "chat" or (self.kind == "tokenize" and not self.inputs)
        if not (self.messages if of_messages else self.inputs):
            raise ValueError(f"a job of kind {self.kind} needs {'messages' if of_messages else 'inputs'}")
        if self.kind in ("tokenize", "detokenize") and len(self.inputs) > 1:
            raise ValueError(f"a job of kind {self.kind} has one input")
        return self

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What a chat template gets: many know an effort only as ``enable_thinking``."""
        effort = self.template_kwargs.get("reasoning_effort")
        thinking = {} if effort is None else {"enable_thinking": effort != "none"}
        return {**thinking, **self.template_kwargs}

    @property
    def cost(self) -> int:
        """What it may cost, in tokens, for fair queueing and limits; corrected by what it really used."""
        if self.kind in ("tokenize", "detokenize"):
            return 1  # it has no model compute anything
        if self.kind != "chat":
            query = len(self.query or "") * len(self.inputs)
            given = _tokens(query + sum(len(one) * _characters(one) for one in self.inputs))
            return given + (len(self.inputs) * self._made if self.kind == "completion" else 0)
        images = sum(len(message.images) for message in self.messages)
        prompt = _tokens(sum(len(message.text) for message in self.messages)) + images * IMAGE_TOKENS
        return prompt + self._made

    @property
    def _made(self) -> int:
        """Tokens that may be generated for a prompt."""
        most = self.sampling.max_tokens
        return self.sampling.n * (ASSUMED_TOKENS if most is None else most)

    @property
    def blobs(self) -> tuple[str, ...]:
        """The blobs of all its images, each once."""
        return tuple(dict.fromkeys(blob for message in self.messages for blob in message.images))

    def asks(self) -> dict[str, Feature]:
        """Request parameters that ask for more than plain generation, and the feature that each needs."""
        asked = self.sampling.asks()
        if self.tools and self.tool_choice != "none":
            asked["tools"] = "tools"
        if any(message.images for message in self.messages):
            asked["messages"] = "vision"
        if self.template_kwargs.get("reasoning_effort") not in (None, "none"):
            asked["reasoning_effort"] = "reasoning"
        if self.echo and self.sampling.logprobs is not None:
            asked["echo"] = "prompt_logprobs"
        return asked

    def needs(self) -> set[Feature]:
        """The features that its worker must have."""
        return set(self.asks().values())

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


def call_arguments(text: str) -> dict[str, Any]:
    """The arguments of a tool call from their JSON text, as a model wrote it.

    Of those of a call that was cut off what is whole, and nothing of a text that is no JSON object: what an answer said
    can always be sent back in the next turn.
    """
    try:
        found = from_json(text or "{}", allow_inf_nan=False, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _characters(one: str | tuple[int, ...]) -> int:
    return 1 if isinstance(one, str) else CHARACTERS_PER_TOKEN


def _tokens(characters: int) -> int:
    return max(math.ceil(characters / CHARACTERS_PER_TOKEN), 1)
