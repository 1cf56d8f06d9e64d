"""OpenAI's request shapes, and the one way from a request to a job. What is not honoured is refused by name."""

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from ulid import ULID

from fastchat_q.jobs import Job, Lane, Message, Role, Sampling

MAX_STOP = 4
MAX_STOP_LENGTH = 1024
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
LANES: dict[str | None, Lane] = {"flex": "lo"}

NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_k": (None, 0, -1),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Parameters of OpenAI and vLLM that this version does not implement, and the values that ask for nothing."""


NOT_SUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "reasoning_content": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}
"""Fields of an answer's message that clients send back with it in the next turn, and the values that say nothing."""


def _without_neutral(data: Any, table: dict[str, tuple[Any, ...]]) -> Any:
    """The object without the table's fields; refuses those that ask for something."""
    if not isinstance(data, dict):
        return data
    for name, neutral in table.items():
        if name in data and data[name] not in neutral:
            raise PydanticCustomError(
                "unsupported_parameter",
                "'{name}' is not supported by this server",
                {"name": name},
            )
    return {name: value for name, value in data.items() if name not in table}


def _is_unicode(text: str) -> str:
    """Refuses lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("string_unicode", "Input should be valid Unicode, without lone surrogates") from error
    return text


Text = Annotated[str, AfterValidator(_is_unicode)]


class _Request(BaseModel):
    # Strict: "5" is no number and true is no count, as in OpenAI's API.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class TextPart(_Request):
    """A text part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Request):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return _without_neutral(data, NOT_SUPPORTED_IN_MESSAGES)

    def to_message(self) -> Message:
        """The turn as a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=ROLES[self.role], content=text, name=self.name)


class StreamOptions(_Request):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Request):
    """The body of ``POST /v1/chat/completions``."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOP)]
        | None
    ) = None
    ignore_eos: bool = False
    """Extension, as in vLLM: go on until max_tokens."""
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    """``flex`` waits in the batch lane; the others in the interactive one."""
    on_disconnect: Literal["cancel", "continue"] = "cancel"
    """Extension: what becomes of the job when the client goes and does not come back. ``continue``: it is done all the
    same, and its answer waits under ``/v1/jobs/{id}``."""
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    metadata: dict[Text, Text] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return _without_neutral(data, NOT_SUPPORTED)

    @model_validator(mode="after")
    def _agree_on_one_limit(self) -> Self:
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "max_tokens", "'max_tokens' and 'max_completion_tokens' differ. Send one of them.", {}
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "'stream_options' is only allowed when 'stream' is true.", {})
        return self

    def to_job(self) -> Job:
        """One frozen job with a new id. An absent seed is drawn here, so that a resumed job draws the same tokens."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-6),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=stop,
            ignore_eos=self.ignore_eos,
        )
        return Job(
            id=str(ULID()),
            model=self.model,
            lane=LANES.get(self.service_tier, "hi"),
            messages=tuple(message.to_message() for message in self.messages),
            sampling=sampling,
        )
