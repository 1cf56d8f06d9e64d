"""The tools themselves: a fault test is worth what its fault is."""

import socket
import time
from collections.abc import Iterator

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.servers import RedisServer, pings, wait_until

from .proxy import FaultProxy, fault_proxy
from .resp import frame_end

PING = b"*1\r\n$4\r\nPING\r\n"


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[FaultProxy]:
    with fault_proxy(redis_server.socket) as running:
        yield running


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator["redis.Redis"]:
    """A client that sends nothing twice and waits two seconds."""
    with redis.Redis(port=proxy.port, socket_timeout=2, retry=Retry(NoBackoff(), 0), decode_responses=True) as one:
        one.flushall()
        yield one


@pytest.mark.parametrize(
    "frame",
    [b"+OK\r\n", b":-12\r\n", b"$-1\r\n", b"$0\r\n\r\n", b"$4\r\na\r\nb\r\n", b"*-1\r\n", b"*0\r\n",
     b"*2\r\n$1\r\na\r\n*1\r\n:5\r\n"],
)  # fmt: skip
def test_a_frame_ends_where_it_ends_and_is_incomplete_before(frame: bytes) -> None:
    assert frame_end(b"xx" + frame + b"+next\r\n", 2) == 2 + len(frame)
    assert [frame_end(frame[:cut]) for cut in range(len(frame))] == [None] * len(frame)


def test_what_is_no_resp_is_refused() -> None:
    with pytest.raises(ValueError, match="no RESP2"):
        frame_end(b"GET / HTTP/1.1\r\n")


def test_a_lost_reply_leaves_its_command_executed_and_the_rest_of_the_pipeline_unanswered(
    proxy: FaultProxy, client: "redis.Redis"
) -> None:
    loss = proxy.lose_reply(lambda frame: b"second" in frame)
    pipe = client.pipeline(transaction=False)
    for name in ("first", "second"):
        pipe.incr(name)
    with pytest.raises(redis.ConnectionError):
        pipe.execute()
    assert loss.happened.is_set()
    assert [client.get(name) for name in ("first", "second")] == ["1", "1"]
    assert client.incr("second") == 2, "one reply, not all"


def test_a_lost_message_is_the_one_that_matches(proxy: FaultProxy, client: "redis.Redis") -> None:
    with client.pubsub() as subscription:
        subscription.subscribe("c")
        subscription.get_message(timeout=5)
        loss = proxy.lose_messages(lambda frame: b"m2" in frame)
        for text in ("m1", "m2", "m3"):
            assert client.publish("c", text) == 1
        got = [subscription.get_message(timeout=5) for _ in range(2)]
    assert [message and message["data"] for message in got] == ["m1", "m3"]
    assert loss.happened.is_set()


def test_frozen_connections_and_new_ones_stay_open_and_silent_and_go_on(
    proxy: FaultProxy, client: "redis.Redis"
) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as old:
        old.sendall(PING)
        assert old.recv(100) == b"+PONG\r\n"
        with proxy.frozen() as count:
            assert count >= 1
            old.sendall(PING)
            with pytest.raises(redis.TimeoutError):
                client.ping()
        assert old.recv(100) == b"+PONG\r\n"
    assert client.ping()


def test_cut_closes_what_is_open_and_serves_what_comes(proxy: FaultProxy, client: "redis.Redis") -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as old:
        old.sendall(PING)
        assert old.recv(100) == b"+PONG\r\n"
        before = proxy.connections
        assert proxy.cut() >= 1
        assert old.recv(100) == b""
    wait_until(lambda: pings(client), "its old connection is closed too, and a new one serves it")
    assert proxy.connections == before + 1


def test_latency_and_bandwidth_are_switched_on_open_connections(proxy: FaultProxy, client: "redis.Redis") -> None:
    client.set("key", "x" * 2000)

    def took_s() -> float:
        began = time.monotonic()
        assert len(str(client.get("key"))) == 2000
        return time.monotonic() - began

    proxy.to_server.latency_s = 0.2
    assert took_s() >= 0.2
    proxy.to_server.latency_s, proxy.to_client.bytes_per_s = 0.0, 8000.0
    assert took_s() >= 0.2
    proxy.to_client.bytes_per_s = None
    assert min(took_s() for _ in range(5)) < 0.2
    assert proxy.to_client.carried > 4000
