"""What an encoder computes: `Embedder` makes a vector of each text, `Ranker` a score of each document for a query.

Neither knows of jobs that wait or of batches: those are `engine.py`'s.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import structlog
import torch

from fastchat_q.choices import EncoderOptions, Pooling
from fastchat_q.errors import ConfigurationError, ContextLengthError, InvalidRequestError
from fastchat_q.jobs import Job, Kind

from ..loading.model import Encoder
from . import sentence

log = structlog.get_logger()

UNLIMITED = 10**6
"""Tokenizers that know no limit name one beyond."""
CHUNK = 128
"""Texts that are encoded between two signs of life."""
SAME, SAME_IN_HALF = 1e-3, 0.1
"""How far, as a part of the largest number, padding may move a result by rounding; in 16 bits rounding is coarse."""


class Encoded(NamedTuple):
    """An input as the model takes it."""

    ids: list[int]
    types: list[int] | None
    """Which tokens are the document's; of models that want to know."""


class Computer(ABC):
    """A model and what stands around it."""

    kind: Kind
    param: str
    """What a client calls its inputs."""

    def __init__(self, source: str, loaded: Encoder, said: sentence.Sentence) -> None:
        self.model = loaded.model
        self.device = loaded.device
        self._tokenizer = loaded.tokenizer
        self._lower = said.lower
        parameters = inspect.signature(self.model.forward).parameters
        self._extra = {"use_cache": False} if "use_cache" in parameters else {}
        self._takes_types = "token_type_ids" in parameters
        self.vocabulary = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        self.limit = _limit(loaded, said)
        pad = loaded.tokenizer.pad_token_id
        self._pad = pad if isinstance(pad, int) and pad < self.vocabulary else 0
        self._settle()
        self.size, self.pads = self._try(source)
        """Numbers of a result, and whether inputs of different lengths may share a batch."""

    @abstractmethod
    def encode(self, job: Job, alive: Callable[[], None]) -> list[Encoded]:
        """The inputs of a job, checked.

        Raises:
            InvalidRequestError: one cannot be taken; the message names it.
        """

    @abstractmethod
    def _results(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        """The model's output -> (rows, numbers) float32."""

    def _settle(self) -> None:  # noqa: B027
        """Called when the model is there, before it runs; most have nothing to do."""

    @torch.inference_mode()
    def compute(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """(rows, numbers) float32 on the CPU."""
        width = max(len(one.ids) for one in batch)
        inputs = {
            "input_ids": [one.ids + [self._pad] * (width - len(one.ids)) for one in batch],
            "attention_mask": [[1] * len(one.ids) + [0] * (width - len(one.ids)) for one in batch],
        }
        if self._takes_types and any(one.types for one in batch):
            types = [one.types or [] for one in batch]
            inputs["token_type_ids"] = [row + [0] * (width - len(row)) for row in types]
        tensors = {name: torch.tensor(rows, device=self.device) for name, rows in inputs.items()}
        output = self.model(**tensors, **self._extra)
        return self._results(output, tensors["attention_mask"]).float().cpu()

    def finish(self, result: torch.Tensor, job: Job) -> torch.Tensor:
        """A row of `compute` as this job wants it."""
        return result

    def _tokenize(self, first: list[str], second: list[str] | None, alive: Callable[[], None]) -> list[Encoded]:
        found: list[Encoded] = []
        if self._lower:
            first = [text.lower() for text in first]
        call: Any = self._tokenizer
        for at in range(0, len(first), CHUNK):
            alive()
            pair = second[at : at + CHUNK] if second is not None else None
            made = call(first[at : at + CHUNK], pair, padding=False, truncation=False, verbose=False)
            types = made.get("token_type_ids") or [None] * len(made["input_ids"])
            found += [Encoded(*both) for both in zip(made["input_ids"], types, strict=True)]
        return found

    def _check(self, inputs: list[Encoded], job: Job) -> list[Encoded]:
        for number, one in enumerate(inputs):
            if self.limit is not None and len(one.ids) > self.limit:
                raise ContextLengthError(
                    f"This model's maximum context length is {self.limit} tokens, but input {number} has "
                    f"{len(one.ids)}. Shorten it or split it: nothing is cut off silently.",
                    param=self.param,
                )
            if not one.ids:
                raise InvalidRequestError(f"Input {number} has no tokens.", param=self.param)
            if max(one.ids) >= self.vocabulary or min(one.ids) < 0:
                raise InvalidRequestError(
                    f"Input {number} has a token outside of the vocabulary of {job.model!r}, which is 0 to "
                    f"{self.vocabulary - 1}.",
                    param=self.param,
                )
        return inputs

    def _try(self, source: str) -> tuple[int, bool]:
        """Runs the model: the size of its results, and whether padding leaves them as they are.

        Not every architecture heeds its attention mask (FNet, state-space models).
        """
        short, long = (Encoded(ids, None) for ids in _samples(self.vocabulary, self.limit))
        try:
            alone = self.compute([short])
            if not alone.isfinite().all():
                raise ConfigurationError(
                    f"Model {source!r} makes no finite numbers in {self.model.dtype}: take --dtype float32 or bfloat16."
                )
            beside = self.compute([short, long])[:1]
        except ValueError as error:  # of models without padding: they take no batch of several lengths
            log.warning("batches will have inputs of one length", model=source, why=str(error))
            return int(self.compute([short]).shape[1]), False
        except (RuntimeError, TypeError, IndexError, AttributeError) as error:
            raise ConfigurationError(f"Model {source!r} was loaded, and does not run: {error}") from error
        pads = _close(alone, beside, SAME if self.model.dtype == torch.float32 else SAME_IN_HALF)
        if not pads:
            log.warning("batches will have inputs of one length", model=source, why="padding changes its results")
        return int(alone.shape[1]), pads


class Embedder(Computer):
    """Texts to vectors."""

    kind: Kind = "embed"
    param = "input"

    def __init__(self, source: str, loaded: Encoder, options: EncoderOptions, allow_pickle: bool = False) -> None:
        said = sentence.read(source, loaded.folder, options.pooling)
        dense = sentence.dense_layers(source, said.dense, loaded.device, allow_pickle)
        self._head = sentence.Head(said.pooling, dense, said.normalise)
        self._prompt = _prompt(source, said, options.prompt_name)
        super().__init__(source, loaded, said)
        log.info(
            "embeddings",
            model=source,
            pooling=self._head.pooling,
            normalised=self._head.normalise,
            prompt=self._prompt,
            numbers=self.size,
            tokens=self.limit,
        )
        self._source = source

    def encode(self, job: Job, alive: Callable[[], None]) -> list[Encoded]:
        if job.dimensions is not None and job.dimensions > self.size:
            raise InvalidRequestError(
                f"dimensions is {job.dimensions}, and the vectors of {job.model!r} have {self.size} numbers.",
                param="dimensions",
            )
        if isinstance(job.inputs[0], tuple):
            return self._check([Encoded(list(one), None) for one in job.inputs if isinstance(one, tuple)], job)
        texts = [self._prompt + one for one in job.inputs if isinstance(one, str)]
        return self._check(self._tokenize(texts, None, alive), job)

    def finish(self, result: torch.Tensor, job: Job) -> torch.Tensor:
        if job.dimensions is None or job.dimensions == self.size:
            return result
        cut = result[: job.dimensions]
        return torch.nn.functional.normalize(cut, dim=-1) if self._head.normalise else cut

    def _settle(self) -> None:
        if self._head.pooling == "auto":
            self._head.pooling = self._guess()
            log.warning(
                "the checkpoint does not say how its tokens become a vector: choose with --pooling",
                pooling=self._head.pooling,
            )

    def _results(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        return self._head(output[0], mask)

    def _guess(self) -> Pooling:
        """The last token of a model whose tokens see only those before them, else the mean."""
        short, _ = _samples(self.vocabulary, self.limit)
        with torch.inference_mode():
            ids = torch.tensor([short, [*short[:-1], short[0]]], device=self.device)
            first = [self.model(input_ids=row[None], **self._extra)[0][0, 0].float().cpu() for row in ids]
        return "last" if _close(first[0], first[1], 1e-6) else "mean"


class Ranker(Computer):
    """A query with each document to a score, by a model with one label (a cross-encoder)."""

    kind: Kind = "rerank"
    param = "documents"

    def __init__(self, source: str, loaded: Encoder) -> None:
        config = loaded.model.config
        if config.num_labels != 1:
            raise ConfigurationError(
                f"Model {source!r} has {config.num_labels} labels: a ranking needs a cross-encoder, which has one."
            )
        self._activation = _score_of(source, config)
        super().__init__(source, loaded, sentence.lengths(source, loaded.folder))
        log.info("ranking", model=source, score=type(self._activation).__name__, tokens=self.limit)

    def encode(self, job: Job, alive: Callable[[], None]) -> list[Encoded]:
        documents = [one for one in job.inputs if isinstance(one, str)]
        if not job.query or len(documents) < len(job.inputs):
            raise InvalidRequestError("A ranking needs a query and documents that are texts.", param="query")
        return self._check(self._tokenize([job.query] * len(documents), documents, alive), job)

    def _settle(self) -> None:
        config = self.model.config.get_text_config()
        if config.pad_token_id is None:  # decoders look for the last token that is none: let that be the last one
            config.pad_token_id = -1

    def _results(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self._activation(output.logits.float())
        return scores


def _limit(loaded: Encoder, said: sentence.Sentence) -> int | None:
    """Tokens of an input: the least of what the files say, as sentence-transformers has it."""
    positions = loaded.context_length
    table = next((m for name, m in loaded.model.named_modules() if name.endswith("position_embeddings")), None)
    padding = getattr(table, "padding_idx", None)
    if padding is not None and hasattr(table, "num_embeddings"):  # RoBERTa counts from behind its padding's place
        positions = min(positions or UNLIMITED, int(table.num_embeddings) - padding - 1)  # type: ignore[union-attr]
    own = loaded.tokenizer.model_max_length
    found = [n for n in (positions, said.max_length, own if own < UNLIMITED else None) if n]
    return min(found, default=None)


def _prompt(source: str, said: sentence.Sentence, asked: str | None) -> str:
    """What is put before each text."""
    name = asked or said.default_prompt
    if name is None:
        if any(said.prompts.values()):
            log.info("prompts are left to the clients: see --prompt-name", model=source, prompts=said.prompts)
        return ""
    if name not in said.prompts:
        has = f"it has {', '.join(said.prompts)}" if said.prompts else "it has none"
        raise ConfigurationError(f"Model {source!r} has no prompt named {name!r}; {has}.")
    prompt = said.prompts[name]
    if prompt and not said.pools_prompt:
        raise ConfigurationError(
            f"Model {source!r} leaves the tokens of its prompt {name!r} out of the mean, which this engine does not do."
        )
    return prompt


def _score_of(source: str, config: Any) -> torch.nn.Module:
    """From the logit to the score, as sentence-transformers and vLLM have it: what the checkpoint names, else sigmoid.

    vLLM: vllm/model_executor/layers/pooler/activations.py, get_act_fn.
    """
    if config.problem_type == "regression":
        return torch.nn.Identity()
    of_library = getattr(config, "sentence_transformers", None) or {}
    name = of_library.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    return sentence.activation(source, name) if name else torch.nn.Sigmoid()


def _samples(vocabulary: int, limit: int | None) -> tuple[list[int], list[int]]:
    """Two inputs of different lengths, of tokens that are hardly special ones."""
    longest = min(13, limit or 13)
    ids = [vocabulary // 2 + n * 7 % (vocabulary // 2) for n in range(longest)]
    return ids[: longest // 2 + 1], ids


def _close(one: torch.Tensor, other: torch.Tensor, part: float) -> bool:
    return bool((one - other).abs().max() <= part * one.abs().max())
