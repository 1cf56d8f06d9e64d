"""From a job's messages to prompt token ids: the chat template, tools, and what a client must not be able to forge."""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog
import torch
from fastchat_q.workers.adapters import Templates
from fastchat_q.workers.families import Choice, choose
from fastchat_q.workers.families.choice import NoTemplateError, declared_names
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastchat_q.abilities import NO_TEMPLATE
from fastchat_q.errors import ContextLengthError, InvalidRequestError
from fastchat_q.jobs import CONTINUE, Job, Message, Sampling, call_arguments

from .vision import Sight, images

log = structlog.get_logger()

PROBE = "fastchat-q"
RESERVED = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *inspect.signature(ProcessorMixin.apply_chat_template).parameters,
    *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
    "messages",
} - {CONTINUE}
"""What ``template_kwargs`` may not hold: it is ours to say, or would replace the template itself."""


def give_template(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    path: str,
    config: Mapping[str, Any],
    wanted: str | None,
    revision: str | None = None,
) -> Choice | None:
    """Chooses the chat template of a model and sets it as its tokenizer's. None: it has none, and takes no messages.

    Args:
        path: the folder or hub id that it was loaded from: its card is there, and is read only if it can decide.
        config: config.json as it is in the file.
        wanted: ``--chat-template``.
        revision: of the hub id.

    Raises:
        ConfigurationError: there is none of the name that was asked for.
    """
    own = tokenizer.chat_template
    card = _model_card(path, revision) if own is None and wanted is None else {}
    try:
        choice = choose(wanted, own, config.get("model_type"), declared_names(source, config, card), source)
    except NoTemplateError as error:
        log.warning("it completes prompts and takes no chats", why=str(error))
        return None
    tokenizer.chat_template = choice.template
    log.info("chat template", model=source, family=choice.family.name, template=choice.why)
    return choice


def stop_ids(tokenizer: PreTrainedTokenizerBase, choice: Choice) -> frozenset[int]:
    """The tokens by which a family ends its turn, for a template that is not the model's own.

    Those given by number count only if the model itself names the family: they are of its vocabulary.
    """
    if choice.origin == "model":
        return frozenset()
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in choice.family.stop_tokens if token in vocabulary}
    return frozenset(ids.union(choice.family.stop_token_ids if choice.declared else ()))


class Renderer:
    """Renders jobs for one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        choice: Choice | None = None,
        adapter: object | None = None,
        sight: Sight | None = None,
        sees: bool = False,
    ) -> None:
        """
        Args:
            vocabulary: the model's number of tokens.
            choice: what `give_template` set; None: the tokenizer's own template.
            sight: for messages with images.
            sees: the images of `prompt` are prepared elsewhere.
        """
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._adapter = adapter if isinstance(adapter, Templates) else None
        bundled = self._adapter is not None or (choice is not None and choice.origin == "row")
        self._sight = sight
        self._in_parts = (sees or sight is not None) and self._reads_parts_only()
        self._around = _special_ids(tokenizer)
        self._start = self._around[0] if bundled else []
        self.stop: tuple[str, ...] = choice.family.stop if choice is not None and choice.origin != "model" else ()
        """Texts that end an answer, beside the job's own."""

    def prompt(self, job: Job) -> list[int]:
        """Messages -> prompt token ids.

        Control tokens that a user typed are encoded as ordinary text (``sanitize_control_tokens``).

        Raises:
            InvalidRequestError: the template refuses the messages or tools, or makes nothing of them.
        """
        return self._checked(job, lambda tools, options: self._ids(self._messages(job), tools, options))

    def plain(self, job: Job, given: str | tuple[int, ...]) -> list[int]:
        """A prompt without a chat template -> its token ids. What is written as a control token in it is one.

        Raises:
            InvalidRequestError: it is empty, or has tokens that the model does not know.
        """
        call: Any = self._tokenizer
        ids: list[int] = [] if isinstance(given, str) else list(given)
        if isinstance(given, str):
            ids = call(given, add_special_tokens=job.special_tokens is not False)["input_ids"]
        if not ids and job.kind == "completion":
            raise InvalidRequestError(
                f"The prompt is empty, and {job.model!r} has no token to begin a text with.", param="prompt"
            )
        if ids and max(ids) >= self._vocabulary:
            raise InvalidRequestError(
                f"Token {max(ids)} is beyond the vocabulary of {job.model!r}, which has {self._vocabulary} tokens.",
                param="prompt" if job.kind == "completion" else "tokens",
            )
        return ids

    def seen(self, job: Job, blobs: Mapping[str, bytes]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """As `prompt`, for messages with images, and what the forward pass takes beside the ids.

        Args:
            blobs: the images of the job, by name.

        Raises:
            InvalidRequestError: an image cannot be decoded either, or the model takes none.
        """
        sight, inputs = self._sight, {}
        if sight is None:
            raise InvalidRequestError(f"The model {job.model!r} takes no images.", param="messages")
        pictures = images(job, blobs)

        def render(tools: list[dict[str, Any]] | None, options: dict[str, Any]) -> list[int]:
            ids, made = sight.prompt(self._messages(job, pictures), tools, options)
            inputs.update(made)
            return ids

        return self._checked(job, render), inputs

    def _messages(self, job: Job, pictures: Mapping[str, Any] = MappingProxyType({})) -> list[dict[str, Any]]:
        found = [_message(message, pictures) for message in job.messages]
        for message in found if self._in_parts else ():
            if isinstance(message.get("content"), str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        return found

    def _reads_parts_only(self) -> bool:
        """Whether the template says nothing of a content that is no list, as those of some models with eyes do."""
        try:
            text = self._tokenizer.apply_chat_template([{"role": "user", "content": PROBE}], tokenize=False)
        except Exception:  # templates raise what they like
            return True
        return PROBE not in str(text)

    def _checked(
        self, job: Job, render: Callable[[list[dict[str, Any]] | None, dict[str, Any]], list[int]]
    ) -> list[int]:
        if self._tokenizer.chat_template is None and self._adapter is None:
            raise InvalidRequestError(NO_TEMPLATE.format(name=job.model), param="messages", code="no_chat_template")
        tools = list(job.tools) if job.tools and job.tool_choice != "none" else None
        options = self._options(job)
        try:
            ids = render(tools, options)
        except InvalidRequestError:
            raise
        except Exception as error:  # templates raise what they like, e.g. on roles that do not alternate
            raise InvalidRequestError(
                f"The chat template of {job.model!r} refuses these messages: {error}", param="messages"
            ) from error
        if ids[: len(self._start)] != self._start:
            ids = self._start + ids
        if job.kind == "tokenize" and job.special_tokens:
            ids = [*self._around[0], *ids, *self._around[1]]
        if not ids:
            raise InvalidRequestError(
                f"The chat template of {job.model!r} makes an empty prompt of them.", param="messages"
            )
        if max(ids) >= self._vocabulary:
            raise InvalidRequestError(
                f"The tokenizer of {job.model!r} gives token {max(ids)}, beyond its vocabulary of {self._vocabulary}.",
                param="messages",
            )
        return ids

    def _ids(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> list[int]:
        if self._adapter is not None:
            return self._adapted(self._adapter, messages, tools, options)
        try:
            return self._apply(messages, tools, options)
        except TypeError:  # some templates join the arguments of calls as text (DeepSeek's), most write them as JSON
            if not any("tool_calls" in message for message in messages):
                raise
            return self._apply([_with_text_arguments(message) for message in messages], tools, options)

    def _adapted(
        self,
        adapter: Templates,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        options: dict[str, Any],
    ) -> list[int]:
        # private, and what apply_chat_template itself calls; not there before transformers 5.20
        mark: Any = getattr(self._tokenizer, "_mark_chat_inputs", None)
        if mark is not None:
            [messages], tools, _, options = mark("", [messages], tools, None, options, True, False)
        text = adapter.template(messages, tools=tools, **options)
        call: Any = self._tokenizer
        sanitized = {} if mark is None else {"sanitize_control_tokens": True}
        ids: list[int] = call(text, add_special_tokens=False, **sanitized)["input_ids"]
        return ids

    def _apply(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> list[int]:
        encoded = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,  # type: ignore[arg-type]
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
            **{"add_generation_prompt": not options.get(CONTINUE), **options},
        )
        ids: list[int] = encoded["input_ids"]  # type: ignore[index, call-overload, assignment]
        return ids

    def _options(self, job: Job) -> dict[str, Any]:
        options = job.template_arguments
        if wrong := sorted(RESERVED.intersection(options)):
            raise InvalidRequestError(
                f"chat_template_kwargs may not hold {wrong[0]!r}: it is the server's to say.",
                param="chat_template_kwargs",
            )
        if options.get(CONTINUE) and job.messages[-1].role != "assistant":
            raise InvalidRequestError(
                f"{CONTINUE} needs a last message of the assistant, not of the {job.messages[-1].role}.",
                param="messages",
            )
        return options if job.generation_prompt else {**options, "add_generation_prompt": False}


def token_limit(
    context: int | None, prompt_tokens: int, sampling: Sampling, room: int | None = None, param: str = "messages"
) -> int:
    """Tokens that a request may generate.

    Args:
        room: tokens that a request may have in memory, if that is limited.
        param: where the prompt came from.

    Raises:
        ContextLengthError: prompt and completion do not fit.
    """
    max_tokens = sampling.max_tokens
    bounds = [bound - prompt_tokens for bound in (context, room) if bound is not None]
    if max_tokens is not None and sampling.clip:
        max_tokens = max(1, min([max_tokens, *bounds]))
    asked = f" and {max_tokens} for the completion" if max_tokens else ""
    least = prompt_tokens + (1 if max_tokens is None else max_tokens)
    if context is not None and least > context:
        raise ContextLengthError(
            f"This model's maximum context length is {context} tokens, but the request asks for {prompt_tokens} "
            f"in the {param}{asked}. Shorten the {param} or lower max_tokens.",
            param=param,
        )
    if room is not None and least > room:
        raise ContextLengthError(
            f"This worker's KV memory holds {room} tokens, but the request asks for {prompt_tokens} in the "
            f"{param}{asked}. Shorten the {param}, lower max_tokens, or give the worker more KV memory.",
            param=param,
        )
    return min(bounds, default=2**31) if max_tokens is None else max_tokens


def _message(message: Message, pictures: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """As chat templates take it: a text where there is no image, arguments of calls as objects.

    Args:
        pictures: the decoded images, by blob, if they are to be in it.
    """
    fields = message.model_dump(exclude_defaults=True, exclude={"content", "tool_calls"})
    if message.images:
        parts = message.content if isinstance(message.content, tuple) else ()
        fields["content"] = [
            {"type": "text", "text": part.text} if part.type == "text" else _picture(pictures.get(part.blob))
            for part in parts
        ]
    elif message.content is not None or not message.tool_calls:
        fields["content"] = message.text
    if message.tool_calls:
        fields["tool_calls"] = [_with_object_arguments(call) for call in message.tool_calls]
    return fields


def _picture(image: Any) -> dict[str, Any]:
    return {"type": "image"} if image is None else {"type": "image", "image": image}


def _with_object_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequestError("A tool call in a message has no function with a name.", param="messages")
    return {**call, "function": {**function, "arguments": call_arguments(arguments or "")}}


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts around any text: mostly a start token before it, which bundled templates leave to it."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    for at in range(len(whole)):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], []


def _model_card(path: str, revision: str | None) -> dict[str, Any]:
    """The head of the model's README.md; empty if there is none or it cannot be had."""
    from huggingface_hub import hf_hub_download, metadata_load

    try:
        local = Path(path)
        file = local / "README.md" if local.is_dir() else Path(hf_hub_download(path, "README.md", revision=revision))
        head = metadata_load(file) if file.is_file() else None
    except Exception as error:  # offline, gated, no such file, no YAML: the card is a help, not a need
        log.info("no model card", model=path, why=str(error).partition("\n")[0])
        return {}
    return head or {}
