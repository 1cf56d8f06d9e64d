"""What the loops of processes are made of: do a thing every so often, listen for ever, wait unless interrupted."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

log = structlog.get_logger()
S = TypeVar("S")
T = TypeVar("T")

AWAY = (RedisError, OSError)
"""What a Redis call raises while the server is away or restarts."""
AT_A_TIME = 16
RECONNECT_S = 0.2
PULSE_S = 3.0
"""A subscription must answer a ping within this time."""


def check_cancelled() -> None:
    """Ends the current task if it was cancelled and something swallowed that; loops call it after Redis commands.

    redis-py looks whether a connection has data under ``asyncio.timeout(0)``. A cancellation that arrives in the same
    turn of the event loop is taken for that timeout (seen with redis-py 5.3 on Python 3.11), and a stop would hang.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class PreemptedError(Exception):
    """What was waited for is no longer wanted."""


async def unless(interruption: Awaitable[object], work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if ``interruption`` comes first.

    Raises:
        PreemptedError: it did.
    """
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(interruption)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise PreemptedError
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def each(items: Sequence[S], work: Callable[[S], Awaitable[T]]) -> Sequence[T]:
    """Does ``work`` with each item, a few at a time, in order; what one raises comes out when those few have ended."""
    done: list[T] = []
    for start in range(0, len(items), AT_A_TIME):
        some = await asyncio.gather(*(work(item) for item in items[start : start + AT_A_TIME]), return_exceptions=True)
        for one in some:
            if isinstance(one, BaseException):
                raise one
            done.append(one)
    return done


async def every(period_s: float, action: Callable[[], Awaitable[object]], what: str) -> None:
    """Runs ``action`` now and then every ``period_s`` (± 10 %, so that processes do not march in step), for ever.

    Redis being away is logged once and waited out; any other error ends the loop, and so its owner.
    """
    away = False
    while True:
        try:
            await action()
            if away:
                log.info("redis is back", loop=what)
            away = False
        except AWAY as error:
            if not away:
                log.warning("redis is away", loop=what, error=str(error))
            away = True
        check_cancelled()
        await asyncio.sleep(period_s * random.uniform(0.9, 1.1))


async def listen(redis: "Redis", channel: str) -> AsyncIterator[bytes | None]:
    """Messages of a channel, for ever, through lost connections.

    Yields None whenever the subscription has just (again) been confirmed: whatever was published before may be missed.
    ``redis`` must be a blocking client.
    """
    while True:
        pubsub = redis.pubsub()
        pulse = _Pulse(pubsub)
        try:
            await pubsub.subscribe(channel)
            pulse.start()
            while True:
                message = await pubsub.get_message(timeout=None)
                pulse.beat()
                check_cancelled()
                if message is None:
                    continue
                if message["type"] == "subscribe":
                    yield None
                elif message["type"] == "message":
                    yield message["data"]
        except AWAY as error:
            check_cancelled()
            log.warning("subscription lost", channel=channel, error=str(error))
            await asyncio.sleep(RECONNECT_S)
        finally:
            await pulse.stop()
            await pubsub.aclose()  # type: ignore[no-untyped-call]


class _Pulse:
    """Notices a subscription that is half-open: it is asked for a sign of life, and cut off if none comes.

    A reader of its own timeout would cost each message a timer; this costs a ping every few seconds.
    """

    def __init__(self, pubsub: PubSub) -> None:
        self._pubsub = pubsub
        self._beats = self._seen = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on silence is noticed."""
        self._task = asyncio.create_task(self._watch())

    def beat(self) -> None:
        """Something came."""
        self._beats += 1

    async def stop(self) -> None:
        """Ends the watch."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            self._seen = self._beats
            with contextlib.suppress(*AWAY):  # the reader finds out by itself
                await self._pubsub.ping()
            await asyncio.sleep(PULSE_S)
            connection = self._pubsub.connection
            if self._beats == self._seen and connection is not None:
                log.warning("subscription is silent, cutting it off", seconds=PULSE_S)
                await connection.disconnect(nowait=True)
