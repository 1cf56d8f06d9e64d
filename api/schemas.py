"""OpenAI's chat request, and the one way from it to a job. What is not honoured is refused by name."""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from ulid import ULID

from fastchat_q.jobs import MAX_CHOICES, MAX_TOP_LOGPROBS, Job, Lane, Sampling

from .fields import JsonObject, Strict, Text, field_error, without_neutral
from .formats import ResponseFormat, StructuredOutputs
from .media import Images
from .messages import ChatMessage
from .tools import AllowedTools, ChosenTools, NamedTool, Tool

MAX_STOP = 4
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 256
MAX_TOOLS = 128
MAX_METADATA = 16
MAX_TOKEN_ID = 2**31 - 1
LANES: dict[str | None, Lane] = {"flex": "lo"}
TEMPLATE_OWN = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents"),
        *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
        *("tokenize", "tokenizer_kwargs", "tools", "truncation"),
    )
)
"""Arguments of a chat template's renderer that are the server's to set."""

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

StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
MetadataKey = Annotated[Text, Field(max_length=64)]
MetadataValue = Annotated[Text, Field(max_length=512)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


def _token_biases(value: Any) -> Any:
    """``{"50256": -100}``: keys are token ids, as JSON has them."""
    for key in value if isinstance(value, dict) else ():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and int(key) <= MAX_TOKEN_ID):
            raise PydanticCustomError(
                "token_id", "Keys should be token ids, such as '50256', and not {key}", {"key": repr(key)[:80]}
            )
        bias = value[key]
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError(
                "bias", "The bias of token {key} should be a number from -100 to 100", {"key": key}
            )
    return value


TokenBiases = Annotated[dict[str, float], BeforeValidator(_token_biases)]


def _named(choice: str | NamedTool | AllowedTools | None) -> list[str]:
    """The functions that a choice names."""
    if isinstance(choice, AllowedTools):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return [choice.function.name] if isinstance(choice, NamedTool) else []


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    """Nothing is added to hide the lengths of tokens: who asks for it is refused."""


class ChatRequest(Strict):
    """The body of ``POST /v1/chat/completions``."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    logit_bias: TokenBiases | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ChosenTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOKEN_ID)
    """Extension, as in vLLM: draw from so many tokens only; 0 and -1: from all."""
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    """Extension, as in vLLM: draw from tokens that are at least so likely, relative to the likeliest."""
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=10.0)
    """Extension, as in vLLM."""
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    """Extension, as in vLLM: nothing ends the answer before so many."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    """Extension, as in vLLM."""
    ignore_eos: bool = False
    """Extension, as in vLLM: go on until max_tokens."""
    structured_outputs: StructuredOutputs | None = None
    """Extension, as in vLLM."""
    chat_template_kwargs: JsonObject | None = None
    """Extension, as in vLLM: for the model's chat template, such as ``{"enable_thinking": false}``."""
    service_tier: Literal["auto", "default", "flex", "priority", "scale", "fast"] | None = None
    """``flex`` waits in the batch lane; the others in the interactive one."""
    on_disconnect: Literal["cancel", "continue"] = "cancel"
    """Extension: what becomes of the job when the client goes and does not come back. ``continue``: it is done all the
    same, and its answer waits under ``/v1/jobs/{id}``."""
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    prompt_cache_options: JsonObject | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA)] | None = None

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
        limit = self.max_completion_tokens or self.max_tokens
        if limit is not None and (self.min_tokens or 0) > limit:
            raise field_error("min_tokens", f"It is more than the limit of {limit} tokens", self.min_tokens)
        guided = self.response_format is not None and self.response_format.type != "text"
        if guided and self.structured_outputs is not None:
            raise field_error("structured_outputs", "'response_format' says already what the answer must look like")
        taken = sorted(TEMPLATE_OWN & (self.chat_template_kwargs or {}).keys())
        if taken:
            raise field_error("chat_template_kwargs", f"{taken[0]!r} is the server's to set")
        self._check_tool_choice()
        return self

    def _check_tool_choice(self) -> None:
        choice = self.tool_choice
        names = [tool.function.name for tool in self.tools or ()]
        for name in _named(choice):
            if name not in names:
                raise field_error("tool_choice", "No function of that name is among 'tools'", name)
        if choice == "required" and not names:
            raise field_error("tool_choice", "It is only allowed when 'tools' are specified", choice)

    def spelt(self) -> Mapping[str, str]:
        """Parameters that have other names here than in a job."""
        return {} if self.structured_outputs is None else {"response_format": "structured_outputs"}

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
            lane=LANES.get(self.service_tier, "hi"),
            messages=tuple(
                [message.to_message(images, f"messages[{number}]") for number, message in enumerate(self.messages)]
            ),
            sampling=sampling_of(
                self,
                max_tokens=self.max_completion_tokens or self.max_tokens,
                n=self.n,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            tools=tuple([tool.to_object() for tool in self._tools()]),
            tool_choice=self._tool_choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            template_kwargs=self._template_kwargs(),
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

    def _template_kwargs(self) -> dict[str, Any]:
        kwargs = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            kwargs["reasoning_effort"] = self.reasoning_effort
        return kwargs


def sampling_of(body: Any, **own: Any) -> Sampling:
    """How a request wants its tokens chosen, by the parameters that all requests for text share.

    Args:
        own: what requests of its kind say in their own way; None: nothing.
    """
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    guide = body.structured_outputs or body.response_format
    asked = {
        "min_tokens": body.min_tokens,
        "temperature": body.temperature,
        "top_p": None if body.top_p is None else max(body.top_p, 1e-6),
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "min_p": body.min_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": body.logit_bias,
        "seed": secrets.randbits(63) if body.seed is None else body.seed,
        "seeded": body.seed is not None or None,
        "stop": stop,
        "stop_token_ids": body.stop_token_ids,
        "ignore_eos": body.ignore_eos,
        "guide": guide.to_guide() if guide is not None else None,
        **own,
    }
    return Sampling.model_validate({name: value for name, value in asked.items() if value is not None})
