"""The messages of a chat request, in OpenAI's shape, and how they become the turns that a chat template takes."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from fastchat_q.jobs import Message, Part, Role

from .fields import JsonObject, Strict, Text, field_error, list_or_text, without_neutral
from .media import Images

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "images": (None, []),
    "reasoning_details": (None, []),
    "thinking_blocks": (None, []),
}
"""Fields of an answer's message that clients send back with it in the next turn, and the values that say nothing."""


def _without(*names: str) -> Callable[[Any], Any]:
    """Takes fields out that clients add to an answer and send back with it: they repeat what others say.

    OpenAI's add ``parsed``, ``parsed_arguments`` and ``index``, LiteLLM ``provider_specific_fields``.
    """
    return lambda data: {key: data[key] for key in data if key not in names} if isinstance(data, dict) else data


class ImageUrl(Strict):
    """Where an image is: only data URLs are taken."""

    url: str
    detail: Literal["auto", "high"] | None = None
    """No image is made smaller than the model wants it, so ``low`` is refused."""


class ContentPart(Strict):
    """A part of a message's content."""

    type: Literal["text", "image_url", "refusal"]
    text: Text | None = None
    image_url: ImageUrl | None = None
    refusal: Text | None = None
    """What an assistant said instead of an answer."""
    cache_control: JsonObject | None = None
    """Of Anthropic's API, and what tools for several providers send to all of them: nothing depends on it."""

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> Self:
        if getattr(self, self.type) is None:
            raise field_error(self.type, f"A part of type '{self.type}' needs it")
        for other in ("text", "image_url", "refusal"):
            if other != self.type and getattr(self, other) is not None:
                raise field_error(other, f"A part of type '{self.type}' has no such field")
        return self


class CalledFunction(Strict):
    """The function of a tool call, with its arguments as JSON text."""

    name: Text
    arguments: Text


class ToolCall(Strict):
    """A tool call of an earlier answer."""

    id: Text
    type: Literal["function"] = "function"
    function: Annotated[CalledFunction, BeforeValidator(_without("parsed_arguments", "provider_specific_fields"))]


Content = Annotated[
    Annotated[Text, Tag("TEXT")] | Annotated[list[ContentPart], Field(min_length=1), Tag("LIST")],
    Discriminator(list_or_text),
]


class ChatMessage(Strict):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: list[Annotated[ToolCall, BeforeValidator(_without("index", "provider_specific_fields"))]] | None = None
    """Of an assistant."""
    refusal: Text | None = None
    """Of an assistant: what it said instead of an answer."""
    tool_call_id: Text | None = None
    """Of a tool: the call that it answers."""
    reasoning_content: Text | None = None
    """Extension, as in answers: what an assistant thought."""
    reasoning: Text | None = None
    """The same under its other name."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(_without("parsed", "provider_specific_fields")(data), NOT_SUPPORTED)

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        is_assistant = self.role == "assistant"
        thought = self.reasoning_content or self.reasoning
        if self.content is None and not (is_assistant and (self.tool_calls or thought or self.refusal)):
            raise field_error("content", f"A message of role '{self.role}' needs content")
        for name in ("tool_calls", "reasoning_content", "reasoning", "refusal"):
            if getattr(self, name) and not is_assistant:
                raise field_error(name, f"Only assistants have it, not the role '{self.role}'")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            need = "needs it: the id of the call that it answers" if self.role == "tool" else "has no such field"
            raise field_error("tool_call_id", f"A message of role '{self.role}' {need}")
        self._check_parts()
        return self

    def _check_parts(self) -> None:
        for number, part in enumerate(self.content if isinstance(self.content, list) else ()):
            if part.type == "image_url" and self.role != "user":
                raise field_error(f"content[{number}].type", "Only users send images", part.type)
            if part.type == "refusal" and self.role != "assistant":
                raise field_error(f"content[{number}].type", "Only assistants refuse", part.type)

    def to_message(self, images: Images, path: str) -> Message:
        """The turn as a chat template takes it.

        Args:
            images: gets the bytes of its images.
            path: of this message, for errors.

        Raises:
            InvalidRequestError: an image cannot be taken.
        """
        return Message(
            role=ROLES[self.role],
            content=self._content(images, path),
            name=self.name,
            reasoning_content=self.reasoning_content or self.reasoning,
            tool_calls=tuple([call.model_dump() for call in self.tool_calls or ()]),
            tool_call_id=self.tool_call_id,
        )

    def _content(self, images: Images, path: str) -> str | tuple[Part, ...] | None:
        if not isinstance(self.content, list):
            return self.content if self.refusal is None else (self.content or "") + self.refusal
        if all(part.image_url is None for part in self.content):
            return "".join([part.text or part.refusal or "" for part in self.content]) + (self.refusal or "")
        return tuple(
            [
                Part(type="text", text=part.text or "")
                if part.image_url is None
                else Part(type="image", blob=images.add(part.image_url.url, _url_path(path, number)))
                for number, part in enumerate(self.content)
            ]
        )


def _url_path(path: str, number: int) -> str:
    return f"{path}.content[{number}].image_url.url"
