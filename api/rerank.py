"""``POST /v1/rerank``, in the shape that Jina, Cohere and vLLM share: documents in the order of their relevance."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field
from ulid import ULID

from fastchat_q.jobs import Job
from fastchat_q.settings import Settings

from .asked import Asked
from .asking import answer
from .fields import Strict, Text
from .render import View
from .service import service_of
from .vectors import check_count

router = APIRouter(tags=["rerank"])


def _text(document: Any) -> Any:
    """``{"text": "..."}`` is the same as the text."""
    return document["text"] if isinstance(document, dict) and document.keys() == {"text"} else document


class RerankRequest(Strict):
    """The body of ``POST /v1/rerank``."""

    model: str = Field(min_length=1, max_length=256)
    query: Annotated[Text, Field(min_length=1)]
    documents: list[Annotated[Text, BeforeValidator(_text)]] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=0, lt=2**31)
    """How many results; absent and 0: all."""
    return_documents: bool = True
    user: Text | None = None

    def to_job(self) -> Job:
        """One frozen job with a new id."""
        return Job(id=str(ULID()), model=self.model, kind="rerank", query=self.query, inputs=tuple(self.documents))


@router.post(
    "/v1/rerank",
    summary="Rank documents for a query",
    responses={200: {"description": "The documents with their scores, the most relevant first."}},
)
async def create_rerank(body: RerankRequest, request: Request) -> Response:
    """Queues all documents as one job and answers with their order."""
    return await answer(request, asked(body, service_of(request).settings))


def asked(body: RerankRequest, settings: Settings) -> Asked:
    """What the request asks for.

    Raises:
        InvalidRequestError: it has more documents than the server takes.
    """
    check_count(len(body.documents), "documents", settings)
    job = body.to_job()
    extra: dict[str, Any] = {"top_n": body.top_n} | ({"documents": body.documents} if body.return_documents else {})
    view = View(job.id, job.model, int(time.time()), job.lane, form="rerank", n=len(job.inputs), extra=extra)
    return Asked(body, job, view)
