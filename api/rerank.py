"""``POST /v1/rerank``, in the shape that Jina, Cohere and vLLM share: documents in the order of their relevance."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field
from ulid import ULID

from fastchat_q.events import End, Event
from fastchat_q.jobs import Job

from .asking import answer
from .fields import Strict, Text
from .render import View
from .service import service_of
from .vectors import check_count, floats, prompt_usage, vectors

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
    check_count(len(body.documents), "documents", service_of(request).settings)
    job = body.to_job()
    view = View(job.id, job.model, int(time.time()), job.lane, kind=job.kind, n=len(job.inputs))
    return await answer(request, body, job, view, partial(_ranking, body))


def _ranking(body: RerankRequest, view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    scores = [floats(vector)[0] for vector in vectors(view.n, events)]
    order = sorted(range(view.n), key=lambda index: -scores[index])[: body.top_n or None]
    results = [
        {"index": index, "relevance_score": scores[index]}
        | ({"document": {"text": body.documents[index]}} if body.return_documents else {})
        for index in order
    ]
    return {"id": f"rerank-{view.job_id}", "model": view.model, "results": results, "usage": prompt_usage(end)}
