"""Whether a model can do what a job asks for. Checked at the door, and again by the worker that took the job."""

from collections.abc import Mapping
from types import MappingProxyType

from .errors import InvalidRequestError
from .jobs import Job, Kind
from .registry import ModelCard

ENDPOINTS: dict[Kind, str] = {
    "chat": "POST /v1/chat/completions",
    "embed": "POST /v1/embeddings",
    "rerank": "POST /v1/rerank",
}


def check_can_do(card: ModelCard, job: Job, spelt: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuses a job that the model's workers cannot do, rather than leave a part of it out.

    Args:
        spelt: parameters that the request has under another name than the job's.

    Raises:
        InvalidRequestError: it names the parameter, or that the model is one for another kind of job.
    """
    if job.kind != card.kind:
        raise InvalidRequestError(
            f"The model {card.name!r} takes no such request, only {ENDPOINTS[card.kind]}. GET /v1/models says of each "
            f"model which kind it is; {ENDPOINTS[job.kind]} needs one of kind {job.kind!r}.",
            param="model",
            code="model_kind",
        )
    for parameter, feature in job.asks().items():
        if feature not in card.features:
            name = spelt.get(parameter, parameter)
            raise InvalidRequestError(
                f"Unsupported parameter: {name!r} asks for what the model {card.name!r} cannot do. Leave it out, or "
                f"take a model that has the feature {feature!r}: GET /v1/models lists what each has.",
                param=name,
                code="unsupported_parameter",
            )
