"""A worker's process in the chaos run: the product's command line, whose echo engine is the chaos engine."""

import os
from dataclasses import replace

from fastchat_q.workers import parent
from fastchat_q.workers.engines import echo

from fastchat_q import cli

from . import mutants
from .engine import ChaosEngine

MUTANT = "CHAOS_MUTANT"
"""Environment variable: the mutation to apply, if any."""
MODULES = {cli.__name__: __spec__.name}
"""What a supervisor is to start in the place of the command line: this."""

supervise = parent.run


def main() -> None:
    """``python -m tests.chaos.worker worker --engine echo …``"""
    echo.EchoEngine = ChaosEngine  # type: ignore[misc, assignment]
    parent.run = supervise_this
    mutant = os.environ.get(MUTANT)
    if mutant:
        mutants.apply(mutant)
    cli.main()


def supervise_this(engine: parent.EngineProcess, redis_url: str) -> None:
    """The product's supervisor, over an engine's process of this module."""

    def command(worker_id: str) -> list[str]:
        return [MODULES.get(word, word) for word in engine.command(worker_id)]

    supervise(replace(engine, command=command), redis_url)


if __name__ == "__main__":
    main()
