"""Clients that left: their jobs are cancelled, at once or after a grace in which they may come back."""

import asyncio
from collections.abc import Callable

import structlog
from redis.exceptions import RedisError

from fastchat_q.connection import TRANSIENT
from fastchat_q.loops import RECONNECT_S, check_cancelled
from fastchat_q.queue import Queue

log = structlog.get_logger()

REASON = "client disconnected"
AWAITED_S = 1.0
"""A grace that ends while a reader is being let in goes on for so long."""


class Departures:
    """Cancels what nobody reads any more. `run` must be running; nothing else here blocks."""

    def __init__(self, queue: Queue, inbox: str, awaited: Callable[[str], bool]) -> None:
        """``awaited``: whether a reader is about to come to a job, by its id."""
        self._queue = queue
        self._inbox = inbox
        self._awaited = awaited
        self._due: asyncio.Queue[tuple[str, str, bool]] = asyncio.Queue()
        self._graced: dict[str, asyncio.TimerHandle] = {}

    def at_once(self, model: str, job_id: str) -> None:
        """Cancels the job unless somebody else listens, or it is to go on with nobody listening."""
        self._due.put_nowait((model, job_id, False))

    def refused(self, model: str, job_id: str) -> None:
        """The same whatever its terms: it may have been accepted though its client was told the opposite.

        A client that asked again with its idempotency key, elsewhere, does listen.
        """
        self._due.put_nowait((model, job_id, True))

    def after(self, grace_s: float, model: str, job_id: str) -> None:
        """As `at_once`, in ``grace_s`` seconds, unless it is called off."""
        self.called_off(job_id)
        if grace_s <= 0:
            self.at_once(model, job_id)
            return
        loop = asyncio.get_running_loop()
        self._graced[job_id] = loop.call_later(grace_s, self._grace_over, model, job_id)

    def called_off(self, job_id: str) -> None:
        """The client is back."""
        timer = self._graced.pop(job_id, None)
        if timer is not None:
            timer.cancel()

    async def settled(self, timeout_s: float) -> None:
        """Returns when everything due is cancelled, or after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._due.join()
        except TimeoutError:
            log.warning("not all left jobs could be cancelled in time: they run to their end")

    async def run(self) -> None:
        """The loop, for ever."""
        while True:
            check_cancelled()
            model, job_id, refused = await self._due.get()
            while True:
                try:
                    before = await self._queue.cancel(model, job_id, REASON, leaving=self._inbox, refused=refused)
                    log.info("left", job=job_id, model=model, state=before)
                    break
                except TRANSIENT:
                    check_cancelled()
                    await asyncio.sleep(RECONNECT_S)
                except RedisError:  # trying again would not help, and keep the others waiting
                    log.exception("cannot cancel", job=job_id, model=model)
                    break
            self._due.task_done()

    def _grace_over(self, model: str, job_id: str) -> None:
        del self._graced[job_id]
        if self._awaited(job_id):  # it is told by then whether it may read the job
            self.after(AWAITED_S, model, job_id)
        else:
            self.at_once(model, job_id)
