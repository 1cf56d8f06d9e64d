"""A TCP proxy on loopback whose faults a test switches while connections are open.

It runs on an event loop in a thread of its own; its methods are called from the test's thread and act on open
connections too. In front of Redis it reads RESP2 frames, so that it can lose exactly one reply or one published
message. It is no tool for measuring: it copies in Python.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .resp import frame_end, is_message

READ_SIZE = 64 * 1024
SLICE_S = 0.05
"""A direction with a limit writes what it may write in this time, then sleeps it."""

Match = Callable[[bytes], bool]
Upstream = Path | tuple[str, int]
"""A unix socket, or host and port."""


@dataclass(slots=True)
class Direction:
    """One direction of all connections: its toxics, which may be set at any time, and what it has carried."""

    latency_s: float = 0.0
    """Added to every read, in order."""
    bytes_per_s: float | None = None
    """None: as fast as it goes."""
    carried: int = 0
    """Bytes so far."""


@dataclass(slots=True)
class Loss:
    """An armed loss: of the reply to the next request, or of the next messages, that ``match``."""

    match: Match
    left: int = 1
    happened: threading.Event = field(default_factory=threading.Event)
    """Set when the last of it is lost."""

    def takes(self, frame: bytes) -> bool:
        """Whether this frame is one of them; counts it."""
        if self.left == 0 or not self.match(frame):
            return False
        self.left -= 1
        return True


class _Link:
    """One connection of a client, and its connection to the server."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        self.pumps: list[asyncio.Future[None]] = []
        self.flowing = asyncio.Event()
        self.subscribed = False
        self.requests = self.replies = 0
        self.doomed: tuple[int, Loss] | None = None
        """The number of the request whose reply is swallowed."""

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class FaultProxy:
    """Listens on a free port of 127.0.0.1. Made by `fault_proxy`, which starts and ends it."""

    def __init__(self, upstream: Upstream, *, resp: bool, receive_buffer: int | None) -> None:
        self.to_server, self.to_client = Direction(), Direction()
        self.connections = 0
        """Accepted so far."""
        self.port = 0
        self._upstream, self._resp, self._receive_buffer = upstream, resp, receive_buffer
        self._links: set[_Link] = set()
        self._frozen = False
        self._replies: list[Loss] = []
        self._messages: list[Loss] = []
        self._loop = asyncio.new_event_loop()

    @property
    def url(self) -> str:
        """This proxy as a Redis URL."""
        return f"redis://127.0.0.1:{self.port}/0"

    @contextmanager
    def frozen(self, *, subscriptions_only: bool = False) -> Iterator[int]:
        """Half-open for a while: nothing passes, not even an end, and nobody is told; then all that waited passes.

        New connections are accepted, and frozen too. With ``subscriptions_only`` it is only those connections that
        have subscribed by now, and no new one. Yields how many connections there were.
        """

        def freeze() -> int:
            self._frozen = not subscriptions_only
            chosen = [link for link in self._links if link.subscribed or not subscriptions_only]
            for link in chosen:
                link.flowing.clear()
            return len(chosen)

        def thaw() -> int:
            self._frozen = False
            for link in self._links:
                link.flowing.set()
            return len(self._links)

        try:
            yield self._call(freeze)
        finally:
            self._call(thaw)

    def cut(self) -> int:
        """Closes all open connections, both sides; returns how many. New ones are served."""

        def close() -> int:
            for link in self._links:
                link.close()
            return len(self._links)

        return self._call(close)

    def redirect(self, upstream: Upstream) -> None:
        """From now on new connections go elsewhere; those that are open are cut."""
        self._upstream = upstream
        self.cut()

    def lose_reply(self, match: Match) -> Loss:
        """The next request that matches is executed, its reply is swallowed, then its connection is cut."""
        return self._arm(self._replies, Loss(match))

    def lose_messages(self, match: Match, count: int = 1) -> Loss:
        """The next ``count`` published messages that match never arrive; their connection stays."""
        return self._arm(self._messages, Loss(match, count))

    def _arm(self, losses: list[Loss], loss: Loss) -> Loss:
        if not self._resp:
            raise ValueError("only a proxy in front of Redis knows replies and messages")
        losses.append(loss)
        return loss

    def _call(self, act: Callable[[], int]) -> int:
        """Runs ``act`` on the loop and waits for its result."""

        async def on_loop() -> int:
            return act()

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(10)

    # ---- on the loop

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._upstream, Path):
            return await asyncio.open_unix_connection(self._upstream)
        upstream = socket.socket()
        upstream.setblocking(False)
        if self._receive_buffer is not None:  # before connecting: it decides the window
            upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        await self._loop.sock_connect(upstream, self._upstream)
        return await asyncio.open_connection(sock=upstream, limit=self._receive_buffer or READ_SIZE)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            server_reader, server_writer = await self._connect()
        except OSError:
            writer.close()
            return
        link = _Link(writer, server_writer)
        if not self._frozen:
            link.flowing.set()
        self._links.add(link)
        link.pumps = [
            asyncio.ensure_future(self._pump(link, reader, server_writer, self.to_server, self._request)),
            asyncio.ensure_future(self._pump(link, server_reader, writer, self.to_client, self._reply)),
        ]
        try:
            await asyncio.wait(link.pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            link.close()
            for pump in link.pumps:
                pump.cancel()
            await asyncio.gather(*link.pumps, return_exceptions=True)

    async def _pump(
        self,
        link: _Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: Direction,
        passes: Callable[[_Link, bytes], bool],
    ) -> None:
        with contextlib.suppress(OSError):
            async for part in self._parts(reader, direction):
                await link.flowing.wait()
                if self._resp and not passes(link, part):
                    continue
                await _write(writer, part, direction)
            await link.flowing.wait()

    async def _parts(self, reader: asyncio.StreamReader, direction: Direction) -> AsyncIterator[bytes]:
        """Frames in front of Redis, else whatever was read."""
        buffer = bytearray()
        while part := await reader.read(READ_SIZE if direction.bytes_per_s is None else 1024):
            if direction.latency_s:
                await asyncio.sleep(direction.latency_s)
            if not self._resp:
                yield part
                continue
            buffer += part
            while (end := frame_end(buffer)) is not None:
                yield bytes(buffer[:end])
                del buffer[:end]

    def _request(self, link: _Link, frame: bytes) -> bool:
        link.requests += 1
        link.subscribed = link.subscribed or b"SUBSCRIBE\r\n" in frame[:40]
        for loss in self._replies:
            if link.doomed is None and loss.takes(frame):
                link.doomed = link.requests, loss
        return True

    def _reply(self, link: _Link, frame: bytes) -> bool:
        if is_message(frame):
            for loss in self._messages:
                if loss.takes(frame):
                    if loss.left == 0:
                        loss.happened.set()
                    return False
            return True
        link.replies += 1
        if link.doomed is None or link.replies < link.doomed[0]:
            return True
        link.close()
        link.doomed[1].happened.set()
        return False


async def _write(writer: asyncio.StreamWriter, part: bytes, direction: Direction) -> None:
    at = 0
    while at < len(part):
        limit = direction.bytes_per_s
        size = len(part) if limit is None else max(1, round(limit * SLICE_S))
        piece = part[at : at + size]
        writer.write(piece)
        await writer.drain()
        at += len(piece)
        direction.carried += len(piece)
        if limit is not None:
            await asyncio.sleep(len(piece) / limit)


@contextmanager
def fault_proxy(upstream: Upstream, *, resp: bool = True, receive_buffer: int | None = None) -> Iterator[FaultProxy]:
    """A proxy in front of ``upstream``.

    Args:
        upstream: a unix socket, or host and port.
        resp: the upstream is Redis; False: bytes that are not looked at, such as HTTP.
        receive_buffer: bytes that the proxy itself may hold back from the server's writes (about), so that a slow
            client is slow for the server too. None: what the kernel likes, which is megabytes.
    """
    proxy = FaultProxy(upstream, resp=resp, receive_buffer=receive_buffer)
    started: threading.Event = threading.Event()

    async def serve(stop: asyncio.Event) -> None:
        server = await asyncio.start_server(proxy._accept, "127.0.0.1", 0)
        proxy.port = server.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        server.close()
        for link in proxy._links:
            for pump in link.pumps:
                pump.cancel()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    stop = asyncio.Event()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: proxy._loop) as runner:
            runner.run(serve(stop))

    thread = threading.Thread(target=run, name="fault proxy")
    thread.start()
    try:
        assert started.wait(10), "the proxy does not start"
        yield proxy
    finally:
        proxy._loop.call_soon_threadsafe(stop.set)
        thread.join(10)
