"""What a step of the loop asks of a model, and the plainest way to answer it: every row by itself, as `generate` does.

Three ways answer it, from the fastest on: `packed.py`, `dense.py` and `RowByRow` here; `choose.py` finds the fastest
that is right for a model. Between steps rows reserve and release memory; within a step nothing else happens to them.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from .lora import Adapters

BOUNDLESS = 2**31


@dataclass(eq=False, slots=True)
class Row:
    """What a way knows of one sequence that it computes.

    Args:
        namespace: the LoRA adapter that it is of, or empty; rows share computed prefixes only within one.
        inputs: more arguments of the pass that takes in the prompt, which is then taken in whole, such as pixel values.
    """

    namespace: str = ""
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    length: int = 0
    """Tokens that are computed: their keys and values, or states, are in memory."""
    last_id: int = 0
    """The token that the next decode step feeds."""
    memory: Any = None
    """What the way keeps for it."""
    scored: bool = False
    """The logits behind all tokens of its prompt are wanted."""

    def arguments(self, tokens: int) -> dict[str, torch.Tensor]:
        """``inputs`` for a pass that takes in the prompt and tokens behind it."""
        return fitting(self.inputs, tokens) if self.inputs else self.inputs


def fitting(inputs: dict[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """The inputs of a prompt, for so many tokens: what says of each token whether it is of an image says so of all."""
    return {
        name: _lengthened(value, tokens) if name.endswith("token_type_ids") else value for name, value in inputs.items()
    }


def _lengthened(kinds: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.nn.functional.pad(kinds, (0, tokens - kinds.shape[1]))  # 0: text


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of a row's prompt; ``last``: the logits behind them are wanted."""

    row: Row
    ids: list[int]
    last: bool


@dataclass(frozen=True, slots=True)
class Part:
    """What goes through the model together, and fails together."""

    decode: list[Row]
    chunks: list[Chunk]

    @property
    def rows(self) -> list[Row]:
        return [*self.decode, *(chunk.row for chunk in self.chunks)]


@dataclass(frozen=True, slots=True)
class Result:
    """Logits (rows, vocabulary) for these rows: all that decoded, and those whose prompt ended."""

    rows: list[Row]
    logits: torch.Tensor
    scored: list["Scored"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scored:
    """Logits (tokens, vocabulary) behind each of the tokens of a prompt from ``start`` on, of a row that wants them."""

    row: Row
    start: int
    logits: torch.Tensor


def watch_layers(model: PreTrainedModel, alive: Callable[[], None]) -> None:
    """Has every layer call ``alive`` before it computes."""
    for layers in (m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: alive())


class Model:
    """A causal LM's forward pass with the argument names that this architecture has.

    Args:
        alive: called whenever a layer has been computed, so that a long pass on a slow device is no hung engine.
        adapters: those on the model, if there are any.
    """

    def __init__(
        self, model: PreTrainedModel, alive: Callable[[], None] = lambda: None, adapters: Adapters | None = None
    ) -> None:
        parameters = inspect.signature(model.forward).parameters
        self._model = model
        self._cache_name = "past_key_values" if "past_key_values" in parameters else "cache_params"
        self._takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self.alive = alive
        self.adapters = Adapters(model) if adapters is None else adapters
        self.config = model.config.get_text_config(decoder=True)
        self.device = model.device
        self.dtype = model.dtype
        self.quantized = getattr(model, "quantization_method", None) is not None

    def watch_layers(self) -> None:
        """Lets every layer say that it is computed; costs a call for each, which packed steps do not need."""
        watch_layers(self._model, lambda: self.alive())

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        mask: torch.Tensor | None = None,
        keep: torch.Tensor | int = 1,
        owners: Iterable[tuple[str, int]] = (),
        **inputs: Any,
    ) -> torch.Tensor:
        """ids and positions (rows, columns) -> logits (rows, kept, vocabulary).

        Args:
            keep: the columns whose logits are wanted; as a number, so many of the last ones, or 0 for all.
            owners: of the tokens, row by row: a row's namespace and how many are its own; none: all are the base's.
        """
        kwargs: dict[str, Any] = {self._cache_name: cache, **inputs}
        if self._takes_positions:
            kwargs["position_ids"] = positions
        if self._keeps_logits:
            kwargs["logits_to_keep"] = keep
        with self.adapters.acting(owners):
            logits: torch.Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **kwargs).logits
        if self._keeps_logits:
            return logits
        return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]

    def seen(self, ids: list[int], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits (vocabulary) float32 behind a prompt with images; positions and masks are the model's own."""
        columns = torch.tensor([ids], device=self.device)
        logits: torch.Tensor = self._model(
            input_ids=columns, attention_mask=torch.ones_like(columns), use_cache=True, **inputs
        ).logits
        return logits[0, -1].float()

    def new_cache(self) -> DynamicCache:
        """An empty cache with the kinds of layer that this architecture wants."""
        return DynamicCache(config=self.config)

    def extend(self, cache: Cache, past: int, ids: list[int], namespace: str = "", **inputs: Any) -> torch.Tensor:
        """Feeds the next tokens of one row -> logits (1, vocabulary) of the last one, float32."""
        return self._extended(cache, past, ids, namespace, 1, inputs)[:, -1].float()

    def extend_scored(self, cache: Cache, row: Row, ids: list[int]) -> tuple[torch.Tensor, Scored]:
        """As `extend`, for a row that wants the logits behind all of them."""
        logits = self._extended(cache, row.length, ids, row.namespace, 0, {})[0]
        return logits[-1:].float(), Scored(row, row.length, logits)

    def _extended(
        self, cache: Cache, past: int, ids: list[int], namespace: str, keep: int, inputs: dict[str, Any]
    ) -> torch.Tensor:
        columns = torch.tensor([ids], device=self.device)
        positions = torch.arange(past, past + len(ids), device=self.device)[None]
        return self(columns, positions, cache, keep=keep, owners=[(namespace, len(ids))], **inputs)


@dataclass(frozen=True, slots=True)
class Room:
    """Memory for what requests keep, in bytes: each row needs ``per_row``, and each token of it ``per_column``."""

    total: int
    per_column: int
    per_row: int = 0

    def fits(self, rows: int, columns: int) -> bool:
        """Whether there is memory for so many rows with so many tokens in all."""
        return rows * self.per_row + columns * self.per_column <= self.total

    @property
    def columns(self) -> int:
        """Tokens that a single row may have."""
        left = self.total - self.per_row
        return left // self.per_column if self.per_column else (BOUNDLESS if left >= 0 else 0)


class Way(ABC):
    """How the rows of a step go through the model."""

    repeatable: bool
    """A pass that failed leaves its rows as they were, so that it can be tried again in smaller parts."""
    splits_prompts: bool
    """A prompt may be taken in in chunks."""
    shares_prefixes: bool
    """`load_prefix` and `save_prefix` do something."""

    def __init__(self, model: Model, room: Room) -> None:
        self.model = model
        self.room = room

    @abstractmethod
    def parts(self, decode: list[Row], chunks: list[Chunk]) -> list[Part]:
        """Splits a step into what goes through the model together."""

    @abstractmethod
    def run(self, part: Part) -> Result:
        """One forward pass. The lengths of its rows have grown by their tokens afterwards."""

    @abstractmethod
    def reserve(self, row: Row, columns: int, *, prompt: bool = False) -> bool:
        """Makes sure that a row has room for so many columns; False: there is none at present.

        Out of memory, it may raise whatever the library says then; all rows are as they were.

        Args:
            prompt: for a prompt that is not taken in whole by the next step.
        """

    @abstractmethod
    def release(self, row: Row) -> None:
        """Frees what a row has; it starts over if it comes again."""

    @abstractmethod
    def fork(self, row: Row, copy: Row) -> bool:
        """Gives ``copy`` the memory of a row whose prompt is in; False: there is no room."""

    def reset(self) -> None:  # noqa: B027
        """Gives back all memory that can be given back; needs none for it."""

    def load_prefix(self, row: Row, ids: list[int]) -> int:
        """Fills a row that has reserved room with a computed prefix of these tokens; returns how many.

        Does without if there is no memory for it, as does `save_prefix`.
        """
        return 0

    def save_prefix(self, row: Row, ids: list[int]) -> None:  # noqa: B027
        """Keeps the computed keys and values of these first tokens of a row."""


class RowByRow(Way):
    """A cache for each row, and a forward pass for each: right for whatever a model keeps in its cache."""

    repeatable = False
    splits_prompts = False
    shares_prefixes = False

    def __init__(self, model: Model, room: Room) -> None:
        super().__init__(model, room)
        self._rows = self._columns = 0

    def parts(self, decode: list[Row], chunks: list[Chunk]) -> list[Part]:
        return [Part([row], []) for row in decode] + [Part([], [chunk]) for chunk in chunks]

    def run(self, part: Part) -> Result:
        [row] = part.rows
        ids = part.chunks[0].ids if part.chunks else [row.last_id]
        kept: _Kept = row.memory
        scored = []
        if row.scored and part.chunks:
            logits, found = self.model.extend_scored(kept.cache, row, ids)
            scored.append(found)
        else:
            inputs = row.arguments(len(ids)) if part.chunks else {}
            logits = self.model.extend(kept.cache, row.length, ids, row.namespace, **inputs)
        row.length += len(ids)
        return Result([row], logits, scored)

    def reserve(self, row: Row, columns: int, *, prompt: bool = False) -> bool:
        new = row.memory is None
        more = columns if new else columns - row.memory.columns
        if more <= 0:
            return True
        if not self.room.fits(self._rows + new, self._columns + more):
            return False
        if new:
            row.memory = _Kept(self.model.new_cache(), 0)
            self._rows += 1
        row.memory.columns = columns
        self._columns += more
        return True

    def release(self, row: Row) -> None:
        if row.memory is not None:
            self._rows -= 1
            self._columns -= row.memory.columns
        row.memory, row.length = None, 0

    def fork(self, row: Row, copy: Row) -> bool:
        return False  # a cache of any kind has no copy: it takes the prompt in by itself


@dataclass(slots=True)
class _Kept:
    cache: DynamicCache
    columns: int
