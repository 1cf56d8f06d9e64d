"""Fixtures: a Redis server for each test session, clean for each test; whole stacks of real processes."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastchat_q.workers.active import Links
from redis.asyncio import Redis

from fastchat_q.connection import connect

from .http_client import Connection
from .servers import RedisServer
from .stack import Stack, running_stack


@pytest.fixture(autouse=True)
def hang_up() -> Iterator[None]:
    """Closes the raw connections that a test leaves open."""
    yield
    while Connection.all_open:
        Connection.all_open.pop().close()


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder with a path short enough for unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="fq"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server(short_folder: Path) -> Iterator[RedisServer]:
    """The session's server for tests that talk to Redis directly."""
    folder = short_folder / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    yield server
    server.close()


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator["Redis"]:
    """A client of an empty server."""
    client = connect(redis_server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def blocking_redis(redis_server: RedisServer) -> AsyncIterator["Redis"]:
    """A client for blocking reads and subscriptions on the same server."""
    client = connect(redis_server.url, blocking=True)
    yield client
    await client.aclose()


@pytest.fixture
async def links(redis_server: RedisServer) -> AsyncIterator[Links]:
    """A worker's clients on the same server."""
    clients = Links.to(redis_server.url)
    yield clients
    await clients.aclose()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short-pathed folder of the test's own."""
    path = Path(tempfile.mkdtemp(prefix="fq"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def stack(folder: Path) -> Iterator[Stack]:
    """A stack of the test's own, with no worker: for tests that kill things."""
    with running_stack(folder) as running:
        yield running


@pytest.fixture(scope="module")
def echo_stack() -> Iterator[Stack]:
    """A shared stack with an echo worker (model ``echo``, 64 slots, 5 ms a token); tests leave it running and idle."""
    with shared_stack("--model", "echo", "--engine", "echo", "--token-delay-ms", "5") as running:
        yield running


@pytest.fixture(scope="module")
def scripted_stack() -> Iterator[Stack]:
    """A shared stack whose workers say what a request tells them to: models ``script``, ``embedder`` and ``ranker``."""
    path = Path(tempfile.mkdtemp(prefix="fq"))
    with running_stack(path) as running:
        for model, kind in (("script", "chat"), ("embedder", "embed"), ("ranker", "rerank")):
            running.start_scripted_worker(model, kind)
        yield running
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def tiny_stack() -> Iterator[Stack]:
    """A shared stack with the built-in model, 64 slots; tests leave it running and idle."""
    with shared_stack("--model", "tiny", "--slots", "64", "--threads", "1") as running:
        yield running


@contextmanager
def shared_stack(*worker_flags: str) -> Iterator[Stack]:
    path = Path(tempfile.mkdtemp(prefix="fq"))
    with running_stack(path) as running:
        running.start_worker(*worker_flags)
        yield running
    shutil.rmtree(path, ignore_errors=True)
