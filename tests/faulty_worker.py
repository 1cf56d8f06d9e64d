"""Workers with an engine that fails on command, as processes: ``python -m tests.faulty_worker URL MODEL FLAGS…``.

A job whose question holds one of the words below triggers it.
"""

import os
import signal
import sys
import threading
import time

from fastchat_q.workers import parent
from fastchat_q.workers.engine_process import EngineProcess
from fastchat_q.workers.engines.base import OUT_OF_MEMORY, Output, Request
from fastchat_q.workers.engines.echo import EchoEngine
from fastchat_q.workers.main import serve
from fastchat_q.workers.worker import Limits

from fastchat_q import logs
from fastchat_q.errors import RetryableError
from fastchat_q.registry import ModelCard

POISON = "poison"
HANG = "hang"
FORGET = "forget"
LARGE = "large"
"""It does not fit beside another one."""


class FaultyEngine(EchoEngine):
    """An echo engine with the faults of real ones."""

    def __init__(self, name: str, slots: int, token_delay_s: float) -> None:
        super().__init__(name, slots, token_delay_s)
        self._hang = False

    def admit(self, request: Request) -> None:
        question = request.job.messages[-1].text
        if POISON in question:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in question and not request.prior:
            self._hang = True
        if LARGE in question and self._jobs:
            raise RetryableError("no room beside the others", code=OUT_OF_MEMORY)
        super().admit(request)
        if FORGET in question and not request.prior:
            self.drop(request.ticket)

    def step(self) -> list[Output]:
        outputs = super().step()
        if self._hang and outputs:
            self._hang = False
            self._sink_now(outputs)
            threading.Event().wait()
        return outputs

    def _sink_now(self, outputs: list[Output]) -> None:
        assert self._sink is not None
        self._sink(outputs)
        time.sleep(0.2)  # until they are sent, so that the next try knows


def main() -> None:
    """With ``--id ID`` the engine's process, else its supervisor."""
    url, model, stall_s, *rest = sys.argv[1:]
    logs.configure()
    if rest:
        limits = Limits(drain_s=5, stall_s=float(stall_s))
        serve(FaultyEngine(model, 4, 0.005), limits, url, rest[1])
        return
    command = [sys.executable, "-m", "tests.faulty_worker", url, model, stall_s]
    card = ModelCard(model, "faulty", None, int(time.time()))
    parent.run(EngineProcess(lambda run_id: [*command, "--id", run_id], {}, card, 4, 5, float(stall_s)), url)


if __name__ == "__main__":
    main()
