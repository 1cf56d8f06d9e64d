"""What may be asked for: everything that is refused before a job exists. Who asks is the business of ``auth``."""

import difflib

from fastchat_q import keys
from fastchat_q.errors import LoadFailedError, ModelNotFoundError, NoWorkerError
from fastchat_q.jobs import Lane
from fastchat_q.queue import Queue
from fastchat_q.registry import ModelCard
from fastchat_q.tenants import Caller

from .auth import check_scope
from .catalog import Catalog


async def admit(
    catalog: Catalog, caller: Caller, model: str, lane: Lane = "hi", *, asked: str | None = None
) -> ModelCard | None:
    """The card of a model that can be asked now; None for a job that waits until the model is loaded.

    Args:
        asked: the name that the caller asked for, an alias perhaps: it is the one that its key must allow.

    Raises:
        PermissionDeniedError: the job is for the batch lane, and the caller has not the scope ``batch``.
        ModelNotAllowedError: it is not on the caller's list.
        LoadFailedError: it is loaded on demand, and that failed a moment ago.
        NoWorkerError: it was served lately, but no worker is alive.
        ModelNotFoundError: never heard of it; the message names near matches.
    """
    if lane == "lo":
        check_scope(caller, "batch", "the batch lane ('service_tier': 'flex')")
    caller.check_model(asked or model)
    if not catalog.can_be_asked(model):
        await catalog.refresh()  # a worker may have come within the last second
    if catalog.can_be_asked(model):
        return catalog.card(model)
    trouble = catalog.trouble(model)
    if trouble is not None and trouble.on_demand:
        raise LoadFailedError(model, trouble.reason, trouble.retry_in_s)
    if trouble is not None:
        why = f"its worker keeps ending ({trouble.reason}) and is started again"
        raise NoWorkerError(f"Model {model!r} is not served yet: {why}.", param="model")
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


async def resolve(catalog: Catalog, queue: Queue, tenant: str, asked: str, job_id: str, key_digest: str = "") -> str:
    """The model that a job is for: what was asked, or of an alias one of its models.

    The choice is a function of the job's id or of the client's idempotency key. A key that was used before stays with
    its model, whatever became of alias and model since: there its answer is.
    """
    if not catalog.can_be_asked(asked) and catalog.alias(asked) is None:
        await catalog.refresh()
    alias = catalog.alias(asked)
    if alias is None:
        return asked
    used_for = await queue.model_of_key(tenant, key_digest) if key_digest else None
    if used_for is not None:
        for model in (*alias.weights, *sorted(catalog.known())):
            if keys.slug(model) == used_for:
                return model
    return alias.choose(key_digest or job_id, [model for model in alias.weights if catalog.can_be_asked(model)])
