"""``POST /v1/embeddings``: the texts of a request are one job, and each vector a piece of its answer."""

import re
import time
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from ulid import ULID

from fastchat_q.jobs import Job, Lane
from fastchat_q.settings import Settings

from .asked import Asked
from .asking import answer
from .fields import Strict, Text
from .parameters import LANES, MAX_TOKEN_ID, TokenId
from .render import View
from .service import service_of
from .vectors import check_count

router = APIRouter(tags=["embeddings"])

SURROGATE = re.compile("[\ud800-\udfff]")
Inputs = tuple[str | tuple[int, ...], ...]
T = TypeVar("T")
Some = Annotated[list[T], Field(min_length=1)]
SomeText = Annotated[str, Field(min_length=1)]
SomeIds = Some[TokenId]


def inputs(value: Any, *, empty: bool = False) -> Inputs:
    """A text, token ids, or a list of one of these, as a tuple of these.

    By hand, for of the four branches of a union nobody could say which one was meant.

    Args:
        empty: texts may be.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("inputs", "Input should be a text, token ids, or a list of texts or of token ids")
    if isinstance(value[0], int):
        value = [value]
    found = tuple([tuple(one) if isinstance(one, list) else one for one in value])
    for number, one in enumerate(found):
        if type(one) is not type(found[0]) or not isinstance(one, str | tuple):
            raise PydanticCustomError(
                "inputs",
                "Input {number} is neither a text nor token ids, or not as those before it",
                {"number": number},
            )
        if not one and not (empty and isinstance(one, str)):
            raise PydanticCustomError("inputs", "Input {number} is empty", {"number": number})
        if isinstance(one, tuple) and not all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in one):
            raise PydanticCustomError("inputs", "Input {number} holds what is no token id", {"number": number})
        if isinstance(one, str) and SURROGATE.search(one):
            raise PydanticCustomError(
                "inputs", "Input {number} is no valid Unicode: it has lone surrogates", {"number": number}
            )
    return found


class EmbeddingRequest(Strict):
    """The body of ``POST /v1/embeddings``."""

    model: str = Field(min_length=1, max_length=256)
    input: Annotated[
        Inputs,
        BeforeValidator(inputs, json_schema_input_type=SomeText | Some[SomeText] | SomeIds | Some[SomeIds]),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, lt=2**31)
    """How many numbers a vector has; absent: as many as the model makes."""
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    """Extension, as in chats: ``flex`` waits in the batch lane."""
    user: Text | None = None

    def to_job(self) -> Job:
        """One frozen job with a new id."""
        lane: Lane = LANES.get(self.service_tier, "hi")
        return Job(
            id=str(ULID()), model=self.model, kind="embed", lane=lane, inputs=self.input, dimensions=self.dimensions
        )


@router.post(
    "/v1/embeddings",
    summary="Create embeddings",
    responses={200: {"description": "A list of embedding objects, in the order of the inputs."}},
)
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Queues all inputs as one job and answers with their vectors."""
    return await answer(request, asked(body, service_of(request).settings))


def asked(body: EmbeddingRequest, settings: Settings) -> Asked:
    """What the request asks for.

    Raises:
        InvalidRequestError: it has more inputs than the server takes.
    """
    check_count(len(body.input), "input", settings)
    job = body.to_job()
    extra = {"base64": True} if body.encoding_format == "base64" else {}
    view = View(job.id, job.model, int(time.time()), job.lane, form="embeddings", n=len(job.inputs), extra=extra)
    return Asked(body, job, view)
