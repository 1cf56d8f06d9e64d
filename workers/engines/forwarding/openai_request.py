"""A job as the body of a request, in the dialect of the server that gets it."""

import base64
import contextlib
import json
from collections.abc import Mapping
from typing import Any

import orjson

from fastchat_q.errors import InvalidRequestError
from fastchat_q.images import KINDS, media_type
from fastchat_q.jobs import CONTINUE, Guide, Job, Message, Sampling, call_arguments

from .dialects import Dialect
from .refusals import refuse, unsupported

Blobs = Mapping[str, bytes]
"""Images by the name that the job has for them."""


def request_body(
    job: Job, model: str, dialect: Dialect, blobs: Blobs, prefix: str = "", done: int = 0
) -> dict[str, Any]:
    """The body. ``prefix`` is the beginning of an answer that is to be continued, of ``done`` tokens.

    Raises:
        InvalidRequestError: the job asks for what such a server would ignore.
    """
    body: dict[str, Any] = {
        **_common_fields(job, model, dialect, done),
        "messages": [message_object(message, blobs) for message in job.messages],
        **_tool_fields(job, dialect),
        **_template_fields(job, dialect),
        **_go_on_fields(job, dialect),
    }
    if job.sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": job.sampling.logprobs}
    if prefix and dialect.go_on is not None:
        body["messages"].append({"role": "assistant", "content": prefix})
        body |= dialect.go_on
    return {dialect.names.get(name, name): value for name, value in body.items()}


def completion_body(job: Job, model: str, dialect: Dialect) -> dict[str, Any]:
    """The body of ``POST /v1/completions``.

    Raises:
        InvalidRequestError: the job asks for what such a server would ignore.
    """
    body = _common_fields(job, model, dialect, 0)
    prompts = list(job.inputs)
    body["prompt"] = prompts[0] if len(prompts) == 1 else prompts
    if job.echo:
        body["echo"] = True
    if job.special_tokens is False:
        body["add_special_tokens"] = False
    if job.sampling.logprobs is not None:
        body["logprobs"] = job.sampling.logprobs
    return body  # without the dialect's names: this endpoint has its first ones still, such as max_tokens


def tokens_body(job: Job, model: str, blobs: Blobs) -> dict[str, Any]:
    """The body of ``POST /tokenize`` or ``POST /detokenize``, which are vLLM's."""
    if job.kind == "detokenize":
        return {"model": model, "tokens": list(job.inputs[0])}
    body: dict[str, Any] = {"model": model}
    if job.tells == "strings":
        body["return_token_strs"] = True
    if job.special_tokens is not None:
        body["add_special_tokens"] = job.special_tokens
    if job.inputs:
        return {**body, "prompt": job.inputs[0]}
    template = dict(job.template_arguments)
    if template.pop("continue_final_message", False):
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    elif not job.generation_prompt:
        body["add_generation_prompt"] = False
    if job.tools and job.tool_choice != "none":
        body["tools"] = list(job.tools)
    if template:
        body["chat_template_kwargs"] = template
    return {**body, "messages": [message_object(message, blobs) for message in job.messages]}


def _common_fields(job: Job, model: str, dialect: Dialect, done: int) -> dict[str, Any]:
    """What chats and completions are told alike."""
    refuse(job, dialect.ignores, dialect.whose)
    sampling = job.sampling
    return {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True, **({"continuous_usage_stats": True} if dialect.counts else {})},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": _seed(sampling.seed, dialect.seed_bits),
        **dialect.neutral,
        **_set_fields(sampling, done),
        **({} if sampling.guide is None else _guide_fields(sampling.guide, dialect)),
    }


def _seed(seed: int, bits: int) -> int:
    return seed if bits == 64 else seed & (2**bits - 1)


def _set_fields(sampling: Sampling, done: int) -> dict[str, Any]:
    """The fields that the job sets. What is left out asks for nothing, here and, where it is not `neutral`, there."""
    values = {
        name: getattr(sampling, name)
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "min_p")
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
    return values


def _tool_fields(job: Job, dialect: Dialect) -> dict[str, Any]:
    if not job.tools:
        return {}
    name = forced_function(job)
    if "tool_choice" in dialect.ignores:
        return {} if job.tool_choice == "none" else {"tools": list(job.tools)}
    fields: dict[str, Any] = {"tools": list(job.tools), "tool_choice": job.tool_choice}
    if name is not None and dialect.names_tools:
        fields["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif name is not None:
        fields["tools"] = [tool for tool in job.tools if tool["function"]["name"] == name]
        fields["tool_choice"] = "required"
    if not job.parallel_tool_calls:
        fields["parallel_tool_calls"] = False
    return fields


def forced_function(job: Job) -> str | None:
    """The function that the answer has to call."""
    kind, _, name = job.tool_choice.partition(":")
    return name if kind == "function" else None


def _template_fields(job: Job, dialect: Dialect) -> dict[str, Any]:
    """Effort and arguments of the chat template: what the client sent, in the fields that the server has for it."""
    rest = dict(job.template_arguments if dialect.effort_in_template else job.template_kwargs)
    rest.pop(CONTINUE, None)
    fields: dict[str, Any] = {}
    if "reasoning_effort" in rest and not dialect.effort_in_template:
        fields["reasoning_effort"] = rest.pop("reasoning_effort")
    if rest:
        fields["chat_template_kwargs"] = rest
    return fields


def _go_on_fields(job: Job, dialect: Dialect) -> dict[str, Any]:
    """What has the server go on with the assistant's message that the conversation ends with."""
    if not job.template_kwargs.get(CONTINUE):
        return {}
    if dialect.go_on is None:
        raise unsupported("messages", f"{dialect.whose} does not go on with a message of the assistant.")
    return dict(dialect.go_on)


def _guide_fields(guide: Guide, dialect: Dialect) -> dict[str, Any]:
    """OpenAI's ``response_format`` where it can say it, else what the server has."""
    if guide.kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if guide.kind == "json_schema":
        schema = {"name": "answer", "schema": orjson.loads(guide.value), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return dialect.guide(guide)


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
        found["tool_calls"] = [_whole(call) for call in message.tool_calls]
    return found


def _whole(call: dict[str, Any]) -> dict[str, Any]:
    """A call; of one that was cut off what is whole, as most servers refuse arguments that are no JSON object."""
    arguments = call["function"].get("arguments") or ""
    with contextlib.suppress(orjson.JSONDecodeError):
        if isinstance(orjson.loads(arguments), dict):
            return call
    return {**call, "function": {**call["function"], "arguments": json.dumps(call_arguments(arguments))}}


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
