"""Forwards to Google's Gemini API through the official client.

The wire format: https://ai.google.dev/api/generate-content
"""

import contextlib
import time
from collections.abc import Iterable
from typing import Any

import httpx2
import orjson
from google import genai
from google.genai import errors, types

from fastchat_q.errors import ConfigurationError, InvalidRequestError
from fastchat_q.events import Alternative, FinishReason, Piece, TokenLogprob, ToolCallDelta, Usage
from fastchat_q.jobs import Feature, Job, Message, call_arguments
from fastchat_q.registry import ModelCard

from ..async_engine import Give
from ..base import Ended, Request
from .openai_request import Blobs, forced_function, image
from .refusals import refuse, thinking_of, unsupported
from .remote import (
    CONNECT_S,
    TIMEOUT,
    UNKNOWN_ID,
    BrokenOffError,
    RemoteEngine,
    Trouble,
    Upstream,
    connection_trouble,
    retry_after_s,
)

FEATURES: tuple[Feature, ...] = (
    *("n", "sampling", "penalties", "logprobs", "structured_outputs", "tools", "reasoning", "vision"),
)
LENGTH = frozenset({"MAX_TOKENS"})
STOP = frozenset({"STOP", "FINISH_REASON_UNSPECIFIED"})
WHOSE = "Gemini's API"
LACKS = frozenset(
    {
        *("min_p", "min_tokens", "stop_token_ids", "ignore_eos", "repetition_penalty", "logit_bias"),
        "parallel_tool_calls",
    }
)
BUDGETS = {"none": 0, "minimal": 512, "low": 1024, "medium": 8192, "high": 24576}
"""Tokens of thinking for OpenAI's words, as Gemini's own OpenAI-compatible endpoint takes them:
https://ai.google.dev/gemini-api/docs/openai#thinking"""


class GeminiEngine(RemoteEngine):
    """One streamed request a job."""

    errors = (errors.APIError, httpx2.HTTPError)

    def __init__(self, card: ModelCard, slots: int, upstream: Upstream) -> None:
        super().__init__(card, slots, upstream)
        self._http: httpx2.AsyncClient
        self._client: genai.Client

    async def opened(self) -> None:
        self._http = httpx2.AsyncClient(timeout=TIMEOUT)
        self._client = genai.Client(
            api_key=self.upstream.api_key,
            http_options=types.HttpOptions(base_url=self.upstream.base_url, httpx_async_client=self._http),
        )

    async def closing(self) -> None:
        await self._client.aio.aclose()
        await self._http.aclose()

    async def probe(self) -> None:
        await self._client.aio.models.get(model=self.upstream.model)

    def troubled(self, error: Exception) -> Trouble:
        return trouble_of(error)

    def repeats(self, job: Job) -> bool:
        return True  # it takes a seed

    async def answer(self, request: Request, give: Give, prefix: str, done: int) -> Ended:
        job = request.job
        reader = Reader(job.sampling.n, give)
        chunks: Any = await self._client.aio.models.generate_content_stream(
            model=self.upstream.model, contents=contents(job.messages, request.blobs), config=config(job)
        )
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                reader.take(chunk)
        return reader.ended()


class Reader:
    """Chunks of one answer, as pieces."""

    def __init__(self, choices: int, give: Give) -> None:
        self._choices = choices
        self._give = give
        self._calls: dict[int, int] = {}
        """Choice -> how many calls it has."""
        self._usage: types.GenerateContentResponseUsageMetadata | None = None
        self._reasons: dict[int, FinishReason] = {}

    def take(self, chunk: types.GenerateContentResponse) -> None:
        """Reads one chunk.

        Raises:
            InvalidRequestError: the prompt was blocked.
        """
        self._usage = chunk.usage_metadata or self._usage
        feedback = chunk.prompt_feedback
        if feedback is not None and feedback.block_reason is not None:
            raise InvalidRequestError(
                f"Gemini blocked the prompt ({feedback.block_reason.value}).", param="messages", code="content_filter"
            )
        for candidate in chunk.candidates or ():
            self._candidate(candidate)

    def _candidate(self, candidate: types.Candidate) -> None:
        choice = candidate.index or 0
        text = reasoning = ""
        calls: list[ToolCallDelta] = []
        for part in (candidate.content.parts if candidate.content else None) or ():
            if part.function_call is not None:
                calls.append(self._call(choice, part.function_call))
            elif part.thought:
                reasoning += part.text or ""
            else:
                text += part.text or ""
        finish = None
        if candidate.finish_reason is not None:
            self._reasons[choice] = _finish_reason(candidate.finish_reason.value, bool(self._calls.get(choice)))
            finish = self._reasons[choice] if self._choices > 1 else None
        logprobs = tuple(_logprobs(candidate.logprobs_result))
        if text or reasoning or calls or finish or logprobs:
            self._give(
                Piece(
                    text=text,
                    choice=choice,
                    reasoning=reasoning,
                    tool_calls=tuple(calls),
                    logprobs=logprobs,
                    finish=finish,
                    units=1,
                )
            )

    def _call(self, choice: int, call: types.FunctionCall) -> ToolCallDelta:
        """Calls come whole."""
        number = self._calls.get(choice, 0)
        self._calls[choice] = number + 1
        arguments = orjson.dumps(call.args or {}).decode()
        return ToolCallDelta(number, arguments, call.id or f"call_{choice}_{number}", call.name)

    def ended(self) -> Ended:
        """The end of the answer. Raises BrokenOffError if it did not come."""
        if len(self._reasons) < self._choices:
            raise BrokenOffError("The upstream server ended the answer without a finish reason.")
        usage = self._usage
        counts = Usage(0, 0)
        if usage is not None:
            thought = usage.thoughts_token_count or 0
            counts = Usage(usage.prompt_token_count or 0, (usage.candidates_token_count or 0) + thought)
        return Ended(counts, self._reasons[min(self._reasons)])


def _finish_reason(reason: str, called: bool) -> FinishReason:
    if reason in STOP:
        return "tool_calls" if called else "stop"
    return "length" if reason in LENGTH else "content_filter"


def _logprobs(result: types.LogprobsResult | None) -> Iterable[TokenLogprob]:
    if result is None:
        return
    tops = result.top_candidates or []
    for position, chosen in enumerate(result.chosen_candidates or ()):
        others = (tops[position].candidates if position < len(tops) else None) or ()
        top = tuple(Alternative(_id(other), other.token or "", other.log_probability or 0.0) for other in others)
        yield TokenLogprob(_id(chosen), chosen.token or "", chosen.log_probability or 0.0, top)


def _id(candidate: types.LogprobsResultCandidate) -> int:
    return UNKNOWN_ID if candidate.token_id is None else candidate.token_id


def config(job: Job) -> types.GenerateContentConfig:
    """The settings of a request.

    Raises:
        InvalidRequestError: the job asks for what the API does not have.
    """
    sampling = job.sampling
    refuse(job, LACKS, WHOSE)
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or None,
        "max_output_tokens": sampling.max_tokens,
        "candidate_count": sampling.n if sampling.n > 1 else None,
        "stop_sequences": list(sampling.stop) or None,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        "seed": sampling.seed & 0x7FFFFFFF,  # int32
        "response_logprobs": True if sampling.logprobs is not None else None,
        "logprobs": sampling.logprobs or None,
        "automatic_function_calling": types.AutomaticFunctionCallingConfig(disable=True),
    }
    if system := "\n\n".join(message.text for message in job.messages if message.role == "system"):
        fields["system_instruction"] = system
    fields |= _thinking(job) | _guide(job) | _tools(job)
    return types.GenerateContentConfig(**fields)


def _thinking(job: Job) -> dict[str, Any]:
    """``reasoning_effort`` and ``enable_thinking`` are what chat templates call them."""
    effort, thinking = thinking_of(job, WHOSE)
    if effort is not None and effort not in BUDGETS:
        known = ", ".join(BUDGETS)
        raise unsupported("reasoning_effort", f"{WHOSE} has no reasoning_effort {effort!r}, only {known}.")
    if effort is None and thinking is None:
        return {}
    budget = 0 if thinking is False else BUDGETS.get(effort or "")
    return {"thinking_config": types.ThinkingConfig(include_thoughts=budget != 0, thinking_budget=budget)}


def _guide(job: Job) -> dict[str, Any]:
    guide = job.sampling.guide
    if guide is None:
        return {}
    if guide.kind == "json_object":
        return {"response_mime_type": "application/json"}
    if guide.kind == "json_schema":
        return {"response_mime_type": "application/json", "response_json_schema": orjson.loads(guide.value)}
    raise InvalidRequestError(f"Gemini's API takes a JSON schema, not {guide.kind}.", param="response_format")


def _tools(job: Job) -> dict[str, Any]:
    if not job.tools:
        return {}
    declared = [
        types.FunctionDeclaration(
            name=tool["function"]["name"],
            description=tool["function"].get("description"),
            parameters_json_schema=tool["function"].get("parameters"),
        )
        for tool in job.tools
    ]
    name = forced_function(job)
    modes = {"required": types.FunctionCallingConfigMode.ANY, "none": types.FunctionCallingConfigMode.NONE}
    mode = modes["required"] if name else modes.get(job.tool_choice, types.FunctionCallingConfigMode.AUTO)
    calling = types.FunctionCallingConfig(mode=mode, allowed_function_names=[name] if name else None)
    return {
        "tools": [types.Tool(function_declarations=declared)],
        "tool_config": types.ToolConfig(function_calling_config=calling),
    }


def contents(messages: Iterable[Message], blobs: Blobs) -> list[types.Content]:
    """The conversation. The results of tools name the function, which OpenAI's messages tell by the call's id."""
    found: list[types.Content] = []
    names: dict[str, str] = {}
    for message in messages:
        if message.role == "system":
            continue
        parts = list(_parts(message, blobs))
        for call in message.tool_calls:
            names[call["id"]] = call["function"]["name"]
        if message.role == "tool":
            name = names.get(message.tool_call_id or "", message.name or "")
            parts = [types.Part.from_function_response(name=name, response=_response(message.text))]
        role = "model" if message.role == "assistant" else "user"
        if found and found[-1].role == role:
            found[-1].parts = [*(found[-1].parts or ()), *parts]
        else:
            found.append(types.Content(role=role, parts=parts))
    return found


def _parts(message: Message, blobs: Blobs) -> Iterable[types.Part]:
    if isinstance(message.content, tuple):
        for part in message.content:
            if part.type == "text":
                yield types.Part(text=part.text)
            else:
                media_type, data = image(part.blob, blobs)
                yield types.Part.from_bytes(data=data, mime_type=media_type)
    elif message.content:
        yield types.Part(text=message.content)
    for call in message.tool_calls:
        arguments = call_arguments(call["function"].get("arguments") or "")
        yield types.Part(function_call=types.FunctionCall(name=call["function"]["name"], args=arguments))


def _response(text: str) -> dict[str, Any]:
    """A function's result is an object there."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = text
    return value if isinstance(value, dict) else {"result": value}


def trouble_of(error: Exception) -> Trouble:
    """What an error of the client means."""
    if not isinstance(error, errors.APIError):
        return connection_trouble(error)
    headers = getattr(error.response, "headers", None) or {}
    message, status = str(error.message or ""), int(error.code or 500)
    if status == 400 and "API key" in message:
        status = 401
    return Trouble(status, message, code=error.status, retry_after_s=retry_after_s(headers))


def connect(name: str, slots: int, upstream: Upstream) -> GeminiEngine:
    """An engine that knows what the API says of the model, if that can be reached.

    Raises:
        ConfigurationError: there is no key, or the API refuses it.
    """
    if not upstream.api_key:
        raise ConfigurationError("The gemini engine needs a key: set GEMINI_API_KEY, or name it by --api-key-env.")
    context_length = None
    try:
        with httpx2.Client(timeout=CONNECT_S) as http:
            options = types.HttpOptions(base_url=upstream.base_url, httpx_client=http)
            model = genai.Client(api_key=upstream.api_key, http_options=options).models.get(model=upstream.model)
            context_length = model.input_token_limit
    except (errors.APIError, httpx2.HTTPError) as error:
        if trouble_of(error).status in (401, 403):
            raise ConfigurationError("Gemini's API refuses the key.") from error
    card = ModelCard(
        name, "gemini", context_length, int(time.time()), device="-", features=FEATURES, batching="upstream"
    )
    return GeminiEngine(card, slots, upstream)
