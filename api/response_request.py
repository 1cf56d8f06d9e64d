"""OpenAI's request for a response, and the one way from it to a job. What is not honoured is refused by name."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError
from ulid import ULID

from fastchat_q.errors import InvalidRequestError, RequestTooLargeError
from fastchat_q.jobs import MAX_TOP_LOGPROBS, Guide, Job, Message
from fastchat_q.settings import Settings

from .asked import Asked
from .fields import NAME, JsonObject, Metadata, Strict, Text, field_error, list_or_text, without_neutral
from .guard import check_rest
from .media import Images
from .parameters import (
    MAX_TOOLS,
    StreamOptions,
    TemplateArguments,
    TextRequest,
    check_tool_choice,
    sampling_of,
    template_arguments,
)
from .render import View
from .response_items import InputItem, Item, image_parts, keep_all, to_messages

NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "access_programs": (None,),
    "context_management": (None, []),
    "conversation": (None,),
    "image": (None,),
    "logprobs": (None, False),
    "max_completion_tokens": (None,),
    "max_tokens": (None,),
    "messages": (None,),
    "moderation": (None,),
    "n": (None, 1),
    "prompt": (None,),
    "reasoning_effort": (None,),
    "response_format": (None,),
    "verbosity": (None,),
}
"""Parameters of OpenAI, for responses and chats, that this endpoint does not have, and the values that ask nothing."""
INSTEAD = {
    "conversation": "previous_response_id",
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
LOGPROBS = "message.output_text.logprobs"
IMAGE_URLS = "message.input_image.image_url"
SEALED_REASONING = "reasoning.encrypted_content"
Include = Literal["message.output_text.logprobs", "message.input_image.image_url", "reasoning.encrypted_content"]
"""What else OpenAI lists is of tools that run on the server, of which there are none."""
SPELT = {
    "logprobs": "include",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
"""Parameters of a job that have other names here."""


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=NAME)
    description: Text | None = None
    parameters: JsonObject | None = None
    """A JSON schema; none: no parameters."""
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "function":
            what = "the tools of this server are functions that the client runs, none that run here"
            raise field_error("type", f"The tool {kind[:80]!r} is not supported: {what}", kind)
        neutral = {
            "allowed_callers": (None, ["direct"]),
            "async": (None, False),
            "defer_loading": (None, False),
            "output_schema": (None,),
        }
        return without_neutral(data, neutral)

    def to_object(self) -> dict[str, Any]:
        """The object of a chat, without nulls, as chat templates take it."""
        given = {name: value for name, value in self if value is not None and name != "type"}
        return {"type": "function", "function": given}


class FunctionChoice(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    name: str


class AllowedTools(Strict):
    """The tools of the request that may be called, or one of which must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1)]


def _is_a_choice(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else "function"
    if kind not in ("function", "allowed_tools"):
        raise field_error("type", "A choice that is an object is of type 'function' or 'allowed_tools'", kind)
    return value


class TextFormat(Strict):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=NAME)] | None = None
    description: Text | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None
    """The answer follows the schema in any case."""

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> Self:
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if self.type == "json_schema" and value is None:
                raise field_error(name, "The type 'json_schema' needs it")
        for name, value in (("name", self.name), ("schema", self.schema_), ("description", self.description)):
            if self.type != "json_schema" and value is not None:
                raise field_error(name, f"The type '{self.type}' has no such field")
        return self

    def to_guide(self) -> Guide | None:
        """The same for an engine."""
        if self.type == "json_schema":
            return Guide(kind="json_schema", value=orjson.dumps(self.schema_).decode())
        return Guide(kind="json_object") if self.type == "json_object" else None

    def to_object(self) -> dict[str, Any]:
        """As the response shows it."""
        return self.model_dump(by_alias=True, include=None if self.type == "json_schema" else {"type"})


class TextConfig(Strict):
    """How the text is to be."""

    format: TextFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(data, {"verbosity": (None, "medium")})


class Reasoning(Strict):
    """How the model is to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None
    """Models here show what they think itself, and nobody sums it up: ``auto`` is content with that."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        neutral = {"context": (None, "auto"), "generate_summary": (None, "auto"), "mode": (None, "standard")}
        return without_neutral(data, neutral, {"generate_summary": "summary"})


def _no_automatic_truncation(value: Any) -> Any:
    if value == "auto":
        raise PydanticCustomError(
            "truncation",
            "Nothing is left out of a conversation here: what is longer than the model's context is refused. "
            "Shorten the input",
        )
    return value


class ResponseRequest(TextRequest):
    """The body of ``POST /v1/responses``."""

    input: Annotated[
        Annotated[Text, Tag("TEXT")] | Annotated[list[InputItem], Field(min_length=1), Tag("LIST")],
        Discriminator(list_or_text),
    ]
    instructions: Text | None = None
    previous_response_id: Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    stream_options: StreamOptions | None = None
    background: bool | None = None
    store: bool | None = None
    """Absent: yes."""
    include: list[Include] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_tool_calls: int | None = Field(default=None, ge=1, lt=2**31)
    """Of tools that run on the server: there are none, so that any number is kept to."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        Literal["auto", "none", "required"] | FunctionChoice | AllowedTools | None, BeforeValidator(_is_a_choice)
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Annotated[Literal["disabled"], BeforeValidator(_no_automatic_truncation)] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    prompt_cache_options: JsonObject | None = None
    metadata: Metadata | None = None
    chat_template_kwargs: TemplateArguments | None = None
    """Extension, as in chats."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(data, NOT_SUPPORTED, INSTEAD)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.background and self.store is False:
            raise field_error("background", "What goes on without its client must be stored: it needs 'store': true")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "'stream_options' is only allowed when 'stream' is true.", {})
        self.check_min_tokens(self.max_output_tokens)
        self._guide()
        choice = self.tool_choice
        wanted = [choice] if isinstance(choice, FunctionChoice) else []
        chosen = [one.name for one in (choice.tools if isinstance(choice, AllowedTools) else wanted)]
        check_tool_choice(choice, chosen, [tool.name for tool in self.tools or ()])
        return self

    def _guide(self) -> Guide | None:
        return self.guide("text.format", self.text.format if self.text else None)

    def spelt(self) -> Mapping[str, str]:
        """Parameters that have other names here than in a job."""
        return SPELT if self.structured_outputs is None else {**SPELT, "response_format": "structured_outputs"}

    @property
    def stored(self) -> bool:
        """Whether the response can be had again."""
        return self.store is not False

    @property
    def _includes(self) -> frozenset[str]:
        return frozenset(self.include or ())

    @property
    def _logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.top_logprobs or LOGPROBS in self._includes else None

    def to_job(self, messages: Sequence[Message]) -> Job:
        """One frozen job with a new id. An absent seed is drawn here, so that a resumed job draws the same tokens."""
        choice, allowed = self.tool_choice, None
        if isinstance(choice, AllowedTools):
            allowed, choice = {tool.name for tool in choice.tools}, choice.mode
        first = (Message(role="system", content=self.instructions),) if self.instructions else ()
        return Job(
            id=str(ULID()),
            model=self.model,
            lane=self.lane,
            messages=(*first, *messages),
            sampling=sampling_of(self, max_tokens=self.max_output_tokens, logprobs=self._logprobs, guide=self._guide()),
            tools=tuple([tool.to_object() for tool in self.tools or () if allowed is None or tool.name in allowed]),
            tool_choice=f"function:{choice.name}" if isinstance(choice, FunctionChoice) else choice or "auto",
            parallel_tool_calls=self.parallel_tool_calls is not False,
            template_kwargs=template_arguments(
                self.chat_template_kwargs, self.reasoning.effort if self.reasoning else None
            ),
        )

    def echo(self) -> dict[str, Any]:
        """What the response says of its request."""
        choice = self.tool_choice
        wanted = self.text.format if self.text else None
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": (self.reasoning or Reasoning()).model_dump(),
            "safety_identifier": self.safety_identifier,
            "store": self.stored,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": wanted.to_object() if wanted else {"type": "text"}, "verbosity": "medium"},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump() if choice else "auto",
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }

    def to_extra(self, items: Sequence[Item]) -> dict[str, Any]:
        """What is kept with the job beside what all answers have; ``items`` are those of the input."""
        return {
            "echo": self.echo(),
            "input": items,
            "background": bool(self.background),
            "sealed": SEALED_REASONING in self._includes,
        }


@dataclass(frozen=True, slots=True)
class Context:
    """What the request refers to, as it was found."""

    items: Sequence[Item] = ()
    """The conversation so far: inputs and outputs of the responses before."""
    references: Mapping[str, Item] = field(default_factory=lambda: MappingProxyType({}))
    """Items by their ids."""
    blobs: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    """Their images, by digest."""
    size: int = 0
    """Bytes of all this as JSON."""


NOTHING = Context()


def asked(body: ResponseRequest, settings: Settings, size: int, context: Context = NOTHING) -> Asked:
    """What the request asks for.

    Args:
        size: of the request's body, in bytes.
        context: what it refers to.

    Raises:
        InvalidRequestError: an image or an item cannot be taken.
        RequestTooLargeError: the body, or the whole conversation, is too large without its images.
    """
    images = Images.within(settings)
    for part in image_parts(context.items):
        images.take(part["image_url"], part["blob"], context.blobs, "previous_response_id")
    given = keep_all(body.input, images, context.references, context.blobs, context.items)
    check_rest(size, images.url_bytes, settings.max_body_bytes)
    total = context.size + size - images.url_bytes
    if context.size and total > settings.max_body_bytes:
        raise RequestTooLargeError(
            f"The conversation has {total} bytes with what this request refers to, the limit is "
            f"{settings.max_body_bytes}. Begin a new one, or raise FASTCHAT_Q_MAX_BODY_BYTES on the server.",
            param="previous_response_id",
        )
    messages = to_messages([*context.items, *given])
    if not messages:
        raise InvalidRequestError("Invalid value for 'input': It says nothing.", param="input", code="invalid_value")
    job = body.to_job(messages)
    extra = body.to_extra(given)
    view = View(job.id, job.model, int(time.time()), job.lane, form="response", extra=extra)
    return Asked(
        body,
        job,
        view,
        stream=bool(body.stream),
        detached=bool(body.background),
        background=bool(body.background),
        keep=body.stored,
        spelt=body.spelt(),
        images=images,
    )


def asked_in_batch(body: ResponseRequest, settings: Settings, size: int) -> Asked:
    """The same of a line of a batch, which has nobody to stream to and nothing to go on behind.

    Raises:
        InvalidRequestError: it asks for one of these.
    """
    for name in ("background", "stream", "previous_response_id"):
        if getattr(body, name):
            raise InvalidRequestError(
                f"Unsupported parameter: '{name}' is not supported in a batch. Leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    return asked(body, settings, size)
