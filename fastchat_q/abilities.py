"""Whether a model can do what a job asks for. Checked at the door, and again by the worker that took the job."""

from collections.abc import Mapping
from types import MappingProxyType

from .errors import InvalidRequestError
from .jobs import Feature, Job, Kind
from .registry import ModelCard

ENDPOINTS: dict[Kind, str] = {
    "chat": "POST /v1/chat/completions",
    "completion": "POST /v1/completions",
    "tokenize": "POST /tokenize",
    "detokenize": "POST /detokenize",
    "embed": "POST /v1/embeddings",
    "rerank": "POST /v1/rerank",
}
"""Where jobs of a kind come from first of all."""
TAKEN_BY: dict[Kind, str] = {**ENDPOINTS, "chat": "POST /v1/chat/completions, /v1/responses, /v1/messages"}
"""All of it."""

OF_TEXT: dict[Kind, Feature] = {"completion": "completions", "tokenize": "tokenize", "detokenize": "tokenize"}
"""Jobs that language models do, of whichever kind, if they have this feature."""
NO_TEMPLATE = (
    "The model {name!r} has no chat template, so it cannot take chat messages: it completes prompts "
    "(POST /v1/completions). Ways out, for its operator: --chat-template NAME, --chat-template FILE, or an "
    "instruction-tuned variant of the model."
)


def check_can_do(card: ModelCard, job: Job, spelt: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuses a job that the model's workers cannot do, rather than leave a part of it out.

    Args:
        spelt: parameters that the request has under another name than the job's.

    Raises:
        InvalidRequestError: it names the parameter, or that the model is one for another kind of job.
    """
    if job.kind != card.kind and OF_TEXT.get(job.kind) not in card.features:
        if card.kind == "completion" and job.kind == "chat":
            raise InvalidRequestError(NO_TEMPLATE.format(name=card.name), param="messages", code="no_chat_template")
        raise InvalidRequestError(
            f"The model {card.name!r} takes no such request, only {_endpoints(card)}. GET /v1/models says of each "
            f"model what it is for; for {TAKEN_BY[job.kind]} take one {_needed(job.kind)}.",
            param="model",
            code="model_kind",
        )
    for parameter, feature in job.asks().items():
        if feature not in card.features:
            name = spelt.get(parameter, parameter)
            way_out = "Leave the images out" if feature == "vision" else "Leave it out"
            raise InvalidRequestError(
                f"Unsupported parameter: {name!r} asks for what the model {card.name!r} cannot do. {way_out}, or "
                f"take a model that has the feature {feature!r}: GET /v1/models lists what each has.",
                param=name,
                code="unsupported_parameter",
            )


def _endpoints(card: ModelCard) -> str:
    """What a model takes."""
    kinds = [card.kind, *(kind for kind, feature in OF_TEXT.items() if feature in card.features and kind != card.kind)]
    return ", ".join([TAKEN_BY[kind] for kind in kinds])


def _needed(kind: Kind) -> str:
    feature = OF_TEXT.get(kind)
    return f"of kind {kind!r}" if feature is None else f"with the feature {feature!r}"
