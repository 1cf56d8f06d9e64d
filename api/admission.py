"""What may be asked for: everything that is refused before a job exists. Who asks is the business of ``auth``."""

import difflib

from fastchat_q.errors import ModelNotFoundError, NoWorkerError
from fastchat_q.jobs import Lane
from fastchat_q.registry import ModelCard
from fastchat_q.tenants import Caller

from .auth import check_scope
from .catalog import Catalog


async def admit(catalog: Catalog, caller: Caller, model: str, lane: Lane = "hi") -> ModelCard | None:
    """The card of a model that can be asked now; None for a job of lane ``lo`` that can wait for a worker to come.

    Raises:
        PermissionDeniedError: the job is for the batch lane, and the caller has not the scope ``batch``.
        ModelNotAllowedError: it is not on the caller's list.
        NoWorkerError: it was served lately, but no worker is alive.
        ModelNotFoundError: never heard of it; the message names near matches.
    """
    if lane == "lo":
        check_scope(caller, "batch", "the batch lane ('service_tier': 'flex')")
    caller.check_model(model)
    card = catalog.card(model)
    if card is None:
        await catalog.refresh()  # a worker may have come within the last second
        card = catalog.card(model)
    if card is not None:
        return card
    trouble = catalog.trouble(model)
    if trouble is not None:
        why = f"keeps ending ({trouble}) and is started again" if trouble else "is loading it"
        raise NoWorkerError(f"Model {model!r} is not served yet: its worker {why}.", param="model")
    known = catalog.known()
    if model in known:
        if lane == "lo":
            return None
        raise NoWorkerError(
            f"No worker serves model {model!r} at the moment. Start one with: fastchat-q worker --model {model}",
            param="model",
        )
    near = difflib.get_close_matches(model, filter(caller.may_use, known), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ModelNotFoundError(
        f"The model {model!r} does not exist on this server.{hint} GET /v1/models lists the models.", param="model"
    )
