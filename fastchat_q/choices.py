"""What may be chosen on the command line. Here, so that the command line need not import what it runs."""

from dataclasses import dataclass, fields
from typing import Literal

EngineName = Literal["transformers", "echo", "vllm"]
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
    engine_arg: tuple[str, ...] = ()
    """Of vLLM's own options, as ``key=value``."""

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        words: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None:
                    words += [f"--{field.name.replace('_', '-')}", str(one)]
        return words
