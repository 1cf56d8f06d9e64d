"""``GET /v1/models`` and the two probes."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from fastchat_q.loops import AWAY
from fastchat_q.registry import ModelCard

from .admission import admit
from .auth import caller_of
from .service import service_of

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List the models that are served now")
async def list_models(request: Request) -> dict[str, Any]:
    """A model is in the list while at least one worker serves it, for keys that may use it."""
    catalog, caller = service_of(request).catalog, caller_of(request)
    await catalog.refresh()
    return {"object": "list", "data": [_model(card) for card in catalog.cards() if caller.may_use(card.name)]}


@router.get("/v1/models/{model:path}", summary="Retrieve a model")
async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
    """404 for a model that was never served, 503 for one that has no worker now, 403 for one the key may not use."""
    card = await admit(service_of(request).catalog, caller_of(request), model)
    assert card is not None  # only jobs of the batch lane may wait for a worker
    return _model(card)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="The process is alive")
async def healthz() -> dict[str, str]:
    """Says nothing of Redis or workers: a restart would not mend those."""
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="Redis is reachable and evicts nothing, and at least one model is served")
async def readyz(request: Request) -> JSONResponse:
    """503 with the reason otherwise."""
    service = service_of(request)
    catalog = service.catalog
    try:
        await catalog.refresh()
    except AWAY as error:
        return JSONResponse({"status": "not ready", "reason": f"redis: {error}"}, 503)
    if service.durability.objection is not None:
        return JSONResponse({"status": "not ready", "reason": f"redis: {service.durability.objection}"}, 503)
    models = [card.name for card in catalog.cards()]
    if not models:
        return JSONResponse({"status": "not ready", "reason": "no worker serves any model"}, 503)
    return JSONResponse({"status": "ready", "models": models})


def _model(card: ModelCard) -> dict[str, Any]:
    shown = {"id": card.name, "object": "model", "created": card.created, "owned_by": "fastchat-q"}
    return shown | _abilities(card)


def _abilities(card: ModelCard) -> dict[str, Any]:
    """Extensions: under vLLM's names where it has one (``parent``: the model that an adapter changes), and our own."""
    parent = {} if card.base is None else {"parent": card.base}
    return {"max_model_len": card.context_length, "kind": card.kind, "features": list(card.features), **parent}
