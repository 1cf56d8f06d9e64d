"""The parameters that all requests for text share, and the one way from them to a job's sampling."""

import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from fastchat_q.jobs import Guide, Lane, Sampling

from .fields import JsonObject, Strict, Text, field_error, list_or_text
from .formats import StructuredOutputs

MAX_STOP = 4
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 256
MAX_TOOLS = 128
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

StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Stop = Annotated[
    Annotated[StopText, Tag("TEXT")] | Annotated[list[StopText], Field(max_length=MAX_STOP), Tag("LIST")],
    Discriminator(list_or_text),
]


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


def _not_the_servers(value: dict[str, Any]) -> dict[str, Any]:
    taken = sorted(TEMPLATE_OWN & value.keys())
    if taken:
        raise field_error("", f"{taken[0]!r} is the server's to set")
    return value


TokenBiases = Annotated[dict[str, float], BeforeValidator(_token_biases)]
TemplateArguments = Annotated[JsonObject, AfterValidator(_not_the_servers)]
"""For a model's chat template, such as ``{"enable_thinking": false}``."""


class TextRequest(Strict):
    """What chats, completions and responses have in common."""

    model: str = Field(min_length=1, max_length=256)
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    logit_bias: TokenBiases | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
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
    ignore_eos: bool | None = None
    """Extension, as in vLLM: go on until max_tokens."""
    structured_outputs: StructuredOutputs | None = None
    """Extension, as in vLLM."""
    service_tier: Literal["auto", "default", "flex", "priority", "scale", "fast"] | None = None
    """``flex`` waits in the batch lane; the others in the interactive one."""
    user: Text | None = None

    @property
    def lane(self) -> Lane:
        """Where its job waits."""
        return LANES.get(self.service_tier, "hi")

    def check_min_tokens(self, limit: int | None) -> None:
        """Refuses more tokens at the least than ``limit``, at the most."""
        if limit is not None and (self.min_tokens or 0) > limit:
            raise field_error("min_tokens", f"It is more than the limit of {limit} tokens", self.min_tokens)

    def guide(self, name: str, wanted: Any) -> Guide | None:
        """What the answer must look like.

        Args:
            name: of the parameter that says it in OpenAI's way.
            wanted: its value.

        Raises:
            PydanticCustomError: two parameters say it.
        """
        found: Guide | None = wanted.to_guide() if wanted is not None else None
        if self.structured_outputs is None:
            return found
        if found is not None:
            raise field_error("structured_outputs", f"'{name}' says already what the answer must look like")
        return self.structured_outputs.to_guide()


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_obfuscation: Literal[False] | None = None
    """Nothing is added to hide the lengths of tokens: who asks for it is refused."""


class UsageStreamOptions(StreamOptions):
    """The same of chats and completions, whose streams tell the usage only if asked."""

    include_usage: bool | None = None


def check_tool_choice(choice: Any, chosen: list[str], names: list[str]) -> None:
    """Refuses a choice of functions that are not there.

    Args:
        choice: as it came.
        chosen: the functions that it names.
        names: those of the request.
    """
    for name in chosen:
        if name not in names:
            raise field_error("tool_choice", "No function of that name is among 'tools'", name)
    if choice == "required" and not names:
        raise field_error("tool_choice", "It is only allowed when 'tools' are specified", choice)


def template_arguments(given: dict[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """Those of a job."""
    return {**(given or {}), **({} if effort is None else {"reasoning_effort": effort})}


_AS_THEY_ARE = (
    *("temperature", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("min_tokens", "stop_token_ids", "ignore_eos"),
)


def sampling_of(body: BaseModel, **own: Any) -> Sampling:
    """How a request wants its tokens chosen. An absent seed is drawn here, so that a resumed job draws the same tokens.

    Args:
        body: has any of the parameters that requests for text share.
        own: what requests of its kind say in their own way; None: nothing.
    """
    said = {name: getattr(body, name, None) for name in (*_AS_THEY_ARE, "top_p", "top_k", "seed", "stop")}
    stop, seed, top_p, top_k = said["stop"], said["seed"], said["top_p"], said["top_k"]
    asked = {
        **said,
        "top_p": None if top_p is None else max(top_p, 1e-6),
        "top_k": None if top_k is None else max(top_k, 0),
        "seed": secrets.randbits(63) if seed is None else seed,
        "seeded": seed is not None or None,
        "stop": (stop,) if isinstance(stop, str) else tuple(stop or ()),
        **own,
    }
    return Sampling.model_validate({name: value for name, value in asked.items() if value is not None})
