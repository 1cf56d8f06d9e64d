"""The engine for models that the step loop cannot run, such as encoder-decoders: `generate`, one request at a time.

`generate` computes the logits; tokens are drawn by our own sampling, so that a request means the same as in the step
loop: between two tokens, requests come in and are cancelled as they do there between two steps.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fastchat_q.errors import FastchatQError
from fastchat_q.registry import ModelCard

from ..base import Ended, Engine, Output, Request
from ..loading.model import Loaded
from ..processing.rules import decoder_start
from ..processing.sequence import Picked
from ..processing.tokens import KINDS
from ..trouble import job_error
from .intake import COMPILING_S, Answers, Choice, Intake, features
from .lora import Adapters
from .passes import fitting, watch_layers
from .sampling import Sampler


class GenerateEngine(Engine):
    """Serves one loaded model through `generate`. See `Engine` for the contract."""

    def __init__(self, name: str, slots: int, loaded: Loaded, adapters: Adapters | None = None) -> None:
        super().__init__(loaded.card(name, "transformers", features(loaded), "generate"), slots)
        self._loaded = loaded
        self._adapters = Adapters(loaded.model) if adapters is None else adapters
        self._intake = Intake(loaded)
        self.sampler = Sampler(self._intake.texts)
        self._waiting: deque[Choice] = deque()
        self._current: Answers | None = None
        self._dropped = False
        self._told: list[Output] = []
        watch_layers(loaded.model, self.alive)

    @property
    def cards(self) -> Sequence[ModelCard]:
        return (self.card, *self._adapters.cards(self.card))

    def admit(self, request: Request) -> None:
        if self._intake.render_aside(request):
            return
        if request.job.kind in KINDS:
            self._told.append(self._intake.tokens(request))
            return
        answers, ended = self._intake.answers(request)
        if ended is not None:
            self._told.append(Output(request.ticket, ended=ended))
            return
        self._waiting += [choice for choice in answers.choices if not answers.has_ended(choice)]

    def drop(self, ticket: str) -> None:
        self._intake.forget(ticket)
        self._told = [output for output in self._told if output.ticket != ticket]
        self._waiting = deque(choice for choice in self._waiting if choice.answers.ticket != ticket)
        if self._current is not None and self._current.ticket == ticket:
            self._dropped = True

    def wait_s(self) -> float | None:
        if self._told or any(_is_ready(choice) for choice in self._waiting):
            return 0.0
        return COMPILING_S if self._waiting or self._intake.is_rendering else None

    def step(self) -> list[Output]:
        """A whole answer; its tokens go to the sink as they come."""
        self._take_rendered()
        choice = next((choice for choice in self._waiting if _is_ready(choice)), None)
        if choice is not None:
            self._waiting.remove(choice)
            self._generate(choice)
        outputs, self._told = self._told, []
        return outputs

    @torch.inference_mode()
    def _generate(self, choice: Choice) -> None:
        if not choice.sequence.limit:
            self._told.append(choice.accept(Picked(0)))
            return
        self._current, self._dropped = choice.answers, False
        turn = _Turn(self, choice)
        model: Any = self._loaded.model
        try:
            with self._adapters.acting([(self._adapters.of(choice.answers.model), 1)]), _unruled(model):
                model.generate(
                    **self._inputs(choice),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=choice.sequence.limit - len(choice.sequence.ids),
                    eos_token_id=None,
                    pad_token_id=0,
                    logits_processor=LogitsProcessorList([_Draw(turn)]),
                    stopping_criteria=StoppingCriteriaList([_Stop(turn)]),
                )
        except Exception as error:  # this request fails, those that wait do not
            ticket, failed = choice.answers.ticket, Ended(error=job_error(error))
            if not self._dropped:
                self.drop(ticket)
                self._told.append(Output(ticket, ended=failed))
        finally:
            self._current = None

    def _inputs(self, choice: Choice) -> dict[str, torch.Tensor]:
        device, sequence = self._loaded.device, choice.sequence
        start = decoder_start(self._loaded.model)
        if start is None:
            ids = torch.tensor([choice.tokens()], device=device)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **fitting(choice.inputs, ids.shape[1])}
        ids = torch.tensor([sequence.prompt], device=device)
        begun = torch.tensor([[start, *sequence.ids]], device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": begun}

    def tell(self, output: Output) -> bool:
        """Says what a token means; False: nothing more is wanted."""
        self._told.append(output)
        assert self._sink is not None, "start() was not called"
        told, self._told = self._told, []
        self._sink(told)
        self.receive_waiting()
        return not self._dropped

    def receive_waiting(self) -> None:
        """Takes in what came meanwhile."""
        outputs: list[Output] = []
        while not self._inbox.empty():
            item = self._inbox.get_nowait()
            if item is None:  # the loop ends when this answer has: put it back for it
                self._inbox.put(None)
                self._dropped = True
                break
            if isinstance(item, str):
                self.drop(item)
            else:
                self._admit(item, outputs)
        self._told += outputs
        self._take_rendered()
        self.alive()

    def _take_rendered(self) -> None:
        for request in self._intake.rendered():
            self._admit(request, self._told)


@contextmanager
def _unruled(model: Any) -> Iterator[None]:
    """Within it, `generate` follows no entry of the model's generation_config: our sampling does (rules.py)."""
    own = model.generation_config
    model.generation_config = GenerationConfig(decoder_start_token_id=decoder_start(model))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


def _is_ready(choice: Choice) -> bool:
    """Whether it can be generated, if only to find out what is wrong with its grammar."""
    try:
        return choice.sequence.ready
    except FastchatQError:
        return True


class _Turn:
    """What the hooks into `generate` share during one answer."""

    def __init__(self, engine: GenerateEngine, choice: Choice) -> None:
        self.engine, self.choice = engine, choice
        self.over = False

    def draw(self, logits: torch.Tensor) -> int:
        """The next token, for logits (1, vocabulary) float32; says what it means."""
        [picked] = self.engine.sampler.pick(logits, [self.choice.sequence])
        output = self.choice.accept(picked)
        answers = self.choice.answers
        ended = output.ended is not None or answers.has_ended(self.choice)
        self.over = not self.engine.tell(output) or ended
        return picked.token


class _Draw(LogitsProcessor):
    """Leaves `generate` no choice but the token that our sampling drew."""

    def __init__(self, turn: _Turn) -> None:
        self._turn = turn

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        token = self._turn.draw(scores.float())
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = 0
        return only


class _Stop(StoppingCriteria):
    def __init__(self, turn: _Turn) -> None:
        self._turn = turn

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self._turn.over, device=input_ids.device)  # type: ignore[return-value]
