"""What a model's family writes beside content, in the tokens of its tokenizer: reasoning, tool calls."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

from fastchat_q.workers.families import Choice
from fastchat_q.workers.parsing import Answer, Format, Parser, format_of
from fastchat_q.workers.parsing.lark import Function
from fastchat_q.workers.parsing.thinking import Thinking
from transformers import PreTrainedTokenizerBase

from fastchat_q.choices import LoadOptions
from fastchat_q.errors import InvalidRequestError
from fastchat_q.jobs import CONTINUE, Job, Sampling

from .structured import Composed, behind

TAIL = 32
"""Tokens at the end of a prompt in which the template may have begun the reasoning."""
ID_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Speech:
    """Parsers and grammars for the answers of one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: Format) -> None:
        self._tokenizer = tokenizer
        self._format = written
        added = tokenizer.added_tokens_decoder
        self._tokens = {str(token): number for number, token in added.items()}
        special = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        marks = written.marks
        kept = {number for text, number in self._tokens.items() if any(text in mark for mark in marks)}
        self.silent = frozenset(special - kept)
        """Special tokens that are no marks: nobody is to see them."""
        self.sees_marks = bool(special & kept)
        """Whether marks are special tokens, which plain decoding leaves out."""

    def decode(self, ids: list[int]) -> str:
        """Text with the marks in it, and without the other special tokens."""
        text = self._tokenizer.decode([token for token in ids if token not in self.silent], skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def is_open(self, job: Job, prompt: list[int]) -> bool | None:
        """Whether the prompt has begun the reasoning; False: it has ended it; None: neither."""
        thinking = self._format.thinking
        if not isinstance(thinking, Thinking):
            return None
        if not job.template_kwargs.get(CONTINUE):
            return self._format.is_open(str(self._tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False)))
        said = job.messages[-1].text
        return max(map(said.rfind, thinking.start)) > max(map(said.rfind, thinking.end))

    def parser(self, job: Job, is_open: bool | None, choice: int) -> Parser | None:
        """What takes an answer apart; None: it is all content."""
        functions = self._functions(job)
        thinking = self._format.thinking
        if not functions and (thinking is None or (is_open is False and not getattr(thinking, "drop", ()))):
            return None
        single = not job.parallel_tool_calls or job.tool_choice.startswith("function:")
        forced = bool(functions) and _forced(job)
        return Answer(self._format, functions, is_open, self._ids(job.id, choice), single, forced)

    def sampling(self, job: Job, is_open: bool | None) -> Sampling:
        """The job's, with the grammar of a call that must come, and with what else may come where it is constrained.

        Raises:
            InvalidRequestError: an answer that is constrained could not be told from a call.
        """
        sampling, functions = job.sampling, self._functions(job)
        named = job.tool_choice.removeprefix("function:") if job.tool_choice.startswith("function:") else None
        if functions and _forced(job):
            allowed = [function for function in functions if named in (None, function.name)]
            many = job.parallel_tool_calls and named is None
            grammar = self._format.grammar(allowed, many, is_open, self._tokens)
            guide = Composed(kind="grammar", value=grammar, param="tools", what="schema of the tools")
        elif sampling.guide is not None and (before := self._before(job, functions, is_open)):
            guide = behind(before, sampling.guide)
        else:
            return sampling
        return sampling.model_copy(update={"guide": guide})

    def _before(self, job: Job, functions: list[Function], is_open: bool | None) -> str:
        calls = self._format.calls
        if functions and calls is not None and calls.bare:
            raise InvalidRequestError(
                "This model's calls begin as an answer may, so it cannot have 'tools' and a format for the answer at "
                "once. Leave one out, or say by 'tool_choice' whether a call must come: 'required' or 'none'.",
                param=behind("", job.sampling.guide).param if job.sampling.guide is not None else "tools",
                code="unsupported_parameter",
            )
        return self._format.before(is_open, self._tokens, functions, job.parallel_tool_calls)

    def _functions(self, job: Job) -> list[Function]:
        if self._format.calls is None or job.tool_choice == "none":
            return []
        return [Function.of(tool) for tool in job.tools]

    def _ids(self, job_id: str, choice: int) -> Callable[[int, str], str]:
        short = self._format.calls is not None and self._format.calls.short_ids

        def call_id(call: int, name: str) -> str:
            digest = hashlib.blake2b(f"{job_id}/{choice}/{call}".encode(), digest_size=12)
            if not short:
                return f"call_{digest.hexdigest()}"
            return "".join(ID_LETTERS[byte % len(ID_LETTERS)] for byte in digest.digest()[:9])

        return call_id


def _forced(job: Job) -> bool:
    """Whether a call must come."""
    return job.tool_choice == "required" or job.tool_choice.startswith("function:")


def written_by(options: LoadOptions, chat: Choice | None) -> Format:
    """How a model writes calls and reasoning: what was asked for, else what its family does.

    Raises:
        ConfigurationError: there is no such parser.
    """
    family = chat.family if chat is not None else None
    calls = options.tool_call_parser or (family.tool_parser if family is not None else None)
    reasoning = options.reasoning_parser or (family.reasoning_parser if family is not None else None)
    found = format_of(calls, reasoning)
    return format_for(found, chat.template) if chat is not None else found


def format_for(written: Format, template: object) -> Format:
    """The format without calls, where the chat template shows the model no tools."""
    texts = template.values() if isinstance(template, dict) else [template]
    return written if any("tools" in str(text) for text in texts) else replace(written, calls=None)
