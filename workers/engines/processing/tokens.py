"""What a job that tokenizes or detokenizes is told: no model is asked."""

from typing import Any

import orjson

from fastchat_q.events import Piece
from fastchat_q.jobs import Kind

from ..base import Ended, Output, Request

KINDS: tuple[Kind, ...] = ("tokenize", "detokenize")
"""Jobs that need a tokenizer only."""


def token_answer(request: Request, tokenizer: Any, context: int | None, ids: list[int]) -> Output:
    """All of the answer.

    Args:
        context: of the model, in tokens.
        ids: of the job's prompt; the tokens that are to be made text.
    """
    if request.job.kind == "detokenize":
        return said(request, Piece(text=str(tokenizer.decode(ids)), units=1))
    strings = tokenizer.convert_ids_to_tokens(ids) if request.job.tells == "strings" else None
    return said(request, counted(request, ids, context, strings))


def counted(request: Request, ids: list[int], context: int | None, strings: list[str] | None) -> Piece:
    """The answer of a job that tokenizes (``api/counts.py`` reads it)."""
    told = {"count": len(ids), "max_model_len": context}
    if strings is not None:
        told["token_strs"] = strings  # type: ignore[assignment]
    return Piece(() if request.job.tells == "count" else tuple(ids), orjson.dumps(told).decode(), units=1)


def said(request: Request, piece: Piece) -> Output:
    """An answer of one piece, which an earlier attempt may have told. Nothing was computed, so nothing is used."""
    return Output(request.ticket, () if request.prior else (piece,), Ended(finish_reason="stop"))
