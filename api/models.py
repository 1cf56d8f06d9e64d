"""``GET /v1/models`` and the two probes."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from fastchat_q.loops import AWAY
from fastchat_q.registry import ModelCard

from .admission import admit
from .service import Service, service_of

router = APIRouter()
ServiceDep = Annotated[Service, Depends(service_of)]


@router.get("/v1/models", summary="List the models that are served now")
async def list_models(service: ServiceDep) -> dict[str, Any]:
    """A model is in the list while at least one worker serves it."""
    await service.catalog.refresh()
    return {"object": "list", "data": [_model(card) for card in service.catalog.cards()]}


@router.get("/v1/models/{model:path}", summary="Retrieve a model")
async def retrieve_model(model: str, service: ServiceDep) -> dict[str, Any]:
    """404 for a model that was never served, 503 for one that has no worker at the moment."""
    return _model(await admit(service.catalog, model))


@router.get("/healthz", summary="The process is alive")
async def healthz() -> dict[str, str]:
    """Says nothing of Redis or workers: a restart would not mend those."""
    return {"status": "ok"}


@router.get("/readyz", summary="Redis is reachable and at least one model is served")
async def readyz(service: ServiceDep) -> JSONResponse:
    """503 with the reason otherwise."""
    try:
        await service.catalog.refresh()
    except AWAY as error:
        return JSONResponse({"status": "not ready", "reason": f"redis: {error}"}, 503)
    models = [card.name for card in service.catalog.cards()]
    if not models:
        return JSONResponse({"status": "not ready", "reason": "no worker serves any model"}, 503)
    return JSONResponse({"status": "ready", "models": models})


def _model(card: ModelCard) -> dict[str, Any]:
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": "fastchat-q"}
