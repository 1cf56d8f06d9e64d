"""From a request to sequences that can run: prompt rendered and checked, limits, what an earlier attempt said."""

from dataclasses import dataclass, field, replace

import torch

from fastchat_q.events import Usage
from fastchat_q.jobs import Feature

from ..base import Ended, Output, Request
from ..loading.model import Loaded
from ..processing.rendering import Renderer, token_limit
from ..processing.rules import ModelRules
from ..processing.sequence import Language, Picked, Sequence
from ..processing.speech import Speech
from ..processing.structured import Guides
from ..processing.text import TokenTexts

COMPILING_S = 0.005
"""How often an engine looks whether a grammar is compiled, when nothing else is to be done."""
FEATURES: tuple[Feature, ...] = ("n", "sampling", "penalties", "logprobs", "structured_outputs")
"""What every engine can do that takes its requests in here and draws their tokens with `Sampler`."""


def features(loaded: Loaded) -> tuple[Feature, ...]:
    """What such an engine can do with this model."""
    seeing: tuple[Feature, ...] = () if loaded.sight is None else ("vision",)
    return (*FEATURES, *loaded.format.features, *seeing)


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
    suspect: bool = False
    """It was there when a step failed: its next token is drawn by itself, and if that fails too, its job has failed."""
    restarts: int = 0
    """How often it was computed again after such steps."""

    def tokens(self) -> list[int]:
        """All tokens so far, the prompt's first."""
        return self.sequence.prompt + self.sequence.ids

    def accept(self, picked: Picked) -> Output:
        """Takes the next token in. The output ends if the job ends."""
        output = self.sequence.accept(picked)
        return output if self.answers.count == 1 else self.answers.tell(self, output)


@dataclass(eq=False, slots=True)
class Answers:
    """All choices of a job; it ends with the last of them."""

    ticket: str
    model: str
    """The name that the job asks for."""
    choices: list[Choice] = field(default_factory=list)
    _ended: dict[int, Ended] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.choices)

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
        if finish is not None:
            pieces = (*pieces[:-1], pieces[-1]._replace(finish=finish))
        return Output(self.ticket, pieces, self._end())

    def _end(self) -> Ended | None:
        if len(self._ended) < self.count:
            return None
        usages = [ended.usage for ended in self._ended.values() if ended.usage is not None]
        usage = Usage(usages[0].prompt_tokens, sum(usage.completion_tokens for usage in usages))
        return Ended(usage, self._ended[0].finish_reason)


class Intake:
    """Makes sequences of requests, for one model.

    Args:
        room: tokens that a request may have in memory, if that is less than the model's context.
    """

    def __init__(self, loaded: Loaded, room: int | None = None) -> None:
        self._loaded = loaded
        self._room = room
        vocabulary = loaded.model.config.get_text_config().vocab_size
        self._renderer = Renderer(loaded.tokenizer, vocabulary, loaded.chat, loaded.adapter, loaded.sight)
        self.texts = TokenTexts(loaded.tokenizer)
        guides = Guides(loaded.tokenizer, vocabulary, loaded.eos_ids)
        rules = ModelRules.of(loaded.model)
        self._language = Language(vocabulary, loaded.eos_ids, self._decode_ids, guides, rules, self._renderer.stop)
        self._speech = Speech(loaded.tokenizer, loaded.format)
        self._with_marks = replace(self._language, decode=self._speech.decode)

    def answers(self, request: Request) -> tuple[Answers, Ended | None]:
        """The choices of a job with what they have said already, and its end if that was all.

        Raises:
            InvalidRequestError: it cannot be served.
        """
        job = request.job
        prompt, inputs = self._renderer.seen(job, request.blobs) if job.blobs else (self._renderer.prompt(job), {})
        limit = token_limit(self._loaded.context_length, len(prompt), job.sampling.max_tokens, self._room)
        answers = Answers(request.ticket, job.model)
        is_open = self._speech.is_open(job, prompt)
        sampling = self._speech.sampling(job, is_open)
        for index in range(sampling.n):
            parser = self._speech.parser(job, is_open, index)
            language = self._with_marks if parser is not None and self._speech.sees_marks else self._language
            sequence = Sequence(request.ticket, prompt, limit, sampling, language, index, parser)
            answers.choices.append(Choice(answers, index, sequence, inputs))
        last: Ended | None = None
        for choice in answers.choices:
            for token in request.prior_ids(choice.index):  # its output is known: text and stop state are rebuilt
                if (ended := choice.accept(Picked(token)).ended) is not None:
                    last = ended
                    break
        return answers, last

    def _decode_ids(self, ids: list[int]) -> str:
        text = self._loaded.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text
