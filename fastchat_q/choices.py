"""What may be chosen on the command line. Here, so that the command line need not import what it runs."""

from dataclasses import dataclass, fields
from typing import Literal

from .models import served_name

EngineName = Literal["transformers", "echo"]
Device = Literal["auto", "cpu", "cuda", "mps", "xpu", "npu"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Role = Literal["api", "worker", "orchestrator", "metrics", "admin"]
"""Kinds of process, and ``admin`` for people, that have a Redis user each."""
ServerVersion = Literal["6.2", "7.0"]
JobFilter = Literal["running", "queued", "delayed", "parked"]
"""Jobs that have not ended: ``queued`` is all that wait, ``delayed`` and ``parked`` are those that are not in line."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker is told on its command line."""

    model: str
    name: str | None
    engine: EngineName
    slots: int | None
    device: Device
    dtype: Dtype
    threads: int | None
    token_delay_ms: float

    @property
    def served_as(self) -> str:
        """The name clients use."""
        return self.name or served_name(self.model)

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        words: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return words


@dataclass(frozen=True, slots=True)
class DemandOptions:
    """Which further models a worker is told to serve, and when they come and go."""

    more: tuple[str, ...] = ()
    """Beside the one of `WorkerOptions`; each may be ``NAME=MODEL``."""
    on_demand: bool = False
    keep_alive: str = "5m"
    max_loaded: int = 1

    @property
    def applies(self) -> bool:
        """Whether models are loaded on demand."""
        return self.on_demand or bool(self.more)

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        words = [word for model in self.more for word in ("--model", model)]
        words += ["--on-demand"] if self.on_demand else []
        return [*words, "--keep-alive", self.keep_alive, "--max-loaded", str(self.max_loaded)]
