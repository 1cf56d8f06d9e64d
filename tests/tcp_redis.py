"""Redis servers on a TCP port, with users or with TLS."""

import subprocess
from pathlib import Path

import redis as sync_redis

from .servers import KINDS, free_port, wait_until


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
            raise RuntimeError(f"{binary} does not run: {self.log.read_text()}")

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


def tls_server(folder: Path, ca: Path, certificate: Path) -> TcpRedis:
    """A server that speaks nothing but TLS: Debian's, for the embedded one is built without."""
    files = ["--tls-cert-file", certificate, "--tls-key-file", certificate, "--tls-ca-cert-file", ca]
    return TcpRedis(KINDS["redis-7"].binary(), folder, *map(str, files), "--tls-auth-clients", "no", ca=ca)
