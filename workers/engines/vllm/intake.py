"""From a request to what vLLM is asked: the prompt, the grammar, and what an earlier attempt said of it."""

import asyncio
import copy
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
from fastchat_q.workers import adapters
from fastchat_q.workers.families import Choice as Chat

from fastchat_q.choices import LoadOptions
from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import Piece
from fastchat_q.jobs import Feature, Guide, Sampling

from ..base import Request
from ..processing.grammars import Checker
from ..processing.rendering import Renderer, give_template, stop_ids, token_limit
from ..processing.sequence import Language
from ..processing.sequence import Sequence as Reading
from ..processing.speech import Speech, written_by
from ..processing.structured import CACHED_GRAMMARS, check, is_harmless, lark
from .choice import Choice, Row
from .params import continues
from .sight import sight_of
from .text import VllmText

log = structlog.get_logger()

FEATURES: tuple[Feature, ...] = ("n", "sampling", "penalties", "logprobs", "structured_outputs")


class Intake:
    """Takes requests in, for one model and its adapters.

    Args:
        llm: outside of an event loop.

    Raises:
        ConfigurationError: there is no chat template, or no such parser.
    """

    def __init__(self, llm: Any, options: LoadOptions) -> None:
        config, tokenizer = llm.vllm_config.model_config, llm.renderer.get_tokenizer()
        about, source = config.hf_config.to_dict(), config.model
        adapter = adapters.find(about)
        if isinstance(adapter, adapters.Loads | adapters.Generates):
            log.warning("vLLM loads and runs the model itself; of its adapter only the template is used", model=source)
        chat: Chat | None = None
        if not isinstance(adapter, adapters.Templates):
            chat = give_template(tokenizer, source, source, about, options.chat_template, options.revision)
        written = written_by(options, chat)
        self._context: int = config.max_model_len
        vocabulary = config.get_vocab_size()
        self._tokenizer = tokenizer
        # Encoding changes settings of a tokenizer, which two threads cannot share: the one that renders has its own.
        self._renderer = Renderer(copy.deepcopy(tokenizer), vocabulary, chat, adapter, sees=config.is_multimodal_model)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._sight = sight_of(llm.renderer, config, self._renderer)
        seeing: tuple[Feature, ...] = () if self._sight is None else ("vision",)
        self.features: tuple[Feature, ...] = (*FEATURES, *written.features, *seeing)
        self._stop_ids = stop_ids(tokenizer, chat) if chat is not None else frozenset()
        self._speech = Speech(tokenizer, written)
        self._checker, self._checking = Checker(), asyncio.Lock()
        self._grammars: OrderedDict[Guide, str] = OrderedDict()
        self._language = Language(vocabulary, _eos_ids(llm, tokenizer), tokenizer.decode, guides=None)

    async def take_in(self, row: Row, request: Request) -> None:
        """Fills a row, beside the event loop.

        Raises:
            FastchatQError: it cannot be served.
        """
        job = row.job
        aside = asyncio.get_running_loop().run_in_executor
        row.prompt = await aside(self._thread, self._renderer.prompt, job)
        if job.blobs:
            if self._sight is None:
                raise InvalidRequestError(f"The model {job.model!r} takes no images.", param="messages")
            row.inputs = await self._sight.seen(job, row.prompt, request.blobs)
            row.prompt = list(row.inputs["prompt_token_ids"])
        await aside(self._thread, self._begin, row, request.prior)
        if row.sampling.guide is not None:
            row.grammar = await self._grammar(row.sampling.guide)

    async def _grammar(self, guide: Guide) -> str:
        """What vLLM follows, checked when it is new."""
        if is_harmless(guide):
            return lark(guide)
        async with self._checking:
            known = self._grammars.pop(guide, "") or await asyncio.to_thread(check, guide, self._checker)
        self._grammars[guide] = known
        if len(self._grammars) > CACHED_GRAMMARS:
            self._grammars.popitem(last=False)
        return known

    def _begin(self, row: Row, prior: Sequence[Piece]) -> None:
        job = row.job
        row.limit = token_limit(self._context, len(row.prompt), job.sampling)
        is_open = self._speech.is_open(job, row.prompt)
        row.sampling = self._with_ends(self._speech.sampling(job, is_open))
        row.choices = [self._choice(row, prior, is_open, index) for index in range(row.sampling.n)]

    def _with_ends(self, sampling: Sampling) -> Sampling:
        """With what ends a turn of the model's family, if its template is not the model's own."""
        if sampling.guide is not None:  # behind its last token only the end may come, whatever else was asked for
            sampling = sampling.model_copy(update={"ignore_eos": False, "min_tokens": 0})
        if sampling.ignore_eos or not (self._renderer.stop or self._stop_ids):
            return sampling
        stops = {
            "stop": (*sampling.stop, *self._renderer.stop),
            "stop_token_ids": (*sampling.stop_token_ids, *self._stop_ids),
        }
        return sampling.model_copy(update=stops)

    def _choice(self, row: Row, prior: Sequence[Piece], is_open: bool | None, index: int) -> Choice:
        said = [piece for piece in prior if piece.choice == index]
        parser = self._speech.parser(row.job, is_open, index)
        reading: Reading | None = None
        if said or parser is not None:
            names = ("stop", "stop_token_ids", "ignore_eos", "min_tokens")
            ends = Sampling(**{name: getattr(row.sampling, name) for name in names})  # vLLM does all else
            reading = Reading(row.ticket, row.prompt, row.limit, ends, self._language, index, parser)
            silent = self._speech.silent if parser is not None and self._speech.sees_marks else None
            reading.detokenizer = VllmText(self._tokenizer, row.prompt, silent)
        return Choice(row, index, said, reading, goes_on=continues(row.sampling))


def _eos_ids(llm: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer for vLLM: the tokenizer's end, and those of the model's generation config."""
    named = llm.input_processor.generation_config_fields.get("eos_token_id") or []
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*own, *([named] if isinstance(named, int) else named)])
