"""Structured output: which tokens may come next in an answer that a JSON schema, a regex or a grammar describes.

llguidance does the work (why: docs/decisions/0011-structured-outputs.md). Grammars are compiled on a thread of their
own while their row waits; a mask is a row of bits that `mask` applies to the logits of all guided rows at once.
"""

import json
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, regex_to_lark
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastchat_q.errors import FastchatQError, InvalidRequestError, RetryableError
from fastchat_q.jobs import Guide

from ..tensors import to_device
from .closing import LONGEST, Budget, Closing, only
from .grammars import Checker, first_masked

CACHED_GRAMMARS = 128
CACHED_S = 5.0
"""Processor time that the grammars which are kept took to compile: they hold 50 to 180 MB for each second of it."""
HARMLESS_KINDS = ("json_object", "choice")
"""Nobody can write anything into these that takes long."""
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x09]{0,12}", "lenient": False}
"""Enough white space for a pretty answer, and an end to it: a weak model would go on with blanks for ever. A keyword
that cannot be held to is refused, never ignored."""
JSON_KINDS = ("json_object", "json_schema")
IN_A_GRAMMAR = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
DRAWING = re.compile(r"\d+ \|( |$)|[\^| ]*$|<state>")
"""Lines of an error that show the place in a grammar, which most senders have not written."""
OUR_WORDS = (
    (re.compile(r"failed to compile JSON schema: "), ""),
    (
        re.compile(r"oneOf constraints are not supported.*"),
        r"'oneOf' of schemas that may fit the same value is not supported; use 'anyOf'",
    ),
    (re.compile(r"Unimplemented keys: \[(.*)\]"), r"these keywords are not supported: \1"),
    (
        re.compile(r".*Too many items \(limit (\d+).*"),
        r"it can be read in too many ways: one step of it has more than \1",
    ),
    (
        re.compile(r"Unable to determine if regex is empty.*"),
        "'pattern' and 'format' cannot be held together with such lengths",
    ),
    (
        re.compile(r"regex parse error:?$"),
        "a 'pattern' cannot be read; look-around and references back are not supported",
    ),
    (re.compile(r"Enable '\w+' option.*"), ""),
)
"""What llguidance says, and what it means here: its options are none of ours."""
CONTROL_TOKENS = re.compile(r"""(//[^\n]*|"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/)|<[^\s<>"]+>""")
SOME_BYTE = '"."'
"""Control tokens of a grammar, outside of strings and expressions: what knows bytes only reads this instead."""
ANSWER = "@answer"
"""In a grammar of what comes first: the rest."""


class Composed(Guide):
    """A grammar that was made here, of what a job asks for."""

    before: str = ""
    """A Lark grammar of what comes first, with ``@answer`` in it for the rest."""
    param: str
    """The parameter of the request that it comes from."""
    what: str
    """What a message calls it."""


def behind(before: str, guide: Guide) -> Composed:
    """A guide for an answer that begins with something else."""
    return Composed(kind=guide.kind, value=guide.value, before=before, param=_param(guide), what=_name(guide))


class Compiled(NamedTuple):
    """A grammar that rows take copies of, and the processor time that it took."""

    matcher: LLMatcher
    took_s: float
    closing: Closing | None
    """Of JSON: how an answer is brought to its end within its limit."""
    least: list[int] | None
    """The shortest answer that is known."""


class Guides:
    """The compiled grammars of one model, each compiled once. All but the compiling runs on the engine's thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._compiled: OrderedDict[Guide, Future[Compiled]] = OrderedDict()
        self._checker = Checker()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="guides")

    def guided(self, guide: Guide, limit: int) -> "Guided":
        """A row's guide, which has to be `Guided.ready` before the first mask.

        Args:
            limit: tokens that the row may generate.

        Raises:
            InvalidRequestError: this model cannot follow any guide.
        """
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast) or not self._eos_ids:
            lack = "an end token" if not self._eos_ids else "a fast tokenizer"
            raise InvalidRequestError(f"This model has not {lack}, which structured outputs need.", param=_param(guide))
        compiled = self._compiled.get(guide)
        if compiled is None or (compiled.done() and isinstance(compiled.exception(), RetryableError)):
            compiled = self._compiled[guide] = self._compiler.submit(self._compile, guide)
        self._compiled.move_to_end(guide)
        while len(self._compiled) > CACHED_GRAMMARS or (len(self._compiled) > 1 and self._kept_s() > CACHED_S):
            self._compiled.popitem(last=False)
        return Guided(guide, compiled, self._eos_ids, limit)

    def _kept_s(self) -> float:
        done = [compiled for compiled in self._compiled.values() if compiled.done()]
        return sum(compiled.result().took_s for compiled in done if compiled.exception() is None)

    @cached_property
    def _vocabulary_tree(self) -> LLTokenizer:
        """Seconds of work for a large vocabulary."""
        return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=sorted(self._eos_ids))  # type: ignore[arg-type]

    @cached_property
    def _closing(self) -> Closing:
        return Closing(self._vocabulary_tree, self._vocabulary, self._eos_ids)

    def _compile(self, guide: Guide) -> Compiled:
        with _refusing(guide):
            return self._matcher(guide)

    def _matcher(self, guide: Guide) -> Compiled:
        grammar = LLMatcher.grammar_from_lark(check(guide, self._checker))
        tree, began = self._vocabulary_tree, time.thread_time()
        matcher = first_masked(tree, grammar)
        if matcher.is_error():
            raise _refusal(guide, matcher.get_error())
        took_s = time.thread_time() - began
        closing = (
            self._closing.of(_parsed(guide) if guide.kind == "json_schema" else {})
            if guide.kind in JSON_KINDS
            else None
        )
        return Compiled(matcher, took_s, closing, closing.way(matcher, LONGEST) if closing else None)


class Guided:
    """Where one row is in its grammar. It catches up with the row's tokens when a mask is due, prior ones included."""

    def __init__(self, guide: Guide, compiled: Future[Compiled], eos_ids: frozenset[int], limit: int) -> None:
        self._guide = guide
        self._compiled = compiled
        self._limit = limit
        self._matcher: LLMatcher | None = None
        self._budget: Budget | None = None
        self._consumed = 0
        self.eos_ids = eos_ids
        """What the end of a complete answer looks like; it ends the row even if it ignores the model's end."""
        self.failure: InvalidRequestError | None = None
        """Why it cannot go on: its row has left the grammar, or the grammar grew beyond llguidance's limits."""

    @property
    def ready(self) -> bool:
        """Whether its grammar is compiled.

        Raises:
            InvalidRequestError: the grammar is none, or one that llguidance cannot follow.
        """
        return self._compiled.done() and self._compiled.result() is not None

    def fill(self, bits: NDArray[np.uint8], ids: Sequence[int]) -> None:
        """Writes the mask for the token behind ids: whole words of 32 tokens, lowest bit first. See `failure`."""
        if self._matcher is None:
            compiled = self._compiled.result()
            self._matcher = compiled.matcher.deep_copy()
            if compiled.closing is not None:
                self._budget = Budget(compiled.closing, self._limit, len(self._guide.value), compiled.least)
        for number, token in enumerate(ids[self._consumed :], self._consumed + 1):
            self._matcher.consume_token(token)
            if self._budget is not None:
                self._budget.look(self._matcher, number)
        self._consumed = len(ids)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._budget is not None and self._budget.way and not self._matcher.is_error():
            only(bits, self._budget.way[len(ids) - self._budget.begun])
        if self._matcher.is_error():
            reason = _in_our_words(self._matcher.get_error())
            message = f"The {_name(self._guide)} cannot be followed any further: {reason}"
            self.failure = InvalidRequestError(message, param=_param(self._guide), code="guide_error")


def mask(logits: torch.Tensor, at: Sequence[int], bits: NDArray[np.uint8]) -> None:
    """Sets to -inf what the bits (guided rows, bytes) do not allow, in the rows ``at`` of logits, in place."""
    vocabulary = logits.shape[-1]
    if logits.device.type == "cpu":  # numpy's unpacking and masking are several times as fast as torch's
        forbidden = np.unpackbits(~bits, axis=-1, count=vocabulary, bitorder="little").view(np.bool_)
        array = logits.numpy()
        for row, ruled_out in zip(at, forbidden, strict=True):
            np.copyto(array[row], -np.inf, where=ruled_out)
        return
    rows, packed = to_device(torch.tensor(at), logits.device), to_device(torch.from_numpy(bits), logits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (packed[:, :, None] >> shifts & 1).bool().flatten(1)[:, :vocabulary]
    logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(~allowed, -torch.inf))


def check(guide: Guide, checker: Checker) -> str:
    """The same grammar as `lark`, once it is known that it compiles; for engines that follow it elsewhere.

    Raises:
        InvalidRequestError: it is none, or takes too long.
        RetryableError: this machine could not find out.
    """
    with _refusing(guide):
        grammar = lark(guide)
        if is_harmless(guide):
            return grammar
        bytes_only = CONTROL_TOKENS.sub(lambda found: found[1] or SOME_BYTE, grammar)
        error = checker.error(LLMatcher.grammar_from_lark(bytes_only))
    if error:
        raise _refusal(guide, error)
    return grammar


def lark(guide: Guide) -> str:
    """A guide as one Lark grammar, the form that every engine with llguidance in it takes.

    Raises:
        InvalidRequestError: it is none.
    """
    before = guide.before if isinstance(guide, Composed) else ""
    if not before:
        return guide.value if guide.kind == "grammar" else f"start: {_expression(guide)}\n"
    return before.replace(ANSWER, _expression(guide), 1)


def is_harmless(guide: Guide) -> bool:
    """Whether it compiles at once, whoever wrote it."""
    return type(guide) is Guide and guide.kind in HARMLESS_KINDS


def _expression(guide: Guide) -> str:
    match guide.kind:
        case "json_object":
            return _json({"type": "object"})
        case "json_schema":
            schema = _parsed(guide)
            if not isinstance(schema, dict | bool):
                raise _refusal(guide, "a schema is an object")
            return _json(schema if isinstance(schema, dict) else {} if schema else {"not": {}})
        case "regex":
            return f"/{regex_to_lark(guide.value)}/" if guide.value else '""'
        case "choice":
            choices = _parsed(guide)
            if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
                raise _refusal(guide, "choices are a list of at least one string")
            return "(" + " | ".join(map(json.dumps, choices)) + ")"
        case "grammar":
            return f"%lark {{\n{guide.value}\n}}"


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS})


def _parsed(guide: Guide) -> Any:
    try:
        return json.loads(guide.value)
    except (ValueError, RecursionError) as error:
        raise _refusal(guide, str(error)) from error


@contextmanager
def _refusing(guide: Guide) -> Iterator[None]:
    """Whatever fails within it says what it means for the job."""
    try:
        yield
    except FastchatQError:
        raise
    except (OSError, MemoryError) as error:  # this machine's trouble: another try may do
        raise RetryableError(f"The {_name(guide)} could not be compiled: {error}", code="guide_error") from error
    except BaseException as error:  # a panic of llguidance is no Exception: it must not end the engine's thread
        raise _refusal(guide, f"{type(error).__name__}: {error}") from error


def _refusal(guide: Guide, reason: str) -> InvalidRequestError:
    if guide.kind in JSON_KINDS or isinstance(guide, Composed):  # of a grammar that its sender has not written
        reason = IN_A_GRAMMAR.sub("", reason, 1).split("\n")[0]
    code = "invalid_schema" if guide.kind in JSON_KINDS or isinstance(guide, Composed) else "invalid_grammar"
    message = f"The {_name(guide)} cannot be used: {_in_our_words(reason)}"
    return InvalidRequestError(message, param=_param(guide), code=code)


def _name(guide: Guide) -> str:
    if isinstance(guide, Composed):
        return guide.what
    return {"json_schema": "JSON schema", "json_object": "JSON object"}.get(guide.kind, guide.kind)


def _param(guide: Guide) -> str:
    """The parameter of a request that an error names: JSON is asked for by OpenAI's, the rest by vLLM's."""
    if isinstance(guide, Composed):
        return guide.param
    return "response_format" if guide.kind in JSON_KINDS else "structured_outputs"


def _in_our_words(message: str) -> str:
    """What is wrong, in one line, without llguidance's dump of its state or its drawing of the place."""
    lines = [line.strip() for line in message.split("\n<state>")[0].splitlines()]
    reason = " ".join(line for line in lines if not DRAWING.match(line)).removeprefix("parser error: ")
    for theirs, ours in OUR_WORDS:
        reason = theirs.sub(ours, reason)
    return reason[:300]
