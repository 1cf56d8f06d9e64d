"""Anthropic's message request, and the one way from it to a job. What is not honoured is refused by name."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BeforeValidator, Field, model_validator
from ulid import ULID

from fastchat_q.jobs import CONTINUE, Guide, Job, Message

from ..fields import JsonObject, Strict, Text, field_error, without_neutral
from ..media import Images
from ..parameters import StopText, sampling_of
from .content import CacheControl, InputMessage, SystemBlock, system_text, turns

MAX_STOP = 64
MAX_TOOLS = 1024
TOOL_NAME = r"^[a-zA-Z0-9_-]{1,128}$"
MIN_BUDGET = 1024
EFFORT_OF_BUDGET: tuple[tuple[int, str], ...] = ((16384, "high"), (4096, "medium"), (0, "low"))
"""From so many tokens of thinking on it is this effort."""

KEEPS_ALL_THOUGHTS = {"type": "clear_thinking_20251015", "keep": "all"}
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "billing_policy": (None,),
    "compaction": (None,),
    "container": (None,),
    "context_management": (None, {}, {"edits": []}, {"edits": [KEEPS_ALL_THOUGHTS]}),
    "diagnostics": (None, {}, {"previous_message_id": None}),
    "fallback_credit_token": (None,),
    "fallbacks": (None, []),
    "inference_geo": (None,),
    "mcp_servers": (None, []),
    "speed": (None, "standard"),
    "thread": (None,),
}
"""Parameters of Anthropic's that this server does not implement, and the values that ask for nothing."""
TOOL_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_callers": (None, [], ["direct"]),
    "defer_loading": (None, False),
    "input_examples": (None, []),
}


class Tool(Strict):
    """A tool of the client's own that the model may call."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=TOOL_NAME)
    description: Text | None = None
    input_schema: JsonObject
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    """Accepted: the input of a call is streamed as it is generated in any case."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(data, TOOL_NOT_SUPPORTED)

    def to_object(self) -> dict[str, Any]:
        """OpenAI's object, as chat templates take it."""
        given = {"description": self.description, "parameters": self.input_schema, "strict": self.strict}
        found = {name: value for name, value in given.items() if value is not None}
        return {"type": "function", "function": {"name": self.name, **found}}


def _is_custom(data: Any) -> Any:
    """A tool that Anthropic's servers run has other fields: it is refused by its type and not by each of those."""
    kind = data.get("type") if isinstance(data, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise field_error("type", "This server runs no tools itself: it takes tools of type 'custom' only", kind)
    return data


class ToolChoice(Strict):
    """Whether and which tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> Self:
        if (self.name is None) == (self.type == "tool"):
            verb = "needs it" if self.type == "tool" else "has no such field"
            raise field_error("name", f"A choice of type '{self.type}' {verb}", self.name)
        return self

    def to_choice(self) -> str:
        """As a job has it."""
        kinds = {"auto": "auto", "any": "required", "none": "none"}
        return kinds.get(self.type, f"function:{self.name}")


class Thinking(Strict):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=MIN_BUDGET)
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> Self:
        if (self.budget_tokens is None) == (self.type == "enabled"):
            verb = "needs it" if self.type == "enabled" else "has no such field"
            raise field_error("budget_tokens", f"Thinking of type '{self.type}' {verb}", self.budget_tokens)
        if self.type == "disabled" and self.display is not None:
            raise field_error("display", "Thinking of type 'disabled' has no such field", self.display)
        return self

    @property
    def effort(self) -> str | None:
        """As a chat has it; None: whatever the model does of itself."""
        if self.type == "disabled":
            return "none"
        if self.budget_tokens is None:
            return None
        budget = self.budget_tokens
        return next(effort for least, effort in EFFORT_OF_BUDGET if budget >= least)


class JsonOutput(Strict):
    """A JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")

    def to_guide(self) -> Guide:
        """The same for an engine."""
        return Guide(kind="json_schema", value=orjson.dumps(self.schema_).decode())


class OutputConfig(Strict):
    """What the answer is to be like."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutput | None = None


class Metadata(Strict):
    """About the request."""

    user_id: Text | None = None


class Prompt(Strict):
    """What a message is answered from: what a request to count its tokens has too."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[InputMessage] = Field(min_length=1)
    system: Text | list[SystemBlock] | None = None
    tools: Annotated[list[Annotated[Tool, BeforeValidator(_is_custom)]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutput | None = None
    """The older name of ``output_config.format``."""
    cache_control: CacheControl | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(data, NOT_SUPPORTED)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        self._check_tools()
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise field_error("output_format", "'output_config.format' says already what the answer must look like")
        last = self.messages[-1]
        if last.role == "assistant" and any(block.type != "text" for block in last.blocks):
            raise field_error(
                "messages", "The last message is an assistant's, and only its text can be continued: answer it first"
            )
        if not self.turns or self.turns[-1].role == "system":
            raise field_error("messages", "The last message should be a user's or an assistant's", last.role)
        return self

    def _check_tools(self) -> None:
        names = [tool.name for tool in self.tools or ()]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise field_error("tools", "Names of tools should be different", doubled)
        choice = self.tool_choice
        if choice is not None and choice.type == "tool" and choice.name not in names:
            raise field_error("tool_choice.name", "No tool of that name is among 'tools'", choice.name)
        if choice is not None and choice.type == "any" and not names:
            raise field_error("tool_choice", "It is only allowed when 'tools' are specified", choice.type)

    @property
    def turns(self) -> Sequence[InputMessage]:
        """The messages but for a last one of the assistant's that says nothing: it stands for the answer."""
        last = self.messages[-1]
        return self.messages[:-1] if last.role == "assistant" and not last.has_text else self.messages

    @property
    def continues(self) -> bool:
        """The answer goes on with the assistant's text that the conversation ends with."""
        return self.turns[-1].role == "assistant"

    @property
    def format(self) -> JsonOutput | None:
        """What the answer follows."""
        return self.output_format or (self.output_config.format if self.output_config else None)

    def spelt(self) -> Mapping[str, str]:
        """Parameters that have other names here than in a job."""
        format_name = "output_config.format" if self.output_format is None else "output_format"
        by_effort = self.output_config is not None and self.output_config.effort is not None
        return {"response_format": format_name, "reasoning_effort": "output_config.effort" if by_effort else "thinking"}

    def to_job(self, images: Images) -> Job:
        """One frozen job with a new id.

        Args:
            images: gets the bytes of the images that the job names.

        Raises:
            InvalidRequestError: an image cannot be taken.
        """
        text = system_text(self.system)
        system = (Message(role="system", content=text),) if text else ()
        choice = self.tool_choice
        return Job(
            id=str(ULID()),
            model=self.model,
            messages=(*system, *turns(self.turns, images)),
            tools=tuple([tool.to_object() for tool in self.tools or ()]),
            tool_choice=choice.to_choice() if choice is not None else "auto",
            parallel_tool_calls=not (choice is not None and choice.disable_parallel_tool_use),
            template_kwargs=self._template_kwargs(),
        )

    def _template_kwargs(self) -> dict[str, Any]:
        effort = self.thinking.effort if self.thinking is not None else None
        if effort != "none" and self.output_config is not None and self.output_config.effort is not None:
            effort = self.output_config.effort
        kwargs: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        return kwargs | ({CONTINUE: True} if self.continues else {})


class MessageRequest(Prompt):
    """The body of ``POST /v1/messages``."""

    max_tokens: int = Field(ge=1, lt=2**31)
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOP)] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @model_validator(mode="after")
    def _budget_is_a_part(self) -> Self:
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise field_error(
                "thinking.budget_tokens", f"It should be less than max_tokens ({self.max_tokens})", budget
            )
        return self

    def to_job(self, images: Images) -> Job:
        """One frozen job with a new id, and a seed drawn here, so that a resumed job draws the same tokens."""
        sampling = sampling_of(
            self,
            max_tokens=self.max_tokens,
            clip=True,
            stop=tuple(self.stop_sequences or ()),
            guide=self.format.to_guide() if self.format is not None else None,
        )
        return super().to_job(images).model_copy(update={"sampling": sampling})


OF_THE_ANSWER = MessageRequest.model_fields.keys() - Prompt.model_fields.keys()


class CountRequest(Prompt):
    """The body of ``POST /v1/messages/count_tokens``.

    It may be the very body of the message: what cannot change its prompt is not looked at.
    """

    @model_validator(mode="before")
    @classmethod
    def _of_the_prompt(cls, data: Any) -> Any:
        return {key: data[key] for key in data if key not in OF_THE_ANSWER} if isinstance(data, dict) else data
