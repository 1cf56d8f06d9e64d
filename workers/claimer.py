"""The claim loop of a model: takes jobs while slots are free. A claim whose reply is lost is handed back first."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Set

import structlog
from redis.exceptions import ResponseError

from fastchat_q import keys
from fastchat_q.connection import TRANSIENT
from fastchat_q.loops import AWAY, PreemptedError, check_cancelled, unless
from fastchat_q.queue import Advice, Claim, Queue

from .slots import Slots
from .turns import Turns

log = structlog.get_logger()

IDLE_POLL_S = 1.0
"""How long an idle worker sleeps when no bell wakes it."""
RETRY_S = 0.5

Begin = Callable[[list[Claim], float], Awaitable[None]]
"""Gets the claims, and when the call that took them was sent (time.monotonic)."""


class Claimer:
    """Takes jobs of one model for a worker, which may have other ones beside it.

    Args:
        queue: must not resend by itself: a repeated CLAIM takes further jobs.
        bells: for blocking reads.
        lanes: tells the lane of each job that the worker runs, of whatever model.
        turns: shared by the models of the worker, as ``slots`` are.
        known: ids of all jobs that the worker still has a say in.
        ready: whether the engine takes further jobs at the moment.
        freed: set when a slot became free; cleared here.
    """

    def __init__(
        self,
        queue: Queue,
        bells: Queue,
        model: str,
        worker_id: str,
        slots: Slots,
        lanes: Callable[[], list[str]],
        turns: Turns,
        *,
        known: Callable[[], Set[str]],
        ready: Callable[[], bool],
        begin: Begin,
        freed: asyncio.Event,
        stopping: asyncio.Event,
    ) -> None:
        self._queue, self._bells = queue, bells
        self._model, self._id = model, worker_id
        self._slots, self._lanes, self._turns = slots, lanes, turns
        self._known, self._ready, self._begin = known, ready, begin
        self.freed, self._stopping = freed, stopping
        self._doubt = ""
        self._bell: asyncio.Task[bool] | None = None
        self._rung = False

    def doubt(self, why: str) -> None:
        """Jobs may be ours that the worker does not run: they are handed back before the next claim."""
        self._doubt = why

    async def settle(self) -> None:
        """Hands back what is in doubt; for a worker that claims nothing more."""
        with contextlib.suppress(*AWAY):  # what is left comes back when its lease runs out
            await self._disown_unknown()

    async def run(self) -> None:
        """Claims until the worker stops."""
        try:
            await self._run()
        finally:
            await self._leave_the_bell()

    async def _run(self) -> None:
        while not self._stopping.is_set():
            check_cancelled()
            try:
                await self._disown_unknown()
                self.freed.clear()
                async with self._turns.turn(self._model) as others:
                    offer = self._offer(others)
                    found = await self._claim(offer) if offer else None
                if found is None:
                    await self._leave_the_bell()  # what it rings for is for others
                    await self._slot_freed()
                else:
                    await self._pause(*found)
            except AWAY as error:
                log.warning("claim failed, trying again", error=str(error))
                self.doubt("claim reply lost")
                await asyncio.sleep(RETRY_S)
        await self.settle()

    def _offer(self, others: int) -> list[tuple[str, int]]:
        lanes = self._lanes()
        if keys.QUARANTINE in lanes or not self._turns.may_take(self._model) or not self._ready():  # suspects run alone
            return []
        return self._slots.offer(lanes, self._model, others)

    async def _claim(self, offer: list[tuple[str, int]]) -> tuple[Advice, bool, bool]:
        """Returns the queue's advice, whether slots are left, and whether jobs may wait that those are not for."""
        sent, most, self._rung = time.monotonic(), max(limit for _, limit in offer), False
        running = len(self._lanes())
        taken = await self._queue.claim(
            self._model,
            self._id,
            running=running,
            lanes=offer,
            nonce=secrets.token_hex(4),
            headroom=self._slots.headroom_beside(running, most),
        )
        if taken.advice is Advice.EMPTY_FIRST:
            self._turns.reserve(self._model)
        else:
            self._turns.free(self._model)
        await self._begin(taken.claims, sent)
        lanes = [claim.lane for claim in taken.claims]
        held_back = (
            taken.advice is Advice.KEPT
            or len(offer) < len(keys.LANES)
            or any(lanes.count(lane) == limit for lane, limit in offer)
        )
        return taken.advice, len(lanes) < most, held_back

    async def _pause(self, advice: Advice, hungry: bool, held_back: bool) -> None:
        if advice is Advice.EMPTY_FIRST:  # asking again now and then keeps the suspect waiting for us
            await self._slot_freed()
        elif advice is Advice.PAUSED:
            await self._or_stopping(asyncio.sleep(IDLE_POLL_S))
        elif hungry:
            await self._or_stopping(self._bell_or_slot() if held_back else self._bell_rings())

    async def _disown_unknown(self) -> None:
        """If there is doubt: hands back what a lost reply may have given us, and what we gave up while Redis was away.

        Twice, with a pause: a server that was frozen may run the CLAIM that waited on the old connection after the
        first call on the new one.
        """
        why, self._doubt = self._doubt, ""
        if not why:
            return
        for _ in range(2):
            try:
                back, _ = await self._queue.disown(self._model, self._id, why, crashed=False, known=self._known())
            except ResponseError as error:
                if isinstance(error, TRANSIENT):
                    raise
                log.error("cannot hand back: the leases will run out", why=why, error=str(error))
                return  # one damaged record must not keep this worker from all others
            if back:
                log.info("handed back jobs that are not run", jobs=back)
            await self._or_stopping(asyncio.sleep(RETRY_S))

    async def _bell_rings(self) -> None:
        """Waits for the bell. Who stops waiting does not end the blocking read: the next call goes on with it."""
        if self._bell is None:
            self._bell = asyncio.create_task(self._bells.wait(self._model, IDLE_POLL_S))
        await asyncio.wait({self._bell})
        bell, self._bell = self._bell, None
        self._rung = bell.result()

    async def _bell_or_slot(self) -> None:
        with contextlib.suppress(PreemptedError):
            await unless(self.freed.wait(), self._bell_rings())

    async def _leave_the_bell(self) -> None:
        if self._rung:  # another model took the slots meanwhile
            self._rung = False
            with contextlib.suppress(*AWAY):
                await self._queue.ring(self._model)
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.cancel()
            await asyncio.gather(bell, return_exceptions=True)

    async def _slot_freed(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_POLL_S):
                await self._or_stopping(self.freed.wait())

    async def _or_stopping(self, awaitable: Awaitable[object]) -> None:
        """Waits for ``awaitable`` or for the worker to stop, whichever comes first."""
        with contextlib.suppress(PreemptedError):
            await unless(self._stopping.wait(), awaitable)
