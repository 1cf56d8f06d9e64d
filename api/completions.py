"""``POST /v1/completions``: raw prompts, without a chat template. All prompts of a request are one job."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field, model_validator
from ulid import ULID

from fastchat_q.errors import InvalidRequestError
from fastchat_q.jobs import MAX_CHOICES, Guide, Job
from fastchat_q.settings import Settings

from .asked import Asked
from .asking import answer
from .embeddings import Inputs, inputs
from .fields import field_error, without_neutral
from .formats import ResponseFormat
from .parameters import TextRequest, UsageStreamOptions, sampling_of
from .render import View
from .schemas import INSTEAD
from .service import service_of

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
MAX_LOGPROBS = 5
"""OpenAI's."""
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "priority": (None, 0),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "suffix": (None, ""),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
"""Parameters of OpenAI and vLLM that this version does not implement, and the values that ask for nothing."""

router = APIRouter(tags=["completions"])


class CompletionRequest(TextRequest):
    """The body of ``POST /v1/completions``."""

    prompt: Annotated[
        Inputs,
        BeforeValidator(
            partial(inputs, empty=True), json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    """Absent: 16. 0 only with ``echo``."""
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """So many answers are made for each prompt, and the ``n`` likeliest are shown. Not with ``stream``."""
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    stream_options: UsageStreamOptions | None = None
    add_special_tokens: bool | None = None
    """Extension, as in vLLM; absent: the tokenizer puts its special tokens, mostly one at the start, around texts."""
    response_format: ResponseFormat | None = None
    on_disconnect: Literal["cancel", "continue"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        return without_neutral(data, NOT_SUPPORTED, INSTEAD)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "It is only allowed when 'stream' is true")
        if not self.limit and not self.echo:
            raise field_error("max_tokens", "0 is only allowed when 'echo' is true", self.max_tokens)
        if self.best_of is not None and self.best_of < self.shown:
            raise field_error("best_of", f"It is less than the {self.shown} of 'n'", self.best_of)
        if self.stream and self.made > self.shown:
            raise field_error("best_of", "The best of several cannot be streamed", self.best_of)
        self.check_min_tokens(self.limit)
        self._guide()
        return self

    def _guide(self) -> Guide | None:
        return self.guide("response_format", self.response_format)

    @property
    def limit(self) -> int:
        """Tokens that an answer may have."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def shown(self) -> int:
        """Answers that are shown for each prompt."""
        return self.n or 1

    @property
    def made(self) -> int:
        """Answers that are made for each prompt."""
        return max(self.shown, self.best_of or 1)

    def spelt(self) -> Mapping[str, str]:
        """Parameters that have other names here than in a job."""
        names = {} if self.structured_outputs is None else {"response_format": "structured_outputs"}
        return names if self.made == self.shown else {**names, "n": "best_of", "logprobs": "best_of"}

    def to_job(self) -> Job:
        """One frozen job with a new id. An absent seed is drawn here, so that a resumed job draws the same tokens."""
        ranks = self.made > self.shown  # by log probabilities, which may be of no other interest
        return Job(
            id=str(ULID()),
            model=self.model,
            kind="completion",
            lane=self.lane,
            inputs=self.prompt,
            sampling=sampling_of(
                self,
                max_tokens=self.limit,
                n=self.made,
                logprobs=0 if ranks and self.logprobs is None else self.logprobs,
                guide=self._guide(),
            ),
            special_tokens=False if self.add_special_tokens is False else None,
            echo=bool(self.echo),
        )


@router.post(
    "/v1/completions",
    summary="Create a completion",
    responses={200: {"description": "A text_completion object, or server-sent events if `stream` is true."}},
)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Queues all prompts as one job and answers with what a worker makes of them."""
    return await answer(request, asked(body, service_of(request).settings))


def asked(body: CompletionRequest, settings: Settings) -> Asked:
    """What the request asks for.

    Raises:
        InvalidRequestError: it asks for more answers than a job may have.
    """
    prompts = len(body.prompt)
    if prompts * body.made > MAX_CHOICES:
        raise InvalidRequestError(
            f"Invalid value for 'prompt': {prompts} prompts with {body.made} answers each make more than the limit of "
            f"{MAX_CHOICES} answers. Send them in several requests.",
            param="prompt",
            code="too_many_inputs",
        )
    job = body.to_job()
    extra: dict[str, Any] = {}
    if body.made > body.shown:
        extra = {"best_of": body.made, "n": body.shown, "logprobs": body.logprobs is not None}
    view = View(
        job.id,
        job.model,
        int(time.time()),
        job.lane,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        form="completion",
        n=prompts * body.shown,
        extra=extra,
    )
    detached = body.on_disconnect == "continue"
    return Asked(body, job, view, stream=bool(body.stream), detached=detached, spelt=body.spelt())
