"""``GET /v1/models`` and the two probes."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from fastchat_q.aliases import Alias
from fastchat_q.loops import AWAY
from fastchat_q.registry import ModelCard, Registration, State

from .admission import admit, resolve
from .anthropic import models as anthropic
from .anthropic.errors import speaks_anthropic
from .auth import caller_of
from .catalog import Catalog
from .service import service_of

router = APIRouter(tags=["models"])

OWNER = "fastchat-q"
Limit = Annotated[
    int | None, Query(ge=1, le=anthropic.MAX_LIMIT, description="Models of a page, for Anthropic's clients.")
]
BEST_FIRST: tuple[State, ...] = ("serving", "draining", "loading", "idle", "crashed")


@router.get("/v1/models", summary="List the models that can be asked for")
async def list_models(
    request: Request, limit: Limit = None, after_id: str | None = None, before_id: str | None = None
) -> dict[str, Any]:
    """Models that a worker serves, loads, or would load for a job, and aliases of such models; as far as the key may
    use them. `state` says which of these a model is. With the header `anthropic-version`: in pages, and in the shape of
    Anthropic's API."""
    catalog, caller = service_of(request).catalog, caller_of(request)
    await catalog.refresh()
    found = [_model(entry) for name, entry in catalog.models().items() if caller.may_use(name)]
    found += [_alias(catalog, alias) for alias in catalog.aliases() if caller.may_use(alias.name)]
    if speaks_anthropic(request.scope):
        infos = [_info(catalog, model) for model in found]
        return anthropic.page(infos, limit, after_id, before_id)
    return {"object": "list", "data": found}


@router.get("/v1/models/{model:path}", summary="Retrieve a model")
async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
    """404 for a model that was never served, 503 for one that has no worker now, 403 for one the key may not use."""
    service, caller = service_of(request), caller_of(request)
    catalog = service.catalog
    target = await resolve(catalog, service.queue, caller.tenant, model, job_id="")
    await admit(catalog, caller, target, asked=model)
    alias = catalog.alias(model)
    found = _model(catalog.models()[model]) if alias is None else _alias(catalog, alias)
    return _info(catalog, found) if speaks_anthropic(request.scope) else found


@router.get("/healthz", summary="The process is alive")
async def healthz() -> dict[str, str]:
    """Says nothing of Redis or workers: a restart would not mend those."""
    return {"status": "ok"}


@router.get("/readyz", summary="Redis is reachable and evicts nothing, and some model is served or loaded on demand")
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
    models = [name for name, entry in catalog.models().items() if entry.serves or entry.on_demand]
    if not models:
        return JSONResponse({"status": "not ready", "reason": "no worker serves any model"}, 503)
    return JSONResponse({"status": "ready", "models": models})


def _model(entry: Registration) -> dict[str, Any]:
    card = entry.card
    shown = {"id": card.name, "object": "model", "created": card.created, "owned_by": OWNER, "state": entry.state}
    progress = {"progress": entry.progress, "phase": entry.phase} if entry.state == "loading" else {}
    return shown | progress | (_abilities(card) if entry.serves and not entry.on_demand else {})


def _info(catalog: Catalog, shown: dict[str, Any]) -> dict[str, Any]:
    entry = catalog.models().get(shown["id"])
    return anthropic.model_info(shown["id"], shown["created"], entry.card if entry is not None else None)


def _abilities(card: ModelCard) -> dict[str, Any]:
    """Extensions: under vLLM's names where it has one (``parent``: the model that an adapter changes), and our own."""
    parent = {} if card.base is None else {"parent": card.base}
    return {"max_model_len": card.context_length, "kind": card.kind, "features": list(card.features), **parent}


def _alias(catalog: Catalog, alias: Alias) -> dict[str, Any]:
    """As its models are: in the best state of theirs."""
    models = catalog.models()
    entries = [models[name] for name in alias.weights if name in models]
    state = min((entry.state for entry in entries), key=BEST_FIRST.index)
    created = min(entry.card.created for entry in entries)
    return {"id": alias.name, "object": "model", "created": created, "owned_by": OWNER, "state": state}
