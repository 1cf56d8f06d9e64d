"""Items of a response's input, in OpenAI's shape: how they are kept, and how they become the turns of a conversation.

Kept is a plain object for each item, JSON, in the shape in which OpenAI shows it; an image is kept as the digest of its
bytes, which lie beside the job. Output items (``response_output``) have that shape too: a conversation is both.
"""

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from fastchat_q.errors import InvalidRequestError
from fastchat_q.jobs import Message, Part

from .fields import Strict, Text, field_error, without_neutral
from .media import Images
from .messages import ROLES

Item = dict[str, Any]
"""One item as it is kept."""
Status = Literal["in_progress", "completed", "incomplete"]

_NO_BREAKPOINT: dict[str, tuple[Any, ...]] = {"prompt_cache_breakpoint": (None,)}
_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {"phase": (None,)}
_CALL_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "async": (None, False),
    "caller": (None, {"type": "direct"}),
    "created_by": (None,),
    "namespace": (None,),
}
_SEALED = "fcq1."
"""What reasoning in ``encrypted_content`` begins with here."""


class _Object(Strict):
    """An object of the official client, which sends back what it got with the fields that it has added."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if key not in ("parsed", "parsed_arguments")}
        return without_neutral(data, cls._table())

    @classmethod
    def _table(cls) -> Mapping[str, tuple[Any, ...]]:
        return {}


class InputText(_Object):
    """A text that a user, or whoever instructs, has written."""

    type: Literal["input_text"]
    text: Text

    @classmethod
    def _table(cls) -> Mapping[str, tuple[Any, ...]]:
        return _NO_BREAKPOINT

    def keep(self, images: Images, path: str) -> Item:
        """The part as it is kept."""
        return {"type": self.type, "text": self.text}


class InputImage(_Object):
    """An image, by URL: a data URL unless the server fetches images."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "high", "original"] | None = None
    """No image is made smaller than the model wants it, so ``low`` is refused."""

    @classmethod
    def _table(cls) -> Mapping[str, tuple[Any, ...]]:
        return _NO_BREAKPOINT | {"file_id": (None,)}

    def keep(self, images: Images, path: str) -> Item:
        """The part as it is kept; its bytes go to ``images``.

        Raises:
            InvalidRequestError: the image cannot be taken.
        """
        blob = images.add(self.image_url, f"{path}.image_url")
        url = None if self.image_url.startswith("data:") else self.image_url
        return {"type": self.type, "detail": self.detail or "auto", "image_url": url, "blob": blob}


class OutputText(_Object):
    """A text of an earlier answer."""

    type: Literal["output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    """Neither is anything to the model."""

    def keep(self, images: Images, path: str) -> Item:
        """The part as it is kept."""
        return {"type": self.type, "text": self.text, "annotations": [], "logprobs": []}


class Refusal(_Object):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: Text

    def keep(self, images: Images, path: str) -> Item:
        """The part as it is kept."""
        return {"type": self.type, "refusal": self.refusal}


class SummaryText(_Object):
    """A part of a summary of what was thought."""

    type: Literal["summary_text"]
    text: Text


class ReasoningText(_Object):
    """A part of what was thought."""

    type: Literal["reasoning_text"]
    text: Text


def _named(classes: Sequence[type[Any]], what: str, default: str = "") -> tuple[Discriminator, BeforeValidator]:
    """Picks the class of an object by its ``type``, with an error that names the types there are."""
    by_type = {cls.model_fields["type"].annotation.__args__[0]: cls.__name__ for cls in classes}
    known = ", ".join(map(repr, by_type))

    def tag(data: Any) -> str | None:
        kind = data.get("type", default) if isinstance(data, dict) else getattr(data, "type", None)
        return by_type.get(kind) if isinstance(kind, str) else None

    def check(data: Any) -> Any:
        if isinstance(data, dict) and tag(data) is None:
            raise field_error("type", f"{what} here are of type {known}", data.get("type", "nothing"))
        return data

    return Discriminator(tag), BeforeValidator(check)


ContentPart = Annotated[
    Annotated[InputText, Tag("InputText")]
    | Annotated[InputImage, Tag("InputImage")]
    | Annotated[OutputText, Tag("OutputText")]
    | Annotated[Refusal, Tag("Refusal")],
    *_named((InputText, InputImage, OutputText, Refusal), "Parts"),
]


class MessageItem(_Object):
    """A message, of the input or of an earlier output; ``type`` may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(min_length=1)]
    id: Text | None = None
    status: Status | None = None

    @classmethod
    def _table(cls) -> Mapping[str, tuple[Any, ...]]:
        return _MESSAGE_NEUTRAL

    @model_validator(mode="after")
    def _has_parts_of_its_role(self) -> Self:
        if isinstance(self.content, str):
            return self
        is_output = self.role == "assistant"
        for number, part in enumerate(self.content):
            if isinstance(part, OutputText | Refusal) != is_output:
                takes = "'output_text' and 'refusal'" if is_output else "'input_text' and 'input_image'"
                name = f"content[{number}].type"
                raise field_error(name, f"A message of role '{self.role}' takes {takes}", part.type)
            if isinstance(part, InputImage) and self.role != "user":
                raise field_error(f"content[{number}].type", "Only users send images", part.type)
        return self

    def keep(self, images: Images, path: str) -> Item:
        """The item as it is kept.

        Raises:
            InvalidRequestError: an image cannot be taken.
        """
        content: list[Item]
        if not isinstance(self.content, str):
            content = [part.keep(images, f"{path}.content[{number}]") for number, part in enumerate(self.content)]
        elif self.role == "assistant":
            content = [{"type": "output_text", "text": self.content, "annotations": [], "logprobs": []}]
        else:
            content = [{"type": "input_text", "text": self.content}]
        status = self.status or "completed"
        return {"id": self.id, "type": "message", "role": self.role, "status": status, "content": content}


class FunctionCall(_Object):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: Annotated[Text, Field(min_length=1)]
    name: Annotated[Text, Field(min_length=1)]
    arguments: Text
    id: Text | None = None
    status: Status | None = None

    @classmethod
    def _table(cls) -> Mapping[str, tuple[Any, ...]]:
        return _CALL_NEUTRAL

    def keep(self, images: Images, path: str) -> Item:
        """The item as it is kept."""
        call = {"call_id": self.call_id, "name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": self.type, "status": self.status or "completed", **call}


class FunctionCallOutput(_Object):
    """What a called function gave back: a text, or parts that are texts."""

    type: Literal["function_call_output"]
    call_id: Annotated[Text, Field(min_length=1)]
    output: Text | list[InputText]
    id: Text | None = None
    status: Status | None = None

    @classmethod
    def _table(cls) -> Mapping[str, tuple[Any, ...]]:
        return _CALL_NEUTRAL | {"name": (None,)}

    def keep(self, images: Images, path: str) -> Item:
        """The item as it is kept."""
        output = self.output if isinstance(self.output, str) else [part.keep(images, path) for part in self.output]
        status = self.status or "completed"
        return {"id": self.id, "type": self.type, "status": status, "call_id": self.call_id, "output": output}


class ReasoningItem(_Object):
    """What was thought before an earlier answer."""

    type: Literal["reasoning"]
    id: Text | None = None
    summary: list[SummaryText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: Status | None = None

    def keep(self, images: Images, path: str) -> Item:
        """The item as it is kept.

        Raises:
            InvalidRequestError: its encrypted content is not of this server.
        """
        texts = [part.text for part in self.content or ()]
        if not texts and self.encrypted_content is not None:
            texts = [unsealed(self.encrypted_content, f"{path}.encrypted_content")]
        return {
            "id": self.id,
            "type": self.type,
            "summary": [part.model_dump() for part in self.summary],
            "content": [{"type": "reasoning_text", "text": text} for text in texts],
            "status": self.status or "completed",
        }


class ItemReference(_Object):
    """An item of an earlier response, by its id."""

    type: Literal["item_reference"]
    id: Annotated[Text, Field(min_length=1)]


InputItem = Annotated[
    Annotated[MessageItem, Tag("MessageItem")]
    | Annotated[FunctionCall, Tag("FunctionCall")]
    | Annotated[FunctionCallOutput, Tag("FunctionCallOutput")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")]
    | Annotated[ItemReference, Tag("ItemReference")],
    *_named((MessageItem, FunctionCall, FunctionCallOutput, ReasoningItem, ItemReference), "Items", "message"),
]


def keep_all(
    given: str | Sequence[Any],
    images: Images,
    found: Mapping[str, Item],
    blobs: Mapping[str, bytes],
    before: Sequence[Item] = (),
) -> list[Item]:
    """The items of a request as they are kept.

    Args:
        images: gets the bytes of their images.
        found: the items that references are to, by id.
        blobs: the images of those, by digest.
        before: the conversation so far, whose calls may be answered.

    Raises:
        InvalidRequestError: an image cannot be taken, a reference is to nothing, or a function's output to no call.
    """
    if isinstance(given, str):
        given = [MessageItem(role="user", content=given)]
    calls = {item["call_id"] for item in before if item["type"] == "function_call"}
    kept: list[Item] = []
    for number, item in enumerate(given):
        path = f"input[{number}]"
        if isinstance(item, ItemReference):
            if item.id not in found:
                raise InvalidRequestError(
                    f"Invalid value for '{path}.id': there is no item {item.id!r}: it is of no response that is kept.",
                    param=f"{path}.id",
                    code="item_not_found",
                )
            one = found[item.id]
            for part in image_parts([one]):
                images.take(part["image_url"], part["blob"], blobs, f"{path}.id")
        else:
            one = item.keep(images, path)
        if one["type"] == "function_call":
            calls.add(one["call_id"])
        elif one["type"] == "function_call_output" and one["call_id"] not in calls:
            raise InvalidRequestError(
                f"No tool call found for function call output with call_id {one['call_id']}.",
                param="input",
                code="call_not_found",
            )
        kept.append(one)
    return kept


def to_messages(items: Sequence[Item]) -> list[Message]:
    """The turns that a chat template takes: what an assistant thought, said and called is one turn."""
    messages: list[Message] = []
    turn: dict[str, Any] = {}

    def end_turn() -> None:
        if turn:
            messages.append(Message(role="assistant", **turn))
            turn.clear()

    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            end_turn()
            thought = "".join([part["text"] for part in item.get("content") or item.get("summary") or ()])
            if thought:
                turn["reasoning_content"] = thought
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            turn["tool_calls"] = (*turn.get("tool_calls", ()), call)
        elif kind == "message" and item["role"] == "assistant":
            if "content" in turn or "tool_calls" in turn:
                end_turn()
            turn["content"] = "".join([part.get("text") or part.get("refusal") or "" for part in item["content"]])
        elif kind == "message":
            end_turn()
            messages.append(Message(role=ROLES[item["role"]], content=_content(item["content"])))
        else:
            end_turn()
            messages.append(Message(role="tool", content=_output_text(item["output"]), tool_call_id=item["call_id"]))
    end_turn()
    return messages


def _content(parts: Sequence[Item]) -> str | tuple[Part, ...]:
    if all(part["type"] == "input_text" for part in parts):
        return "".join([part["text"] for part in parts])
    return tuple(
        [
            Part(type="text", text=part["text"])
            if part["type"] == "input_text"
            else Part(type="image", blob=part["blob"])
            for part in parts
        ]
    )


def _output_text(output: str | Sequence[Item]) -> str:
    return output if isinstance(output, str) else "".join([part["text"] for part in output])


def image_parts(items: Sequence[Item]) -> list[Item]:
    """All parts of items that are images."""
    return [
        part for item in items if item["type"] == "message" for part in item["content"] if part["type"] == "input_image"
    ]


def shown(item: Item, item_id: str, url_of: Callable[[str], str | None]) -> Item:
    """An item as the API shows it.

    Args:
        item_id: its id if it has none of its own.
        url_of: the data URL of an image by its digest; None: it is not shown.
    """
    item = {**item, "id": item.get("id") or item_id}
    if item["type"] == "message":
        item["content"] = [_shown_part(part, url_of) for part in item["content"]]
    return item


def _shown_part(part: Item, url_of: Callable[[str], str | None]) -> Item:
    if part["type"] != "input_image":
        return part
    url = part["image_url"] or url_of(part["blob"])
    return {"type": "input_image", "detail": part["detail"], "file_id": None, "image_url": url}


def sealed(text: str) -> str:
    """What was thought, as one opaque word that a client sends back. It is no secret: it stands beside."""
    return _SEALED + base64.urlsafe_b64encode(text.encode()).decode()


def unsealed(word: str, path: str) -> str:
    """The inverse of `sealed`.

    Raises:
        InvalidRequestError: it was not made here.
    """
    try:
        if not word.startswith(_SEALED):
            raise ValueError("another prefix")
        return base64.b64decode(word.removeprefix(_SEALED), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(
            f"Invalid value for '{path}': this server has not made it. Send the item's 'content' instead.",
            param=path,
            code="invalid_encrypted_content",
        ) from error
