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
from fastchat_q.jobs import Feature, Guide, Job, Kind, Sampling

from ..base import Output, Request
from ..processing.grammars import Checker
from ..processing.rendering import Renderer, give_template, stop_ids, token_limit
from ..processing.sequence import Language
from ..processing.sequence import Sequence as Reading
from ..processing.speech import Speech, written_by
from ..processing.structured import CACHED_GRAMMARS, check, is_harmless, lark
from ..processing.tokens import token_answer
from .choice import Choice, Place, Row
from .params import continues
from .sight import sight_of
from .text import VllmText

log = structlog.get_logger()

FEATURES: tuple[Feature, ...] = (
    *("n", "sampling", "penalties", "logprobs", "structured_outputs"),
    *("completions", "prompt_logprobs", "tokenize"),
)


class Intake:
    """Takes requests in, for one model and its adapters.

    Args:
        llm: outside of an event loop.

    Raises:
        ConfigurationError: there is no such chat template, or no such parser.
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
        self.kind: Kind = "completion" if chat is None and adapter is None else "chat"
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
        aside = asyncio.get_running_loop().run_in_executor
        await self._render(row, request)
        await aside(self._thread, self._begin, row, request.prior)
        if row.sampling.guide is not None:
            row.grammar = await self._grammar(row.sampling.guide)

    async def tokens(self, request: Request) -> Output:
        """The answer of a job that tokenizes or detokenizes.

        Raises:
            FastchatQError: it cannot be served.
        """
        row = Row(request.ticket, request.job)
        await self._render(row, request)
        return token_answer(request, self._tokenizer, self._context, row.prompts[0])

    async def _render(self, row: Row, request: Request) -> None:
        job = row.job
        aside = asyncio.get_running_loop().run_in_executor
        if job.inputs:
            row.prompts = [await aside(self._thread, self._renderer.plain, job, given) for given in job.inputs]
            return
        row.prompts = [await aside(self._thread, self._renderer.prompt, job)]
        if job.blobs:
            if self._sight is None:
                raise InvalidRequestError(f"The model {job.model!r} takes no images.", param="messages")
            row.inputs = await self._sight.seen(job, row.prompts[0], request.blobs)
            row.prompts = [list(row.inputs["prompt_token_ids"])]

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
        job, raw = row.job, row.job.kind == "completion"
        is_open = None if raw else self._speech.is_open(job, row.prompts[0])
        row.sampling = self._with_ends(job.sampling if raw else self._speech.sampling(job, is_open), raw)
        for number, prompt in enumerate(row.prompts):
            param = "prompt" if raw else "messages"
            limit = token_limit(self._context, len(prompt), job.sampling, param=param)
            for variant in range(row.sampling.n):
                index = number * row.sampling.n + variant
                told = not job.echo or any(piece.echo and piece.choice == index for piece in prior)
                place = Place(prompt, limit, index, variant, None if told else self._text(job, number, prompt))
                row.choices.append(self._choice(row, place, prior, is_open))

    def _text(self, job: Job, number: int, prompt: list[int]) -> str:
        given = job.inputs[number]
        return given if isinstance(given, str) else str(self._tokenizer.decode(prompt))

    def _with_ends(self, sampling: Sampling, raw: bool) -> Sampling:
        """With what ends a turn of the model's family, if its template is not the model's own.

        Args:
            raw: it is no turn.
        """
        if sampling.guide is not None:  # behind its last token only the end may come, whatever else was asked for
            sampling = sampling.model_copy(update={"ignore_eos": False, "min_tokens": 0})
        if raw or sampling.ignore_eos or not (self._renderer.stop or self._stop_ids):
            return sampling
        stops = {
            "stop": (*sampling.stop, *self._renderer.stop),
            "stop_token_ids": (*sampling.stop_token_ids, *self._stop_ids),
        }
        return sampling.model_copy(update=stops)

    def _choice(self, row: Row, place: Place, prior: Sequence[Piece], is_open: bool | None) -> Choice:
        index = place.index
        said = [piece for piece in prior if piece.choice == index and not (piece.echo and piece.finish is None)]
        parser = None if row.job.kind == "completion" else self._speech.parser(row.job, is_open, index)
        reading: Reading | None = None
        if said or parser is not None:
            names = ("stop", "stop_token_ids", "ignore_eos", "min_tokens")
            ends = Sampling(**{name: getattr(row.sampling, name) for name in names})  # vLLM does all else
            reading = Reading(row.ticket, place.prompt, place.limit, ends, self._language, index, parser)
            silent = self._speech.silent if parser is not None and self._speech.sees_marks else None
            reading.detokenizer = VllmText(self._tokenizer, place.prompt, silent)
        return Choice(row, place, said, reading, goes_on=continues(row.sampling))


def _eos_ids(llm: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer for vLLM: the tokenizer's end, and those of the model's generation config."""
    named = llm.input_processor.generation_config_fields.get("eos_token_id") or []
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*own, *([named] if isinstance(named, int) else named)])
