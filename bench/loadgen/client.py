"""Connections and slots: one request in flight in each slot, until all are sent."""

import asyncio
import time
from collections.abc import Sequence
from typing import cast

from .answers import Answer, ExactAnswer, PeerAnswer, StreamAnswer, WholeAnswer
from .config import SERIAL, Config, build_request, parse_target
from .cpu import CpuClock
from .framing import BadAnswerError, Framing
from .report import Report, Tally

CONNECTS_AT_ONCE = 64  # fewer than the usual listen backlog of 100, which would drop SYNs and cost a second each
WATCH_EVERY_S = 0.1


async def run(config: Config) -> Report:
    """Send `config.requests` requests, `config.concurrency` at a time, and measure them.

    Failed requests are counted, not raised. Raises ConfigError for a configuration that makes no run.
    """
    load = Load(config)
    try:
        clients = await _open_connections(load)
        cpu, started_s = CpuClock(config.pids), time.perf_counter()
        await _drive(load, clients)
        return load.tally.report(config, load.tally.last_end_s - started_s, cpu.used_s())
    finally:
        await load.close()


class Load:
    """The state that one run's connections share: the requests left to send, and the tally."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.target = parse_target(config.base_url)
        self._request = build_request(config, self.target)
        self._numbered = SERIAL.encode() in self._request
        self.tally = Tally()
        self.left = config.requests
        self.clients: set[Client] = set()

    def next_request(self) -> bytes:
        """Takes one of the requests that are left."""
        self.left -= 1
        return self._request.replace(SERIAL.encode(), b"%08d" % self.left) if self._numbered else self._request

    async def connect(self) -> "Client":
        """Open a connection. Raises OSError (TimeoutError is one)."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.config.timeout_s):
            _, client = await loop.create_connection(lambda: Client(self), self.target.host, self.target.port)
        return client

    async def close(self) -> None:
        """Drop every connection, and wait until they are closed."""
        clients = list(self.clients)
        for client in clients:
            client.transport.abort()
        await asyncio.gather(*(client.closed.wait() for client in clients))


class Client(asyncio.Protocol):
    """One keep-alive connection with one request in flight; an ended answer sends the next request at once."""

    transport: asyncio.Transport

    def __init__(self, load: Load) -> None:
        self.closed = asyncio.Event()
        self._load = load
        self._sent_at_s = 0.0
        self._busy = False
        self._framing = Framing()
        self._answer: Answer | None = None  # until its head is here

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._load.clients.add(self)

    def send_next(self) -> None:
        """Send a request if one is left, else close."""
        if self.transport.is_closing():
            return
        if not self._load.left:
            self.transport.close()
            return
        request = self._load.next_request()
        self._framing.start()
        self._answer = None
        self._busy = True
        self._sent_at_s = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if not self._busy:  # nothing was asked
            self.transport.abort()
            return
        try:
            self._feed(data, now_s)
        except BadAnswerError as error:
            self._fail(str(error), now_s)

    def _feed(self, data: bytes, now_s: float) -> None:
        framing = self._framing
        body = framing.feed(data)
        if self._answer is None:
            if not framing.status:
                return
            self._answer = self._awaited(framing.status)
        if body:
            self._answer.feed(body, now_s)
        if framing.done:
            self._answer.end()
            self._busy = False
            self._load.tally.add_ok(self._answer, self._sent_at_s, now_s)
            if framing.keep_alive:
                self.send_next()
            else:
                self.transport.close()

    def _awaited(self, status: int) -> Answer:
        config = self._load.config
        if status != 200 or not config.stream:
            return WholeAnswer(status)
        if config.peer:
            return PeerAnswer(config.max_tokens)
        return StreamAnswer() if config.expected is None else ExactAnswer(config.expected)

    def _fail(self, text: str, now_s: float) -> None:
        """Count the request in flight as failed, and drop the connection: who knows what else is to come on it."""
        self._busy = False
        self._load.tally.add_failed(text, now_s)
        self.transport.abort()

    def expire(self, now_s: float) -> None:
        """Fail the request in flight if it ran past its time."""
        if self._busy and now_s - self._sent_at_s > self._load.config.timeout_s:
            self._fail(f"no whole answer within {self._load.config.timeout_s:g} s, {self._so_far()}", now_s)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._busy:
            why = f" ({type(exc).__name__}: {exc})" if exc else ""
            self._fail(f"closed before the answer ended, {self._so_far()}{why}", time.perf_counter())
        self._load.clients.discard(self)
        self.closed.set()

    def _so_far(self) -> str:
        return f"after {self._answer.content_events} content events" if self._answer else "before its head"


async def _open_connections(load: Load) -> list[Client | None]:
    """One connection a slot, opened before the clock starts; None where that failed (the slot tries once more)."""
    count = min(load.config.concurrency, load.config.requests)
    clients: list[Client | None] = []
    while len(clients) < count:
        batch = min(CONNECTS_AT_ONCE, count - len(clients))
        clients += await asyncio.gather(*(_connect(load) for _ in range(batch)))
    return clients


async def _connect(load: Load) -> Client | None:
    try:
        return await load.connect()
    except OSError:
        return None


async def _drive(load: Load, clients: Sequence[Client | None]) -> None:
    """Run every slot to its end, under the watch."""
    async with asyncio.TaskGroup() as group:
        watch = group.create_task(_watch(load))
        await asyncio.wait([group.create_task(_slot(load, client)) for client in clients])
        watch.cancel()


async def _slot(load: Load, client: Client | None) -> None:
    """Keep one request in flight, over as many connections as that takes; when none can be had, fail it and end."""
    while load.left:
        try:
            client = client or await load.connect()
        except OSError as error:
            if load.left:
                load.left -= 1
                load.tally.add_failed(f"connect: {type(error).__name__}: {error}", time.perf_counter())
            return
        client.send_next()
        await client.closed.wait()
        client = None


async def _watch(load: Load) -> None:
    """Fail late requests."""
    while True:
        await asyncio.sleep(WATCH_EVERY_S)
        now_s = time.perf_counter()
        for client in list(load.clients):
            client.expire(now_s)
