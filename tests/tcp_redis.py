"""Redis servers on a TCP port, with users or with TLS, from whichever binaries this machine has."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import redis as sync_redis

from fastchat_q.embedded import server_binary, server_version

from .stack import free_port, wait_until


class ServerEndedError(Exception):
    """The server does not run with these options."""


class TcpRedis:
    """A server on loopback TCP; ``options`` are words of redis.conf, ``ca`` makes it speak nothing but TLS."""

    def __init__(self, binary: Path, folder: Path, *options: str, ca: Path | None = None) -> None:
        self.port = free_port()
        ports = ["--port", "0", "--tls-port", str(self.port)] if ca else ["--port", str(self.port)]
        command = [str(binary), *ports, "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"]
        self.log = folder / "redis.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
        query = f"?ssl_ca_certs={ca}" if ca else ""
        url = self.url(scheme="rediss" if ca else "redis", query=query)
        self.admin = sync_redis.Redis.from_url(url, decode_responses=True)
        try:
            wait_until(lambda: self.process.poll() is not None or self._answers(), "redis answers")
        except AssertionError:
            self.close()
            raise
        if self.process.poll() is not None:
            self.admin.close()
            raise ServerEndedError(self.log.read_text())

    def url(self, user: str = "", password: str = "", scheme: str = "redis", query: str = "") -> str:
        """The URL for a user."""
        credentials = f"{user}:{password}@" if user else ""
        return f"{scheme}://{credentials}localhost:{self.port}/0{query}"

    def close(self) -> None:
        """kill -9."""
        self.admin.close()
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        try:
            return bool(self.admin.ping())
        except (sync_redis.AuthenticationError, sync_redis.ResponseError):  # it wants a password
            return True
        except sync_redis.RedisError:
            return False


def binaries() -> list[Path]:
    """The embedded server, and another one on the PATH."""
    found = [server_binary()]
    other = shutil.which("redis-server")
    if other is not None and Path(other).resolve() != found[0].resolve():
        found.append(Path(other))
    return found


def name_of(binary: Path) -> str:
    """For the test's id."""
    return server_version(binary).replace(" ", "-")


def tls_server(folder: Path, ca: Path, certificate: Path) -> TcpRedis:
    """A server that speaks nothing but TLS; skips where no binary can, which in CI is a failure."""
    files = ["--tls-cert-file", certificate, "--tls-key-file", certificate, "--tls-ca-cert-file", ca]
    options = [*map(str, files), "--tls-auth-clients", "no"]
    for binary in binaries():
        try:
            return TcpRedis(binary, folder, *options, ca=ca)
        except ServerEndedError:
            continue
    reason = "no Redis server with TLS on this machine: install redis-server (the embedded one is built without TLS)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
