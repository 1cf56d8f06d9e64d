"""A job as the body of ``POST /v1/chat/completions``, and the kinds of servers that take it."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from fastchat_q.errors import InvalidRequestError
from fastchat_q.images import KINDS, media_type
from fastchat_q.jobs import Guide, Job, Message, Sampling

Blobs = Mapping[str, bytes]
"""Images by the name that the job has for them."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a kind of server takes beyond OpenAI's own fields.

    Args:
        go_on: fields with which it continues a last message of the assistant; None: it does not.
        counts: it says how many tokens there are with every chunk, if asked to.
        names: of fields that it calls otherwise.
        neutral: fields whose default there is not ours.
        seed_bits: the width of a seed.
    """

    go_on: Mapping[str, object] | None = None
    counts: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, object] = field(default_factory=dict)
    seed_bits: int = 64


PLAIN = Dialect()
DIALECTS = {
    "vllm": Dialect({"continue_final_message": True, "add_generation_prompt": False}, counts=True),
    "sglang": Dialect({"continue_final_message": True}, counts=True),
    "llamacpp": Dialect(
        {}, names={"repetition_penalty": "repeat_penalty"}, neutral={"top_k": 0, "min_p": 0.0}, seed_bits=31
    ),
    "openai": Dialect(names={"max_tokens": "max_completion_tokens"}),
}
"""By ``owned_by`` of the server's list of models."""


def dialect_of(owner: str) -> Dialect:
    """The dialect of the server that lists its models as owned by ``owner``."""
    return DIALECTS.get("openai" if owner in ("system", "openai-internal") else owner.lower(), PLAIN)


def request_body(
    job: Job, model: str, dialect: Dialect, blobs: Blobs, prefix: str = "", done: int = 0
) -> dict[str, Any]:
    """The body. ``prefix`` is the beginning of an answer that is to be continued, of ``done`` tokens."""
    sampling = job.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": [message_object(message, blobs) for message in job.messages],
        "stream": True,
        "stream_options": {"include_usage": True, **({"continuous_usage_stats": True} if dialect.counts else {})},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": _seed(sampling.seed, dialect.seed_bits),
        **dialect.neutral,
        **_set_fields(sampling, done),
        **_tool_fields(job),
        **_template_fields(job.template_kwargs),
    }
    if sampling.guide is not None:
        body |= guide_fields(sampling.guide)
    if prefix and dialect.go_on is not None:
        body["messages"].append({"role": "assistant", "content": prefix})
        body |= dialect.go_on
    return {dialect.names.get(name, name): value for name, value in body.items()}


def _seed(seed: int, bits: int) -> int:
    return seed if bits == 64 else seed & (2**bits - 1)


def _set_fields(sampling: Sampling, done: int) -> dict[str, Any]:
    """The fields that the job sets: what is left out has the server's default, which is the neutral one."""
    values = {
        name: getattr(sampling, name)
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "min_p", "min_tokens")
        if getattr(sampling, name) != Sampling.model_fields[name].default
    }
    if sampling.max_tokens is not None:
        values["max_tokens"] = sampling.max_tokens - done
    if sampling.min_tokens > done:
        values["min_tokens"] = sampling.min_tokens - done
    if sampling.n > 1:
        values["n"] = sampling.n
    if sampling.stop:
        values["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        values["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.ignore_eos:
        values["ignore_eos"] = True
    if sampling.logit_bias:
        values["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.logprobs is not None:
        values |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return values


def _tool_fields(job: Job) -> dict[str, Any]:
    if not job.tools:
        return {}
    fields: dict[str, Any] = {"tools": list(job.tools), "tool_choice": job.tool_choice}
    name = forced_function(job)
    if name is not None:
        fields["tool_choice"] = {"type": "function", "function": {"name": name}}
    if not job.parallel_tool_calls:
        fields["parallel_tool_calls"] = False
    return fields


def forced_function(job: Job) -> str | None:
    """The function that the answer has to call."""
    kind, _, name = job.tool_choice.partition(":")
    return name if kind == "function" else None


def _template_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    rest = dict(values)
    fields: dict[str, Any] = {}
    if "reasoning_effort" in rest:
        fields["reasoning_effort"] = rest.pop("reasoning_effort")
    if rest:
        fields["chat_template_kwargs"] = rest
    return fields


def guide_fields(guide: Guide) -> dict[str, Any]:
    """OpenAI's ``response_format`` where it can say it, else vLLM's ``structured_outputs``."""
    if guide.kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if guide.kind == "json_schema":
        schema = {"name": "answer", "schema": orjson.loads(guide.value), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"structured_outputs": {guide.kind: orjson.loads(guide.value) if guide.kind == "choice" else guide.value}}


def message_object(message: Message, blobs: Blobs) -> dict[str, Any]:
    """OpenAI's object of a message."""
    found: dict[str, Any] = {"role": message.role}
    if isinstance(message.content, tuple):
        found["content"] = [
            {"type": "text", "text": part.text}
            if part.type == "text"
            else {"type": "image_url", "image_url": {"url": data_url(part.blob, blobs)}}
            for part in message.content
        ]
    else:
        found["content"] = message.content
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    if message.tool_calls:
        found["tool_calls"] = list(message.tool_calls)
    return found


def image(blob: str, blobs: Blobs) -> tuple[str, bytes]:
    """Media type and bytes of an image.

    Raises:
        InvalidRequestError: it is not there, or of no type that servers take.
    """
    data = blobs.get(blob)
    if data is None:
        raise InvalidRequestError("An image of the request is not there any more.", param="messages")
    kind = media_type(data)
    if kind is None:
        raise InvalidRequestError(f"An image is not {KINDS}.", param="messages")
    return kind, data


def data_url(blob: str, blobs: Blobs) -> str:
    """An image as a data URL."""
    kind, data = image(blob, blobs)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
