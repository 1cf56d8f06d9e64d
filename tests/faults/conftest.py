"""Fixtures of the fault tests."""

from collections.abc import Iterator

import pytest

from tests.http_client import get
from tests.stack import Stack, wait_until
from tests.streams import echo_worker, second_api

from .proxy import FaultProxy, fault_proxy


@pytest.fixture
def behind_proxy(stack: Stack) -> Iterator[tuple[FaultProxy, int]]:
    """A proxy before Redis and the port of an API server behind it, ready; the worker has no proxy."""
    with fault_proxy(stack.server.socket) as proxy:
        port = second_api(stack, FASTCHAT_Q_REDIS_URL=proxy.url)
        echo_worker(stack)
        wait_until(lambda: get(port, "/readyz").status == 200, "ready")
        yield proxy, port
