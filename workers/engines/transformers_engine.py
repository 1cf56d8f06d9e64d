"""The engine for Hugging Face causal LMs: one compact step loop, requests join and leave between steps."""

import time
from collections import deque

import torch
from transformers import DynamicCache

from fastchat_q.errors import ContextLengthError, InvalidRequestError
from fastchat_q.jobs import Job
from fastchat_q.registry import ModelCard

from .base import Ended, Engine, Output, Request
from .batch import Batch, Forward
from .loading import Loaded
from .sampling import sample
from .sequence import Sequence
from .text import Detokenizer, StopMatcher
from .trouble import job_error

PREFILL_BUDGET = 512
"""Prompt tokens taken in between two decode steps; one prompt always goes, however long."""
FIRST_FORWARD_S = 120.0
"""An accelerator loads and compiles its kernels during the first forward pass."""


class TransformersEngine(Engine):
    """Serves one loaded model. See `Engine` for the contract."""

    def __init__(self, name: str, slots: int, loaded: Loaded) -> None:
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        card = ModelCard(name, "transformers", loaded.context_length, int(time.time()), loaded.device.type, dtype)
        super().__init__(card, slots)
        self._loaded = loaded
        self._forward = Forward(loaded.model)
        self._vocabulary = loaded.model.config.get_text_config().vocab_size
        self._waiting: deque[Sequence] = deque()
        self._batches: list[Batch[Sequence]] = []
        self._replayed: list[Output] = []  # ends that no forward pass is needed for
        self._warm = loaded.device.type == "cpu"
        for layers in (m for m in loaded.model.modules() if isinstance(m, torch.nn.ModuleList)):
            for layer in layers:  # a long prompt on a slow device is no hung engine
                layer.register_forward_pre_hook(lambda *_: self.alive())

    def admit(self, request: Request) -> None:
        sequence = self._sequence(request)
        for token in request.prior_ids():  # replays text and stop state of an earlier attempt; its output is known
            last = sequence.accept(token)
            if last.ended is not None:
                self._replayed.append(Output(request.ticket, ended=last.ended))
                return
        self._waiting.append(sequence)

    def drop(self, ticket: str) -> None:
        self._replayed = [output for output in self._replayed if output.ticket != ticket]
        self._waiting = deque(s for s in self._waiting if s.ticket != ticket)
        for batch in list(self._batches):
            if any(row.ticket == ticket for row in batch.rows):
                self._replayed += self._leave(batch, {ticket})

    def wait_s(self) -> float | None:
        return 0.0 if self._waiting or self._batches or self._replayed else None

    @torch.inference_mode()
    def step(self) -> list[Output]:
        outputs, self._replayed = self._replayed, []
        for batch in list(self._batches):
            outputs += self._decode(batch)
        budget = PREFILL_BUDGET
        while self._waiting and budget > 0:
            sequence = self._waiting.popleft()
            budget -= len(sequence.prompt) + len(sequence.ids)
            outputs += self._prefill(sequence)
        return outputs

    def _prefill(self, sequence: Sequence) -> list[Output]:
        ids = sequence.prompt + sequence.ids
        if not self._warm:
            self.busy_for(FIRST_FORWARD_S)
            self._warm = True
        try:
            logits, cache = self._forward.prefill(ids)
            output = sequence.accept(sample(logits, [sequence.draw()])[0])
        except Exception as error:  # this request fails, its neighbours do not
            return _failed([sequence], error)
        return [output] if output.ended is not None else self._start_decoding(sequence, cache, len(ids), output)

    def _start_decoding(self, sequence: Sequence, cache: DynamicCache, columns: int, first: Output) -> list[Output]:
        joins = self._forward.batchable and bool(self._batches)
        try:
            if joins:
                self._batches[0].join(sequence, cache, columns)
            else:
                self._batches.append(Batch(self._forward, sequence, cache, columns))
        except Exception as error:
            rows = self._batches.pop(0).rows if joins else []  # some of its layers may have the row, and some not
            return _failed([*rows, sequence], error)
        return [first]

    def _decode(self, batch: Batch[Sequence]) -> list[Output]:
        try:
            tokens = sample(batch.decode(), [row.draw() for row in batch.rows])
        except Exception as error:  # the cache of this batch is undefined now
            self._batches.remove(batch)
            return _failed(batch.rows, error)
        outputs = [_accept(row, token) for row, token in zip(batch.rows, tokens, strict=True)]
        ended = {output.ticket for output in outputs if output.ended is not None}
        return outputs + self._leave(batch, ended) if ended else outputs

    def _leave(self, batch: Batch[Sequence], gone: set[str]) -> list[Output]:
        """Takes rows out of a batch; the outputs are the ends of the others if that fails (out of memory)."""
        kept = [i for i, row in enumerate(batch.rows) if row.ticket not in gone]
        if not kept:
            self._batches.remove(batch)
            return []
        rows = [batch.rows[i] for i in kept]
        try:
            batch.keep(kept)
        except Exception as error:
            self._batches.remove(batch)
            return _failed(rows, error)
        return []

    def _sequence(self, request: Request) -> Sequence:
        job, sampling = request.job, request.job.sampling
        prompt = self._render(job)
        return Sequence(
            ticket=request.ticket,
            prompt=prompt,
            limit=self._limit(len(prompt), sampling.max_tokens),
            sampling=sampling,
            eos_ids=frozenset() if sampling.ignore_eos else self._loaded.eos_ids,
            detokenizer=Detokenizer(self._decode_ids),
            stop=StopMatcher(sampling.stop),
        )

    def _decode_ids(self, ids: list[int]) -> str:
        text = self._loaded.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _render(self, job: Job) -> list[int]:
        """Messages -> prompt token ids, through the tokenizer's own chat template.

        Control tokens that a user typed are encoded as ordinary text (``sanitize_control_tokens``).
        """
        messages = [message.model_dump(exclude_defaults=True) for message in job.messages]
        try:
            encoded = self._loaded.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, sanitize_control_tokens=True
            )
        except Exception as error:  # templates raise what they like, e.g. on roles that do not alternate
            raise InvalidRequestError(
                f"The chat template of {job.model!r} refuses these messages: {error}", param="messages"
            ) from error
        ids: list[int] = encoded["input_ids"]  # type: ignore[index, call-overload, assignment]
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

    def _limit(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """Tokens that this request may generate."""
        context = self._loaded.context_length
        if context is None:
            return max_tokens or 2**31
        if prompt_tokens + (max_tokens or 1) > context:
            asked = f" and {max_tokens} for the completion" if max_tokens else ""
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens, but the request asks for {prompt_tokens} "
                f"in the messages{asked}. Shorten the messages or lower max_tokens.",
                param="messages",
            )
        return max_tokens or context - prompt_tokens


def _accept(sequence: Sequence, token: int) -> Output:
    try:
        return sequence.accept(token)
    except Exception as error:  # tokens that this tokenizer cannot decode: its neighbours go on
        [failure] = _failed([sequence], error)
        return failure


def _failed(rows: list[Sequence], error: Exception) -> list[Output]:
    ended = Ended(error=job_error(error))
    return [Output(row.ticket, ended=ended) for row in rows]
