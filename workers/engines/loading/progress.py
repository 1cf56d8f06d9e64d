"""How far a load has come: a bar on a terminal, log lines elsewhere, and a callback for whoever wants to publish it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import structlog
from huggingface_hub.utils.tqdm import tqdm as hub_bar
from transformers.utils import logging as transformers_logging

log = structlog.get_logger()

Phase = Literal["download", "load"]
OnProgress = Callable[[float, Phase], None]
"""Is told the fraction of a phase that is done, 0.0 to 1.0: once per percent, and between them that it gets on."""

LOG_EVERY_S = 5.0


class Progress:
    """The progress of one load. Any thread may report; the callback runs on that thread."""

    def __init__(self, model: str, on_progress: OnProgress | None = None, *, terminal: bool | None = None) -> None:
        self._model = model
        self._tell = on_progress or (lambda fraction, phase: None)
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._last: tuple[Phase, int] | None = None
        self._done, self._told_at = 0.0, 0.0
        self._logged = time.monotonic()

    def report(self, phase: Phase, done: float, total: float) -> None:
        """``done`` of ``total``, in bytes or tensors."""
        fraction = min(1.0, done / total) if total > 0 else 1.0
        step = (phase, int(fraction * 100))
        now = time.monotonic()
        if step == self._last:
            if done != self._done and now - self._told_at >= LOG_EVERY_S:  # a percent of a large model takes minutes
                self._done, self._told_at = done, now
                self._tell(fraction, phase)
            return
        self._last, self._done, self._told_at = step, done, now
        self._tell(fraction, phase)
        if not self._terminal and (now - self._logged >= LOG_EVERY_S or fraction == 1.0):
            self._logged = now
            log.info("loading", model=self._model, phase=phase, percent=step[1])

    def bars(self, total_bytes: int) -> type[Any]:
        """A class for huggingface_hub's bars that reports the bytes of a whole download."""
        progress = self

        class Bar(hub_bar):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(  # type: ignore[no-untyped-call]
                    *args, **options | {"disable": not progress._terminal}
                )
                self._bytes = options.get("unit") == "B"
                self._done = float(options.get("initial", 0))

            def update(self, n: float | None = 1) -> bool | None:
                if self._bytes:
                    self._done += n or 0
                    progress.report("download", self._done, total_bytes)
                return super().update(n)  # type: ignore[no-any-return]

        return Bar

    @contextmanager
    def of_weights(self) -> Iterator[None]:
        """While inside, what transformers loads is reported; its own bar is drawn on a terminal alone."""

        def hook(factory: Any, args: Any, options: Any) -> Any:
            if not str(options.get("desc", "")).startswith("Loading"):
                return factory(*args, **options)
            bar = factory(*args, **options | ({} if self._terminal else {"disable": True}))
            total = options.get("total") or (len(args[0]) if args and hasattr(args[0], "__len__") else 0)
            return _Counted(bar, lambda done: self.report("load", done, total))

        before = transformers_logging.set_tqdm_hook(hook)
        try:
            yield
        finally:
            transformers_logging.set_tqdm_hook(before)


class _Counted:
    """A bar of transformers' whose steps are counted."""

    def __init__(self, bar: Any, tell: Callable[[int], None]) -> None:
        self._bar = bar
        self._tell = tell

    def __iter__(self) -> Iterator[Any]:
        for done, item in enumerate(self._bar, 1):
            yield item
            self._tell(done)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
