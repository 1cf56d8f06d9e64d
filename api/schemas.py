"""OpenAI's chat request, and the one way from it to a job. What is not honoured is refused by name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from ulid import ULID

from fastchat_q.jobs import MAX_CHOICES, MAX_TOP_LOGPROBS, Guide, Job

from .fields import JsonObject, Metadata, Text, field_error, without_neutral
from .formats import ResponseFormat
from .media import Images
from .messages import ChatMessage
from .parameters import (
    MAX_TOOLS,
    TemplateArguments,
    TextRequest,
    UsageStreamOptions,
    check_tool_choice,
    sampling_of,
    template_arguments,
)
from .tools import AllowedTools, ChosenTools, NamedTool, Tool

NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None, False),
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None,),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_decoding_backend": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_whitespace_pattern": (None,),
    "include_reasoning": (None, True),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "priority": (None, 0),
    "prompt_logprobs": (None,),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""Parameters of OpenAI and vLLM that this version does not implement, and the values that ask for nothing."""
INSTEAD = {
    "function_call": "tool_choice",
    "functions": "tools",
    "guided_choice": "structured_outputs",
    "guided_decoding_backend": "structured_outputs",
    "guided_grammar": "structured_outputs",
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
}


def _named(choice: str | NamedTool | AllowedTools | None) -> list[str]:
    """The functions that a choice names."""
    if isinstance(choice, AllowedTools):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return [choice.function.name] if isinstance(choice, NamedTool) else []


class ChatRequest(TextRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    stream_options: UsageStreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ChosenTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    """Extension, as in vLLM."""
    on_disconnect: Literal["cancel", "continue"] | None = None
    """Extension: what becomes of the job when the client goes and does not come back. ``continue``: it is done all the
    same, and its answer waits under ``/v1/jobs/{id}``."""
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    prompt_cache_options: JsonObject | None = None
    metadata: Metadata | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(data, NOT_SUPPORTED, INSTEAD)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "max_tokens", "'max_tokens' and 'max_completion_tokens' differ. Send one of them.", {}
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "'stream_options' is only allowed when 'stream' is true.", {})
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "It is only allowed when 'logprobs' is true", self.top_logprobs)
        self.check_min_tokens(self.max_completion_tokens or self.max_tokens)
        self._guide()
        check_tool_choice(self.tool_choice, _named(self.tool_choice), [tool.function.name for tool in self.tools or ()])
        return self

    def _guide(self) -> Guide | None:
        return self.guide("response_format", self.response_format)

    def spelt(self) -> Mapping[str, str]:
        """Parameters that have other names here than in a job."""
        limit = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return limit if self.structured_outputs is None else {**limit, "response_format": "structured_outputs"}

    def to_job(self, images: Images) -> Job:
        """One frozen job with a new id. An absent seed is drawn here, so that a resumed job draws the same tokens.

        Args:
            images: gets the bytes of the images that the job names.

        Raises:
            InvalidRequestError: an image cannot be taken.
        """
        return Job(
            id=str(ULID()),
            model=self.model,
            lane=self.lane,
            messages=tuple(
                [message.to_message(images, f"messages[{number}]") for number, message in enumerate(self.messages)]
            ),
            sampling=sampling_of(
                self,
                max_tokens=self.max_completion_tokens or self.max_tokens,
                n=self.n,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                guide=self._guide(),
            ),
            tools=tuple([tool.to_object() for tool in self._tools()]),
            tool_choice=self._tool_choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            template_kwargs=template_arguments(self.chat_template_kwargs, self.reasoning_effort),
        )

    def _tools(self) -> list[Tool]:
        """Those that may be called: the model is not told of others, for nothing else keeps it from calling them."""
        tools = self.tools or []
        if isinstance(self.tool_choice, AllowedTools):
            return [tool for tool in tools if tool.function.name in _named(self.tool_choice)]
        return tools

    def _tool_choice(self) -> str:
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            return choice.allowed_tools.mode
        return f"function:{choice.function.name}" if isinstance(choice, NamedTool) else choice or "auto"
