"""From a request to sequences that can run: prompt rendered and checked, limits, what an earlier attempt said."""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import structlog
import torch

from fastchat_q.events import Piece, TokenLogprob, Usage
from fastchat_q.jobs import Feature, Job

from ..base import Ended, Output, Request
from ..loading.model import Loaded
from ..processing.rendering import Renderer, token_limit
from ..processing.rules import ModelRules, decoder_start
from ..processing.sequence import Language, Picked, Sequence
from ..processing.speech import Speech
from ..processing.structured import Guides
from ..processing.text import TokenTexts
from ..processing.tokens import token_answer

log = structlog.get_logger()

COMPILING_S = 0.005
"""How often an engine looks whether a grammar is compiled or a prompt rendered, when nothing else is to be done."""
LONG_PROMPT = 16_000
"""Characters of a job. Rendering takes some 2 us each (`tiny`, one core): longer ones would be felt by the streams."""
BEFORE = 5
"""Tokens of a prompt that a completion's first token is decoded with."""
Prompt = tuple[list[int], dict[str, torch.Tensor]]
"""Token ids, and what the forward pass takes beside them."""
FEATURES: tuple[Feature, ...] = (
    *("n", "sampling", "penalties", "logprobs", "structured_outputs"),
    *("completions", "tokenize"),
)
"""What every engine can do that takes its requests in here and draws their tokens with `Sampler`."""


def features(loaded: Loaded) -> tuple[Feature, ...]:
    """What such an engine can do with this model."""
    seeing: tuple[Feature, ...] = () if loaded.sight is None else ("vision",)
    return (*FEATURES, *loaded.format.features, *seeing)


@dataclass(eq=False, slots=True)
class Echo:
    """A prompt that its answers begin with."""

    text: str
    ids: list[int]
    scores: list[TokenLogprob] | None
    """What the model thought of its first tokens; None: nobody asked."""

    @property
    def waits(self) -> bool:
        """Whether the logits of its tokens are wanted."""
        return self.scores is not None and len(self.scores) < len(self.ids)

    def take(self, start: int, scores: list[TokenLogprob]) -> None:
        """Those of the tokens behind the one at ``start``, which may have come before."""
        assert self.scores is not None
        self.scores[start + 1 :] = scores

    def piece(self, choice: int) -> Piece:
        """What it says before an answer."""
        return Piece(text=self.text, choice=choice, logprobs=tuple(self.scores or ()), units=1, echo=True)


@dataclass(eq=False, slots=True)
class Choice:
    """One of the answers that a job asks for."""

    answers: "Answers"
    index: int
    sequence: Sequence
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the pass that takes in its prompt gets beside the tokens."""
    waiting: list["Choice"] = field(default_factory=list)
    """Choices that begin where the prompt of this one ends."""
    echo: Echo | None = None
    """What it has to say before its first token."""
    suspect: bool = False
    """It was there when a step failed: its next token is drawn by itself, and if that fails too, its job has failed."""
    restarts: int = 0
    """How often it was computed again after such steps."""

    def tokens(self) -> list[int]:
        """All tokens so far, the prompt's first."""
        return self.sequence.prompt + self.sequence.ids

    def accept(self, picked: Picked) -> Output:
        """Takes the next token in, which may be one too many. The output ends if the job ends."""
        sequence = self.sequence
        output = sequence.accept(picked) if sequence.limit else Output(sequence.ticket, (), sequence.nothing())
        if self.echo is not None:
            output = replace(output, pieces=(self.echo.piece(self.index), *output.pieces))
            self.echo = None
        return output if self.answers.count == 1 else self.answers.tell(self, output)


@dataclass(eq=False, slots=True)
class Answers:
    """All choices of a job; it ends with the last of them."""

    ticket: str
    model: str
    """The name that the job asks for."""
    n: int = 1
    """Choices of each prompt; they stand side by side."""
    choices: list[Choice] = field(default_factory=list)
    _ended: dict[int, Ended] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.choices)

    def by_prompt(self) -> list[list[Choice]]:
        """The choices that go on, by their prompt."""
        groups = [self.choices[first : first + self.n] for first in range(0, self.count, self.n)]
        return [[choice for choice in group if not self.has_ended(choice)] for group in groups]

    def has_ended(self, choice: Choice) -> bool:
        """Whether a choice of several has ended."""
        return choice.index in self._ended

    def tell(self, choice: Choice, output: Output) -> Output:
        """What one choice said, as the job's output."""
        finish = None
        if output.ended is not None:
            finish = output.ended.finish_reason
            self._ended[choice.index] = output.ended
        pieces = output.pieces
        if finish is not None and pieces:
            pieces = (*pieces[:-1], pieces[-1]._replace(finish=finish))
        return Output(self.ticket, pieces, self._end())

    def _end(self) -> Ended | None:
        if len(self._ended) < self.count:
            return None
        usages = [ended.usage for ended in self._ended.values() if ended.usage is not None]
        prompts = sum(len(choice.sequence.prompt) for choice in self.choices[:: self.n])
        return Ended(Usage(prompts, sum(usage.completion_tokens for usage in usages)), self._ended[0].finish_reason)


class Intake:
    """Makes sequences of requests, for one model. All but the rendering of long prompts runs on the engine's thread.

    Args:
        room: tokens that a request may have in memory, if that is less than the model's context.
    """

    def __init__(self, loaded: Loaded, room: int | None = None) -> None:
        self._loaded = loaded
        self._room = room
        vocabulary = loaded.model.config.get_text_config().vocab_size
        self._renderer = Renderer(loaded.tokenizer, vocabulary, loaded.chat, loaded.adapter, loaded.sight)
        self._aside_renderer = self._second_renderer(vocabulary)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._aside: dict[str, tuple[Request, Future[list[Prompt]]]] = {}
        self.texts = TokenTexts(loaded.tokenizer)
        guides = Guides(loaded.tokenizer, vocabulary, loaded.eos_ids)
        rules = ModelRules.of(loaded.model)
        self._language = Language(vocabulary, loaded.eos_ids, self._decode_ids, guides, rules, self._renderer.stop)
        self._speech = Speech(loaded.tokenizer, loaded.format)
        self._with_marks = replace(self._language, decode=self._speech.decode)
        self._of_prompts = replace(self._language, stop=())  # those are ends of a turn, which a raw prompt has not
        self._goes_on = decoder_start(loaded.model) is None

    def render_aside(self, request: Request) -> bool:
        """Begins to render what takes long, long prompts and images, on a thread of its own.

        False: there is no need to, or it is done: `answers` takes it in. Else it comes out of `rendered`.
        """
        job, renderer = request.job, self._aside_renderer
        if request.ticket in self._aside or renderer is None:
            return False
        if not job.blobs and len(job.model_dump_json()) <= LONG_PROMPT:
            return False
        self._aside[request.ticket] = (request, self._thread.submit(_render, renderer, request))
        return True

    def rendered(self) -> list[Request]:
        """Requests that were rendered aside and can be taken in."""
        return [request for request, prompt in self._aside.values() if prompt.done()]

    @property
    def is_rendering(self) -> bool:
        """Whether some request is rendered aside."""
        return bool(self._aside)

    def forget(self, ticket: str) -> None:
        """Nobody waits for this one any more."""
        if (aside := self._aside.pop(ticket, None)) is not None:
            aside[1].cancel()

    def answers(self, request: Request) -> tuple[Answers, Ended | None]:
        """The choices of a job with what they have said already, and its end if that was all.

        Raises:
            InvalidRequestError: it cannot be served.
        """
        job, prompts = request.job, self._prompts(request)
        answers = Answers(request.ticket, job.model, job.sampling.n)
        if job.kind == "completion":
            for number, (prompt, _) in enumerate(prompts):
                self._complete(request, answers, number, prompt)
        else:
            [(prompt, inputs)] = prompts
            limit = token_limit(self._loaded.context_length, len(prompt), job.sampling, self._room)
            is_open = self._speech.is_open(job, prompt)
            sampling = self._speech.sampling(job, is_open)
            for index in range(sampling.n):
                parser = self._speech.parser(job, is_open, index)
                language = self._with_marks if parser is not None and self._speech.sees_marks else self._language
                sequence = Sequence(request.ticket, prompt, limit, sampling, language, index, parser)
                answers.choices.append(Choice(answers, index, sequence, inputs))
        last: Ended | None = None
        for choice in answers.choices:
            if not choice.sequence.limit and choice.echo is None:  # all that it had to say is told
                last = choice.accept(Picked(0)).ended
            for token in request.prior_ids(choice.index):  # its output is known: text and stop state are rebuilt
                if (ended := choice.accept(Picked(token)).ended) is not None:
                    last = ended
                    break
        return answers, last

    def _complete(self, request: Request, answers: Answers, number: int, prompt: list[int]) -> None:
        """The choices of one of the prompts of a completion. What is drawn for it does not hang on the others."""
        job, n = request.job, answers.n
        limit = token_limit(self._loaded.context_length, len(prompt), job.sampling, self._room, "prompt")
        before = prompt[-BEFORE:] if self._goes_on else ()
        echo = self._echo(job, number, prompt) if job.echo else None
        for variant in range(n):
            index = number * n + variant
            sequence = Sequence(
                request.ticket, prompt, limit, job.sampling, self._of_prompts, index, None, variant, before
            )
            told = echo is None or request.has_echoed(index)
            answers.choices.append(Choice(answers, index, sequence, echo=None if told else echo))

    def _echo(self, job: Job, number: int, prompt: list[int]) -> Echo:
        given = job.inputs[number]
        text = given if isinstance(given, str) else str(self._loaded.tokenizer.decode(prompt))
        first = [TokenLogprob(prompt[0], self.texts[prompt[0]], 0.0)]
        return Echo(text, prompt, None if job.sampling.logprobs is None else first)

    def tokens(self, request: Request) -> Output:
        """The answer of a job that tokenizes or detokenizes.

        Raises:
            InvalidRequestError: it cannot be served.
        """
        prompts = self._prompts(request)
        return token_answer(request, self._loaded.tokenizer, self._loaded.context_length, prompts[0][0])

    def _prompts(self, request: Request) -> list[Prompt]:
        aside = self._aside.pop(request.ticket, None)
        return aside[1].result() if aside is not None else _render(self._renderer, request)

    def _second_renderer(self, vocabulary: int) -> Renderer | None:
        """For the other thread: encoding changes settings of a tokenizer, which two threads cannot share.

        None: the model has Python code of its own, which one thread calls, or its tokenizer is not to be copied.
        """
        loaded = self._loaded
        if loaded.adapter is not None:
            return None
        try:
            tokenizer = copy.deepcopy(loaded.tokenizer)
        except Exception as error:  # a tokenizer may be anybody's code
            log.warning("long prompts are rendered between steps: the tokenizer cannot be copied", why=str(error))
            return None
        return Renderer(tokenizer, vocabulary, loaded.chat, None, loaded.sight)

    def _decode_ids(self, ids: list[int]) -> str:
        text = self._loaded.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def _render(renderer: Renderer, request: Request) -> list[Prompt]:
    """One prompt, but of completions, which may have several."""
    job = request.job
    if job.inputs:
        return [(renderer.plain(job, given), {}) for given in job.inputs]
    return [renderer.seen(job, request.blobs) if job.blobs else (renderer.prompt(job), {})]
