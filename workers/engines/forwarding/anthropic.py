"""Forwards to Anthropic's Messages API through the official client.

The wire format: https://platform.claude.com/docs/en/api/messages and …/build-with-claude/streaming
"""

import base64
import time
from collections.abc import Iterable
from typing import Any

import anthropic
import httpx2
import orjson
from anthropic.types import RawContentBlockDeltaEvent, RawContentBlockStartEvent, RawMessageStreamEvent

from fastchat_q.errors import ConfigurationError, InvalidRequestError
from fastchat_q.events import FinishReason, Piece, ToolCallDelta, Usage
from fastchat_q.jobs import CONTINUE, Feature, Job, Message, Sampling, call_arguments
from fastchat_q.registry import ModelCard

from ..async_engine import Give
from ..base import Ended, Request
from .openai_request import Blobs, forced_function, image
from .refusals import refuse, thinking_of
from .remote import (
    CONNECT_S,
    TIMEOUT,
    BrokenOffError,
    RemoteEngine,
    Trouble,
    Upstream,
    connection_trouble,
    status_trouble,
)

FEATURES: tuple[Feature, ...] = ("sampling", "structured_outputs", "tools", "reasoning", "vision")
WHOSE = "Anthropic's API"
MAX_TOKENS = 8192
"""The API wants a number; this is what a job gets that names none and whose model does not tell its own."""
SAMPLING_VERSION = "2023-06-01"
"""The last version of the API that has temperature, top_p and top_k."""

REASONS: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
TYPES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""https://platform.claude.com/docs/en/api/errors: an error inside of a stream comes under status 200."""


class AnthropicEngine(RemoteEngine):
    """One streamed message a job."""

    errors = (anthropic.APIError, httpx2.HTTPError)

    def __init__(self, card: ModelCard, slots: int, upstream: Upstream, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__(card, slots, upstream)
        self._max_tokens = max_tokens
        self._client: anthropic.AsyncAnthropic

    async def opened(self) -> None:
        self._client = anthropic.AsyncAnthropic(
            api_key=self.upstream.api_key, base_url=self.upstream.base_url, max_retries=0, timeout=TIMEOUT
        )

    async def closing(self) -> None:
        await self._client.close()

    async def probe(self) -> None:
        await self._client.models.list(limit=1, timeout=CONNECT_S)

    def troubled(self, error: Exception) -> Trouble:
        return trouble_of(error)

    def continues(self, job: Job) -> bool:
        """Older models do; the others refuse. What it has is not counted in tokens, so a limit could not be kept."""
        return job.sampling.max_tokens is None and "thinking" not in _output_fields(job)

    async def answer(self, request: Request, give: Give, prefix: str, done: int) -> Ended:
        body = request_body(request.job, self.upstream.model, self._max_tokens, request.blobs)
        if prefix:
            body["messages"].append({"role": "assistant", "content": prefix})
        reader = Reader(give)
        async with await self._client.messages.create(**body, stream=True) as events:
            async for event in events:
                reader.take(event)
        return reader.ended(done)


class Reader:
    """Events of one message, as pieces."""

    def __init__(self, give: Give) -> None:
        self._give = give
        self._calls: dict[int, int] = {}
        """Content block -> which of the calls it is."""
        self._prompt_tokens = self._completion_tokens = 0
        self._reason: FinishReason | None = None
        self._stop: str | None = None

    def take(self, event: RawMessageStreamEvent) -> None:
        """Reads one event. Kinds that it does not know say nothing that we could pass on."""
        if event.type == "message_start":
            self._count(event.message.usage)
        elif event.type == "content_block_start":
            self._start(event)
        elif event.type == "content_block_delta":
            self._delta(event)
        elif event.type == "message_delta":
            self._count(event.usage)
            if event.delta.stop_reason is not None:
                self._reason = REASONS.get(event.delta.stop_reason, "stop")
                self._stop = event.delta.stop_sequence

    def _start(self, event: RawContentBlockStartEvent) -> None:
        block = event.content_block
        if block.type == "tool_use":
            call = self._calls[event.index] = len(self._calls)
            self._give(Piece(tool_calls=(ToolCallDelta(call, "", block.id, block.name),), units=1))
        elif block.type == "text" and block.text:
            self._give(Piece(text=block.text, units=1))

    def _delta(self, event: RawContentBlockDeltaEvent) -> None:
        delta = event.delta
        if delta.type == "text_delta" and delta.text:
            self._give(Piece(text=delta.text, units=1))
        elif delta.type == "thinking_delta" and delta.thinking:
            self._give(Piece(reasoning=delta.thinking, units=1))
        elif delta.type == "input_json_delta" and delta.partial_json and event.index in self._calls:
            call = ToolCallDelta(self._calls[event.index], delta.partial_json)
            self._give(Piece(tool_calls=(call,), units=1))

    def _count(self, usage: Any) -> None:
        """Counts are cumulative; the cached parts of the prompt are counted apart from the rest."""
        if usage.input_tokens is not None:
            cached = (usage.cache_creation_input_tokens or 0) + (usage.cache_read_input_tokens or 0)
            self._prompt_tokens = usage.input_tokens + cached
        self._completion_tokens = usage.output_tokens

    def ended(self, done: int) -> Ended:
        """The end of the message; ``done`` tokens of it were there before. Raises BrokenOffError if it did not come."""
        if self._reason is None:
            raise BrokenOffError("The upstream server ended the answer without a stop reason.")
        usage = Usage(max(self._prompt_tokens - done, 0), self._completion_tokens + done)
        return Ended(usage, self._reason, stop=self._stop)


def request_body(job: Job, model: str, max_tokens: int, blobs: Blobs) -> dict[str, Any]:
    """What the client is called with for ``POST /v1/messages``.

    Raises:
        InvalidRequestError: the job asks for what the API does not have.
    """
    sampling = job.sampling
    refuse(job, {"min_p", "min_tokens", "stop_token_ids", "ignore_eos", "seed"}, WHOSE)
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": sampling.max_tokens or max_tokens,
        "messages": list(_turns(job.messages, blobs)),
    }
    if system := "\n\n".join(message.text for message in job.messages if message.role == "system"):
        body["system"] = system
    if sampling.stop:
        body["stop_sequences"] = list(sampling.stop)
    return body | _tool_fields(job) | _output_fields(job) | _sampling_fields(sampling)


def _sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """The parameters that the API dropped with version 2026-10-21. Under the one before, older models honour them, and
    the others refuse them by name: so does the API then, and nothing is ignored in silence.
    """
    asked = {
        name: getattr(sampling, name)
        for name in ("temperature", "top_p", "top_k")
        if getattr(sampling, name) != Sampling.model_fields[name].default
    }
    if not asked:
        return {}
    if sampling.temperature > 1.0:
        raise InvalidRequestError("Anthropic's API takes temperatures up to 1.", param="temperature")
    return {"extra_body": asked, "extra_headers": {"anthropic-version": SAMPLING_VERSION}}


def _tool_fields(job: Job) -> dict[str, Any]:
    if not job.tools:
        return {}
    name = forced_function(job)
    kinds = {"required": "any", "none": "none"}
    choice: dict[str, Any] = {"type": "tool", "name": name} if name else {"type": kinds.get(job.tool_choice, "auto")}
    if not job.parallel_tool_calls and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    return {"tools": [_tool(tool["function"]) for tool in job.tools], "tool_choice": choice}


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    tool = {"name": function["name"], "input_schema": function.get("parameters") or {"type": "object"}}
    if function.get("description"):
        tool["description"] = function["description"]
    if function.get("strict"):
        tool["strict"] = True
    return tool


def _output_fields(job: Job) -> dict[str, Any]:
    """Effort, thinking and a schema. ``reasoning_effort`` and ``enable_thinking`` are what chat templates call them."""
    fields: dict[str, Any] = {}
    output: dict[str, Any] = {}
    kwargs = {name: value for name, value in job.template_kwargs.items() if name != CONTINUE}  # it does so by itself
    effort, thinking = thinking_of(job.model_copy(update={"template_kwargs": kwargs}), WHOSE)
    if effort not in (None, "none"):
        output["effort"] = "low" if effort == "minimal" else effort
    if thinking is False or effort == "none":
        fields["thinking"] = {"type": "disabled"}
    elif thinking or effort is not None:
        fields["thinking"] = {"type": "adaptive", "display": "summarized"}
    guide = job.sampling.guide
    if guide is not None:
        if guide.kind != "json_schema":
            raise InvalidRequestError(
                f"Anthropic's API takes a JSON schema, not {guide.kind}.", param="response_format"
            )
        output["format"] = {"type": "json_schema", "schema": orjson.loads(guide.value)}
    return {**fields, **({"output_config": output} if output else {})}


def _turns(messages: Iterable[Message], blobs: Blobs) -> Iterable[dict[str, Any]]:
    """The conversation. The results of tools are parts of a turn of the user, all those of a turn together."""
    results: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "tool":
            content = message.text if not message.images else _blocks(message, blobs)
            results.append({"type": "tool_result", "tool_use_id": message.tool_call_id, "content": content})
        elif message.role == "user":
            yield {"role": "user", "content": [*results, *_blocks(message, blobs)]}
            results = []
        elif message.role == "assistant":
            if results:
                yield {"role": "user", "content": results}
                results = []
            yield {"role": "assistant", "content": [*_blocks(message, blobs), *map(_tool_use, message.tool_calls)]}
    if results:
        yield {"role": "user", "content": results}


def _blocks(message: Message, blobs: Blobs) -> list[dict[str, Any]]:
    if not isinstance(message.content, tuple):
        return [{"type": "text", "text": message.content}] if message.content else []
    return [
        {"type": "text", "text": part.text} if part.type == "text" else _image_block(part.blob, blobs)
        for part in message.content
        if part.type == "image" or part.text
    ]


def _image_block(blob: str, blobs: Blobs) -> dict[str, Any]:
    media_type, data = image(blob, blobs)
    source = {"type": "base64", "media_type": media_type, "data": base64.b64encode(data).decode()}
    return {"type": "image", "source": source}


def _tool_use(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        "type": "tool_use",
        "id": call["id"],
        "name": function["name"],
        "input": call_arguments(function.get("arguments") or ""),
    }


def trouble_of(error: Exception) -> Trouble:
    """What an error of the client means."""
    if isinstance(error, anthropic.APIStatusError):
        trouble = status_trouble(error.status_code, error.body, error.message, error.response.headers)
        if error.status_code < 400:
            return Trouble(TYPES.get(trouble.type or "", 500), trouble.message, trouble.type)
        return trouble
    return connection_trouble(error)


def connect(name: str, slots: int, upstream: Upstream) -> AnthropicEngine:
    """An engine that knows what the API says of the model, if that can be reached.

    Raises:
        ConfigurationError: there is no key, or the API refuses it.
    """
    if not upstream.api_key:
        raise ConfigurationError(
            "The anthropic engine needs a key: set ANTHROPIC_API_KEY, or name it by --api-key-env."
        )
    context_length, max_tokens = None, MAX_TOKENS
    try:
        with anthropic.Anthropic(
            api_key=upstream.api_key, base_url=upstream.base_url, max_retries=0, timeout=CONNECT_S
        ) as client:
            model = client.models.retrieve(upstream.model)
            context_length, max_tokens = model.max_input_tokens, model.max_tokens or MAX_TOKENS
    except (anthropic.AuthenticationError, anthropic.PermissionDeniedError) as error:
        raise ConfigurationError(f"Anthropic's API refuses the key (HTTP {error.status_code}).") from error
    except (anthropic.APIError, httpx2.HTTPError):
        pass  # it may come later, or not know the call
    card = ModelCard(
        name, "anthropic", context_length, int(time.time()), device="-", features=FEATURES, batching="upstream"
    )
    return AnthropicEngine(card, slots, upstream, max_tokens)
