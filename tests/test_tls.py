"""rediss://: the server's certificate and name are checked, and the whole path works over TLS."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from redis.exceptions import ConnectionError as RedisConnectionError

from fastchat_q.connection import connect

from .http_client import post
from .stack import API_KEY, Process, answers, free_port, wait_until
from .tcp_redis import TcpRedis, tls_server

HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello over TLS"}]}


@pytest.fixture
def authority(folder: Path) -> trustme.CA:
    """A CA of the test's own, whose certificate is ca.pem."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return authority


@pytest.fixture
def server(folder: Path, authority: trustme.CA) -> Iterator[TcpRedis]:
    """A TLS server whose certificate is for localhost alone."""
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    server = tls_server(folder, folder / "ca.pem", folder / "server.pem")
    yield server
    server.close()


def url(server: TcpRedis, folder: Path, ca: str = "ca.pem") -> str:
    return server.url(scheme="rediss", query=f"?ssl_ca_certs={folder / ca}")


async def test_a_certificate_of_the_given_authority_is_accepted(server: TcpRedis, folder: Path) -> None:
    async with connect(url(server, folder)) as redis:
        assert await redis.ping()
    async with connect(url(server, folder), blocking=True) as redis:
        assert await redis.ping()


async def test_an_unknown_authority_is_refused(server: TcpRedis, folder: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(folder / "other.pem"))
    for given in (server.url(scheme="rediss"), url(server, folder, "other.pem")):
        async with connect(given) as redis:
            with pytest.raises(RedisConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
                await redis.ping()


async def test_a_certificate_for_another_name_is_refused(server: TcpRedis, folder: Path) -> None:
    async with connect(url(server, folder).replace("localhost", "127.0.0.1")) as redis:
        with pytest.raises(RedisConnectionError, match=r"CERTIFICATE_VERIFY_FAILED.*mismatch"):
            await redis.ping()


def test_a_chat_goes_through_tls_from_end_to_end(server: TcpRedis, folder: Path) -> None:
    port, environment = free_port(), {"FASTCHAT_Q_REDIS_URL": url(server, folder), "FASTCHAT_Q_STATE_DIR": str(folder)}
    api = Process(folder / "api.log", "serve", "--port", str(port), FASTCHAT_Q_API_KEY=API_KEY, **environment)
    worker = Process(folder / "worker.log", "worker", "--engine", "echo", "--model", "echo", **environment)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), "the stack is ready", 60)
        reply = post(port, HELLO)
        assert reply.status == 200
        assert reply.json()["choices"][0]["message"]["content"] == "hello over TLS"
    finally:
        api.kill()
        worker.kill()
