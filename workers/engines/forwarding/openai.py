"""Forwards to any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, hosted ones, another fastchat-q."""

import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, get_args

import httpx2
import openai
import structlog
from openai.types import Completion, Model
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import Choice, ChoiceDeltaToolCall

from fastchat_q.errors import ConfigurationError, JobFailedError
from fastchat_q.events import SPELT, Alternative, FinishReason, Piece, TokenLogprob, ToolCallDelta, Usage, spelt
from fastchat_q.jobs import CONTINUE, Feature, Job
from fastchat_q.registry import ModelCard

from ..async_engine import Give
from ..base import Ended, Request
from ..processing.tokens import KINDS, counted
from .dialects import DIALECTS, PLAIN, Dialect, dialect_of
from .openai_request import completion_body, request_body, tokens_body
from .refusals import unsupported
from .remote import (
    CONNECT_S,
    TIMEOUT,
    UNKNOWN_ID,
    BrokenOffError,
    RemoteEngine,
    Trouble,
    Upstream,
    connection_trouble,
    status_trouble,
)

log = structlog.get_logger()

NO_KEY = "none"
"""What servers get that ask for no key: the client insists on sending one."""


class OpenAIEngine(RemoteEngine):
    """One streamed request a job, through the official client.

    Args:
        dialect: None: the server could not be asked. It is away then, until it can.
    """

    errors = (openai.APIError, httpx2.HTTPError)

    def __init__(self, card: ModelCard, slots: int, upstream: Upstream, dialect: Dialect | None) -> None:
        super().__init__(card, slots, upstream)
        self.dialect = dialect or PLAIN
        self._asked = dialect is not None
        self._client: openai.AsyncOpenAI

    async def opened(self) -> None:
        self._client = openai.AsyncOpenAI(
            base_url=self.upstream.base_url,
            api_key=self.upstream.api_key or NO_KEY,
            max_retries=0,  # that is the queue's
            timeout=TIMEOUT,
        )
        if not self._asked:
            self.is_away("it did not tell its models")

    async def closing(self) -> None:
        await self._client.close()

    async def probe(self) -> None:
        found = await self._client.models.list(timeout=CONNECT_S)
        models = getattr(found, "data", None)
        if isinstance(models, list):  # else an answer that is none: a proxy's page, perhaps; the server is there
            self.dialect = _dialect(models, self.upstream, self.dialect)

    def troubled(self, error: Exception) -> Trouble:
        return trouble_of(error)

    def continues(self, job: Job) -> bool:
        return self.dialect.go_on is not None and job.kind == "chat" and CONTINUE not in job.template_kwargs

    def repeats(self, job: Job) -> bool:
        return True  # a job has a seed, and most servers keep to it

    async def answer(self, request: Request, give: Give, prefix: str, done: int) -> Ended:
        job = request.job
        if job.kind in KINDS:
            return await self._tokens(request, give)
        if job.kind == "completion":
            return await self._complete(job, give)
        body = request_body(request.job, self.upstream.model, self.dialect, request.blobs, prefix, done)
        reader = Reader(request.job.sampling.n, give)
        async with self._stream(body) as chunks:
            async for chunk in chunks:
                reader.take(chunk)
        return reader.ended(done)

    async def _complete(self, job: Job, give: Give) -> Ended:
        reader = TextReader(len(job.inputs), job.sampling.n, job.echo, give)
        stream = await self._client.post(
            "/completions",
            body=completion_body(job, self.upstream.model, self.dialect),
            cast_to=Completion,
            stream=True,
            stream_cls=openai.AsyncStream[Completion],
        )
        async with stream:
            async for chunk in stream:
                reader.take(chunk)
        return reader.ended()

    async def _tokens(self, request: Request, give: Give) -> Ended:
        """Beside the base URL, and not under it: vLLM has these at its root."""
        refuse_tokens(self.dialect)
        job = request.job
        body = tokens_body(job, self.upstream.model, request.blobs)
        url = self._client.base_url.join(f"../{job.kind}")
        answer: Any = await self._client.post(str(url), body=body, cast_to=object)
        try:
            give(_token_piece(request, answer))
        except (KeyError, TypeError, ValueError) as error:
            raise JobFailedError(
                "The upstream server answered otherwise than vLLM would.", status=502, code="upstream_error"
            ) from error
        return Ended(finish_reason="stop")

    @contextlib.asynccontextmanager
    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[openai.AsyncStream[ChatCompletionChunk]]:
        """The chunks; the connection is closed when this is left, which tells the server to stop."""
        stream = await self._client.post(
            "/chat/completions",
            body=body,
            cast_to=ChatCompletionChunk,
            stream=True,
            stream_cls=openai.AsyncStream[ChatCompletionChunk],
        )
        async with stream:
            yield stream


class Reader:
    """Chunks of one answer, as pieces.

    Args:
        choices: how many the answer has.
    """

    def __init__(self, choices: int, give: Give) -> None:
        self._choices = choices
        self._give = give
        self._usage: Usage | None = None
        self._tokens = 0
        self._chunks = 0
        self._reasons: dict[int, FinishReason] = {}
        self._stop: str | None = None

    def take(self, chunk: ChatCompletionChunk) -> None:
        """Reads one chunk."""
        units = 1
        if chunk.usage is not None:
            self._usage = Usage(chunk.usage.prompt_tokens or 0, chunk.usage.completion_tokens or 0)
            if self._choices == 1:
                units = max(1, self._usage.completion_tokens - self._tokens)
        given = False
        for choice in chunk.choices or ():
            if choice.finish_reason is not None:
                self._reasons[choice.index] = finish_reason(choice.finish_reason)
                self._stop = _stop_string(choice)
            piece = self._piece(choice, units)
            if piece is not None:
                self._give(piece)
                given = True
        if given:
            self._tokens += units
            self._chunks += 1

    def _piece(self, choice: Choice, units: int) -> Piece | None:
        delta = choice.delta
        finish = self._reasons[choice.index] if choice.finish_reason is not None and self._choices > 1 else None
        piece = Piece(
            text=(delta.content or "") + (delta.refusal or ""),
            choice=choice.index,
            reasoning=_reasoning(delta),
            tool_calls=call_deltas(delta.tool_calls or ()),
            logprobs=tuple(_logprobs(choice)),
            finish=finish,
            units=units,
        )
        return piece if piece.said or piece.tool_calls or piece.logprobs or finish else None

    def ended(self, done: int) -> Ended:
        """The end of the answer; ``done`` tokens of it were there before.

        Raises:
            BrokenOffError: it did not come.
        """
        if not self._reasons:
            raise BrokenOffError("The upstream server ended the answer without a finish reason.")
        if len(self._reasons) < self._choices:
            raise JobFailedError(
                f"The upstream server gave {len(self._reasons)} of {self._choices} answers.",
                status=502,
                code="upstream_error",
            )
        usage = self._usage
        if usage is not None and done:
            usage = Usage(max(usage.prompt_tokens - done, 0), usage.completion_tokens + done)
        usage = usage or Usage(0, done + self._tokens)
        return Ended(usage, self._reasons[min(self._reasons)], stop=self._stop)


class TextReader:
    """Chunks of completions, as pieces.

    Args:
        n: choices of each prompt.
        echo: each begins with its prompt.
    """

    def __init__(self, prompts: int, n: int, echo: bool, give: Give) -> None:
        self._n = n
        self._choices = prompts * n
        self._to_echo = set(range(self._choices)) if echo else set()
        self._give = give
        self._usage: Usage | None = None
        self._usages: dict[int, Usage] = {}
        """Of single choices: llama.cpp never tells that of all."""
        self._chunks = 0
        self._reasons: dict[int, FinishReason] = {}

    def take(self, chunk: Completion | None) -> None:
        """Reads one chunk; None: what llama.cpp begins with when there are several prompts."""
        if chunk is None:
            return
        if chunk.usage is not None:
            found = Usage(chunk.usage.prompt_tokens or 0, chunk.usage.completion_tokens or 0)
            if chunk.choices:
                self._usages |= {choice.index: found for choice in chunk.choices}
            else:
                self._usage = found
        for choice in chunk.choices or ():
            finish = None if choice.finish_reason is None else finish_reason(choice.finish_reason)
            if finish is not None:
                self._reasons[choice.index] = finish
            logprobs = tuple(_old_logprobs(choice.logprobs))
            piece = Piece(
                text=choice.text or "",
                choice=choice.index,
                logprobs=logprobs,
                finish=finish if self._choices > 1 else None,
                units=1,
                echo=choice.index in self._to_echo,
            )
            if piece.text or logprobs or piece.finish:
                self._to_echo.discard(choice.index)
                self._give(piece)
                self._chunks += 1

    def ended(self) -> Ended:
        """The end of all of them.

        Raises:
            BrokenOffError: it did not come.
        """
        if len(self._reasons) < self._choices:
            raise BrokenOffError("The upstream server ended the answer without a finish reason.")
        return Ended(self._usage or self._sum() or Usage(0, self._chunks), self._reasons[0])

    def _sum(self) -> Usage | None:
        """The usage of all choices from that of each; a prompt counts once."""
        if not self._usages:
            return None
        prompts = {index // self._n: usage.prompt_tokens for index, usage in self._usages.items()}
        return Usage(sum(prompts.values()), sum(usage.completion_tokens for usage in self._usages.values()))


def _old_logprobs(found: Any) -> Iterable[TokenLogprob]:
    """Of OpenAI's object of old; llama.cpp gives the one of chats here too."""
    if found is None:
        return
    if content := getattr(found, "content", None):
        for one in content:
            top = [
                Alternative(other.get("id", UNKNOWN_ID), _text(other["token"], other.get("bytes")), other["logprob"])
                for other in one.get("top_logprobs", ())
            ]
            token = _text(one["token"], one.get("bytes"))
            yield TokenLogprob(one.get("id", UNKNOWN_ID), token, one["logprob"], tuple(top))
        return
    tokens, values = found.tokens or (), found.token_logprobs or ()
    tops = found.top_logprobs or [None] * len(tokens)
    for token, value, top in zip(tokens, values, tops, strict=False):
        others = [Alternative(UNKNOWN_ID, name, logprob) for name, logprob in (top or {}).items()]
        yield TokenLogprob(UNKNOWN_ID, token, value or 0.0, tuple(others))


def refuse_tokens(dialect: Dialect) -> None:
    """Raises InvalidRequestError for a server that has no /tokenize: its card may not have been known."""
    if "tokens" in dialect.ignores:
        raise unsupported("model", f"{dialect.whose} has no POST /tokenize.")


def _token_piece(request: Request, answer: Any) -> Piece:
    if request.job.kind == "detokenize":
        return Piece(text=str(answer["prompt"]), units=1)
    return counted(request, [int(token) for token in answer["tokens"]], answer["max_model_len"], answer["token_strs"])


def finish_reason(reason: str) -> FinishReason:
    """Ours for theirs; what a server made up means that it stopped."""
    if reason == "function_call":
        return "tool_calls"
    return reason if reason in get_args(FinishReason) else "stop"  # type: ignore[return-value]


def _stop_string(choice: Choice) -> str | None:
    """Which stop string ended it, where a server says so: ``stop_reason`` (vLLM) or ``matched_stop`` (SGLang).

    Of a token that ended it they tell the number.
    """
    found = getattr(choice, "stop_reason", None) or getattr(choice, "matched_stop", None)
    return found if isinstance(found, str) else None


def _reasoning(delta: object) -> str:
    """Where servers put it: ``reasoning_content`` (SGLang, llama.cpp, DeepSeek) or ``reasoning`` (vLLM, Ollama)."""
    return getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None) or ""


def call_deltas(calls: Iterable[ChoiceDeltaToolCall]) -> tuple[ToolCallDelta, ...]:
    """Parts of tool calls. Servers that send whole calls may leave out the index."""
    found: dict[int, ToolCallDelta] = {}
    for position, call in enumerate(calls):
        index = position if call.index is None else call.index
        arguments = (call.function.arguments if call.function else None) or ""
        if index in found:
            found[index] = found[index]._replace(arguments=found[index].arguments + arguments)
        else:
            name = call.function.name if call.function else None
            found[index] = ToolCallDelta(index, arguments, call.id or None, name or None)
    return tuple(found.values())


def _logprobs(choice: Choice) -> Iterable[TokenLogprob]:
    for one in (choice.logprobs.content if choice.logprobs else None) or ():
        top = tuple(
            Alternative(_id(other), _text(other.token, other.bytes), other.logprob) for other in one.top_logprobs or ()
        )
        yield TokenLogprob(_id(one), _text(one.token, one.bytes), one.logprob, top)


def _text(token: str, raw: list[int] | None) -> str:
    """Of a part of a character its bytes, where the server tells them."""
    told = spelt(bytes(raw)) if raw else token
    return told if told.startswith(SPELT) else token


def _id(token: object) -> int:
    """llama.cpp tells it."""
    found = getattr(token, "id", None)
    return found if isinstance(found, int) else UNKNOWN_ID


def trouble_of(error: Exception) -> Trouble:
    """What an error of the client means."""
    if isinstance(error, openai.APIStatusError):
        return status_trouble(error.status_code, error.body, error.message, error.response.headers)
    if isinstance(error, openai.APIConnectionError | httpx2.HTTPError):
        return connection_trouble(error)
    assert isinstance(error, openai.APIError)
    return stream_trouble(error.body, error.message)


TYPES = {
    "invalid_request_error": 400,
    "BadRequestError": 400,
    "rate_limit_error": 429,
    "overloaded_error": 529,
    "timeout_error": 504,
}


def stream_trouble(body: object, message: str) -> Trouble:
    """An error inside of a stream: it has no status of its own, but most servers put it into ``code`` or ``type``."""
    trouble = status_trouble(500, body, message, {})
    code = body.get("code") if isinstance(body, dict) else None
    status = code if isinstance(code, int) else TYPES.get(trouble.type or "", 500)
    return Trouble(status, trouble.message, trouble.type, trouble.code, trouble.param)


def connect(name: str, slots: int, upstream: Upstream) -> OpenAIEngine:
    """An engine that knows what the server says of the model. A server that is away may come later.

    Raises:
        ConfigurationError: the server refuses the key.
    """
    told = DIALECTS[upstream.dialect] if upstream.dialect is not None else None
    context_length, dialect = None, told
    try:
        with openai.OpenAI(
            base_url=upstream.base_url, api_key=upstream.api_key or NO_KEY, max_retries=0, timeout=CONNECT_S
        ) as client:
            models = client.models.list().data
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise ConfigurationError(
            f"The server at {client.base_url} refuses the key (HTTP {error.status_code}): see --api-key-env."
        ) from error
    except (AttributeError, TypeError, ValueError) as error:  # an answer, and no list: a proxy's page, perhaps
        log.warning("upstream tells nothing of its models", why=f"{type(error).__name__}: {error}")
        dialect = told or PLAIN
    except (openai.APIError, httpx2.HTTPError) as error:
        trouble = trouble_of(error)
        log.warning("upstream tells nothing of its models", why=trouble.message)
        if 0 < trouble.status < 500:  # it is there, and has no such list
            dialect = told or PLAIN
    else:
        dialect = _dialect(models, upstream, PLAIN)
        listed = [model for model in models if model.id == upstream.model]
        context_length = context_length_of(listed[0]) if listed else None
        if not listed:
            log.warning("upstream does not list the model", model=upstream.model)
    card = ModelCard(
        name,
        "openai",
        context_length,
        int(time.time()),
        device="-",
        features=get_args(Feature) if dialect is None else dialect.features,  # not known yet: the engine refuses
        batching="upstream",
    )
    return OpenAIEngine(card, slots, upstream, dialect)


def _dialect(models: list[Model], upstream: Upstream, default: Dialect) -> Dialect:
    if upstream.dialect is not None:
        return DIALECTS[upstream.dialect]
    owner = next((one.owned_by for one in models if one.id == upstream.model), None)
    owner = owner or next((one.owned_by for one in models), None)
    return dialect_of(owner) if owner else default


def context_length_of(model: Model) -> int | None:
    """Of prompt and completion together. vLLM and SGLang say it beside OpenAI's fields, llama.cpp in ``meta``."""
    extra: dict[str, Any] = model.model_extra or {}
    found = extra.get("max_model_len") or extra.get("context_length") or (extra.get("meta") or {}).get("n_ctx")
    return found if isinstance(found, int) else None
