"""The messages of a request, in Anthropic's blocks, and how they become the turns that a chat template takes."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BeforeValidator, Discriminator, Tag, model_validator

from fastchat_q.jobs import Message, Part

from ..fields import JsonObject, Strict, Text, field_error, without_neutral
from ..media import Images

BETWEEN_BLOCKS = "\n\n"
"""Between texts that are blocks of their own, but for those of an assistant, which are one text in pieces."""
ERROR = "Error: "
"""Before the result of a tool that failed: chat templates have no other place for it."""
KNOWN = ("text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking")
MEDIA_TYPES = Literal["image/jpeg", "image/png", "image/gif", "image/webp"]


CacheControl = JsonObject
"""Where a cached prompt may end, and for how long and whom it is kept. Accepted, whatever it says: it is about what a
prompt costs, and changes nothing in its answer."""


class _Block(Strict):
    cache_control: CacheControl | None = None


class TextBlock(_Block):
    """A text."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _as_it_came(cls, data: Any) -> Any:
        """Answers have these fields, and clients send answers back."""
        if isinstance(data, dict) and "parsed_output" in data:
            data = {name: value for name, value in data.items() if name != "parsed_output"}
        return without_neutral(data, {"citations": (None, [])})


class ImageSource(Strict):
    """Where an image is."""

    type: Literal["base64", "url"]
    media_type: MEDIA_TYPES | None = None
    data: str | None = None
    url: Text | None = None

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> Self:
        needed = ("media_type", "data") if self.type == "base64" else ("url",)
        for name in ("media_type", "data", "url"):
            if (getattr(self, name) is None) == (name in needed):
                verb = "needs it" if name in needed else "has no such field"
                raise field_error(name, f"A source of type '{self.type}' {verb}")
        return self

    def to_url(self) -> str:
        """The same as a data URL, unless it is a URL already."""
        return self.url if self.url is not None else f"data:{self.media_type};base64,{self.data}"


class ImageBlock(_Block):
    """An image of a user."""

    type: Literal["image"]
    source: ImageSource

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(data, {"transformations": (None, {})})


class ToolUseBlock(_Block):
    """A call of an earlier answer."""

    type: Literal["tool_use"]
    id: Text
    name: Text
    input: JsonObject

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(data, {"caller": (None, {"type": "direct"}), "toolset_name": (None,)})


class ThinkingBlock(Strict):
    """What an assistant thought. Its signature says nothing here."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None


class RedactedThinkingBlock(Strict):
    """What an assistant thought, encrypted by another server: nobody here can read it, and it is left out."""

    type: Literal["redacted_thinking"]
    data: Text


def _known(*types: str) -> BeforeValidator:
    """Refuses a block of a type that has no place here, by its type and not by each of its fields."""

    def check(data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind not in types:
            known = kind in KNOWN
            why = "Such a block cannot stand here" if known else "This server takes no such blocks"
            raise field_error("type", f"{why}, only {', '.join(types)}", kind)
        return data

    return BeforeValidator(check)


def _tag(data: Any) -> str:
    """Upper case, so that it is not taken for a part of the path of what is wrong; without a type it is a text."""
    kind = data.get("type") if isinstance(data, dict) else getattr(data, "type", None)
    return str(kind).upper() if kind in KNOWN else "TEXT"


ResultContent = Annotated[
    Annotated[TextBlock, Tag("TEXT")] | Annotated[ImageBlock, Tag("IMAGE")],
    Discriminator(_tag),
    _known("text", "image"),
]
SystemBlock = Annotated[TextBlock, _known("text")]


class ToolResultBlock(_Block):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Text | list[ResultContent] = ""
    is_error: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(data, {"toolset_name": (None,)})

    @property
    def text(self) -> str:
        """The texts of it."""
        found = self.content if isinstance(self.content, str) else _joined(self.content)
        return ERROR + found if self.is_error else found

    @property
    def images(self) -> list[tuple[int, ImageBlock]]:
        """The images of it, with their places."""
        blocks = [] if isinstance(self.content, str) else self.content
        return [(number, block) for number, block in enumerate(blocks) if isinstance(block, ImageBlock)]


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("TEXT")]
    | Annotated[ImageBlock, Tag("IMAGE")]
    | Annotated[ToolUseBlock, Tag("TOOL_USE")]
    | Annotated[ToolResultBlock, Tag("TOOL_RESULT")]
    | Annotated[ThinkingBlock, Tag("THINKING")]
    | Annotated[RedactedThinkingBlock, Tag("REDACTED_THINKING")],
    Discriminator(_tag),
    _known(*KNOWN),
]
BY_ROLE = {
    "system": (TextBlock,),
    "user": (TextBlock, ImageBlock, ToolResultBlock),
    "assistant": (TextBlock, ToolUseBlock, ThinkingBlock, RedactedThinkingBlock),
}


class InputMessage(Strict):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Text | list[ContentBlock]

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if not self.content and self.role != "assistant":
            raise field_error("content", f"A message of role '{self.role}' needs content")
        for number, block in enumerate(self.blocks):
            if not isinstance(block, BY_ROLE[self.role]):
                raise field_error(
                    f"content[{number}].type", f"A message of role '{self.role}' has no such block", block.type
                )
        return self

    @property
    def blocks(self) -> Sequence[Any]:
        """The content as blocks."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)] if self.content else []
        return self.content

    @property
    def has_text(self) -> bool:
        """Whether any of it is text."""
        return any(isinstance(block, TextBlock) and block.text for block in self.blocks)


def system_text(system: str | Sequence[TextBlock] | None) -> str:
    """The system prompt."""
    return system if isinstance(system, str) else _joined(system or ())


def turns(messages: Sequence[InputMessage], images: Images) -> Iterable[Message]:
    """The conversation as a chat template takes it. Neighbours of one role are one turn, as in Anthropic's API.

    Args:
        images: gets the bytes of the images.

    Raises:
        InvalidRequestError: an image cannot be taken.
    """
    at = 0
    while at < len(messages):
        role, blocks = messages[at].role, []
        while at < len(messages) and messages[at].role == role:
            path = f"messages[{at}].content"
            blocks += [(f"{path}[{number}]", block) for number, block in enumerate(messages[at].blocks)]
            at += 1
        if role == "assistant":
            yield _assistant([block for _, block in blocks])
        elif role == "system":
            yield Message(role="system", content=_joined([block for _, block in blocks]))
        else:
            yield from _user(blocks, images)


def _assistant(blocks: Sequence[Any]) -> Message:
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    thoughts = "".join([block.thinking for block in blocks if isinstance(block, ThinkingBlock)])
    return Message(
        role="assistant",
        content="".join(texts) if texts or not calls else None,
        reasoning_content=thoughts or None,
        tool_calls=tuple([_call(block) for block in calls]),
    )


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": orjson.dumps(block.input).decode()}
    return {"id": block.id, "type": "function", "function": function}


def _user(blocks: Sequence[tuple[str, Any]], images: Images) -> Iterable[Message]:
    """Results of tools come first, each as a turn of its own; their images are shown by the user behind them: few
    templates have a place for an image in a result.
    """
    shown: list[TextBlock | tuple[str, ImageBlock]] = []
    for path, block in blocks:
        if isinstance(block, ToolResultBlock):
            yield Message(role="tool", content=block.text, tool_call_id=block.tool_use_id)
            shown += [(f"{path}.content[{number}]", image) for number, image in block.images]
    shown += [
        (path, block) if isinstance(block, ImageBlock) else block
        for path, block in blocks
        if not isinstance(block, ToolResultBlock)
    ]
    if shown:
        yield Message(role="user", content=_parts(shown, images))


def _parts(shown: Sequence[TextBlock | tuple[str, ImageBlock]], images: Images) -> str | tuple[Part, ...]:
    """Text, or parts where there are images; texts in a row are one."""
    parts: list[Part] = []
    for one in shown:
        if isinstance(one, TextBlock):
            before = parts.pop().text + BETWEEN_BLOCKS if parts and parts[-1].type == "text" else ""
            parts.append(Part(type="text", text=before + one.text))
        else:
            path, image = one
            name = "url" if image.source.type == "url" else "data"
            parts.append(Part(type="image", blob=images.add(image.source.to_url(), f"{path}.source.{name}")))
    return parts[0].text if len(parts) == 1 and parts[0].type == "text" else tuple(parts)


def _joined(blocks: Iterable[Any]) -> str:
    return BETWEEN_BLOCKS.join([block.text for block in blocks if isinstance(block, TextBlock)])
