"""``POST /tokenize`` and ``POST /detokenize``, as vLLM has them: a worker answers, in the step that takes the job in.

They are jobs of the model's queue, and count as requests, not as tokens, towards the limits of a key.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, model_validator
from ulid import ULID

from fastchat_q.jobs import Job, Message
from fastchat_q.settings import Settings

from .asked import Asked
from .asking import answer, ask
from .fields import Strict, Text, field_error, without_neutral
from .guard import check_rest
from .media import Images
from .messages import ChatMessage
from .parameters import MAX_TOOLS, TemplateArguments, TokenId
from .render import Form, View
from .tools import Tool

MAX_TOKENS = 2**20
"""Token ids that a request to detokenize may have."""
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "chat_template": (None,),
    "media_io_kwargs": (None,),
    "mm_processor_kwargs": (None,),
}

router = APIRouter(tags=["tokens"])


class TokenizeRequest(Strict):
    """The body of ``POST /tokenize``: a prompt, or messages."""

    model: str = Field(min_length=1, max_length=256)
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    """Those that the tokenizer puts around a text. Absent: around a prompt, not around what a chat template writes."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(data, NOT_SUPPORTED)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("prompt", "Exactly one of 'prompt' and 'messages' is needed")
        of_chats = self.tools or self.chat_template_kwargs or self.continue_final_message
        if self.messages is None and (of_chats or not self.add_generation_prompt):
            raise field_error("messages", "Without messages there is no chat template to follow")
        if self.continue_final_message and self.add_generation_prompt:
            raise field_error("add_generation_prompt", "It must be false where 'continue_final_message' is true", True)
        return self


class DetokenizeRequest(Strict):
    """The body of ``POST /detokenize``."""

    model: str = Field(min_length=1, max_length=256)
    tokens: list[TokenId] = Field(min_length=1, max_length=MAX_TOKENS)


@router.post("/tokenize", summary="Tokenize a prompt or messages")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Answers `count`, `max_model_len`, `tokens` and, if asked for, `token_strs`."""
    return await ask(request, body, asked)


@router.post("/detokenize", summary="Make text of token ids")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Answers `prompt`, special tokens included."""
    job = Job(id=str(ULID()), model=body.model, kind="detokenize", inputs=(tuple(body.tokens),))
    return await answer(request, Asked(body, job, _view(job, "text")))


def asked(body: TokenizeRequest, settings: Settings, size: int) -> Asked:
    """What a request to tokenize asks for.

    Args:
        size: of the request's body, in bytes.

    Raises:
        InvalidRequestError: an image cannot be taken.
        RequestTooLargeError: the body is too large without its images.
    """
    tells: Literal["ids", "strings"] = "strings" if body.return_token_strs else "ids"
    images = Images.within(settings)
    messages = [message.to_message(images, f"messages[{number}]") for number, message in enumerate(body.messages or ())]
    check_rest(size, images.url_bytes, settings.max_body_bytes)
    job = Job(
        id=str(ULID()),
        model=body.model,
        kind="tokenize",
        messages=tuple(messages),
        tools=tuple([tool.to_object() for tool in body.tools or ()]),
        template_kwargs={
            **(body.chat_template_kwargs or {}),
            **({"continue_final_message": True} if body.continue_final_message else {}),
        },
        generation_prompt=body.add_generation_prompt or body.continue_final_message,
        inputs=() if body.prompt is None else (body.prompt,),
        special_tokens=body.add_special_tokens,
        tells=tells,
    )
    return Asked(body, job, _view(job, "tokens"), images=images)


def asked_count(
    body: BaseModel,
    model: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
    images: Images | None = None,
    form: Form = "tokens",
) -> Asked:
    """What a request asks for that wants to know only how many tokens a chat's prompt has.

    The job renders the very prompt that a chat with the same messages, tools and template arguments has, and tells the
    count and nothing else. Hand the result to ``asking.answer``.

    Args:
        body: as parsed: what an idempotency key stands for.
        messages: as a job has them; their images in ``images``.
        tools: OpenAI's objects.
        form: of the answer: a row of ``answers.FORMS``, whose ``whole`` finds the count with
            ``counts.told(events)[1]["count"]``. ``tokens`` is vLLM's object, with no tokens in it.
    """
    job = Job(
        id=str(ULID()),
        model=model,
        kind="tokenize",
        messages=tuple(messages),
        tools=tuple([dict(tool) for tool in tools]),
        template_kwargs=dict(template_kwargs or {}),
        tells="count",
    )
    return Asked(body, job, _view(job, form), images=images)


def _view(job: Job, form: Form) -> View:
    return View(job.id, job.model, int(time.time()), job.lane, form=form)
