"""Fetches images that messages name by https URL, for servers that allow it.

It must open no way into our own network: the name is resolved here, and every address of it must be public. The
connection goes to the very address that was checked, so that a name which resolves to another one a moment later gains
nothing. No redirects, no proxies, no cookies.
"""

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from fastchat_q.errors import InvalidRequestError
from fastchat_q.images import KINDS, media_type

FETCH_S = 10.0
"""An image must be here by then."""
PART_BYTES = 64 * 1024
MAX_AT_A_TIME = 16
"""Fetches of this process at a time; more wait for their turn."""
MAX_URL = 2048


class FetchError(Exception):
    """The image cannot be had. Says why in words for the client, and nothing of what a server in our network said."""


def is_public(address: str) -> bool:
    """Whether an address is one of the Internet: not loopback, private, link-local, multicast, reserved or mapped."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is None and found in NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(slots=True)
class Fetcher:
    """Fetches images. One for each process.

    Args:
        may_reach: which addresses it may connect to.
        tls: what certificates are checked against; None: the system's.
    """

    max_bytes: int
    timeout_s: float = FETCH_S
    may_reach: Callable[[str], bool] = is_public
    tls: ssl.SSLContext | None = None
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_AT_A_TIME))
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(MAX_AT_A_TIME, "images"))
    """Its own: a name server that does not answer holds a thread for longer than `timeout_s`."""

    async def fetch_all(self, named: Iterable[tuple[str, str]]) -> dict[str, bytes]:
        """The images of (URL, parameter) pairs, by URL.

        Raises:
            InvalidRequestError: one cannot be had; the parameter says which.
        """
        params = dict(reversed(list(named)))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {url: group.create_task(self._fetch_one(url, param)) for url, param in params.items()}
        except* InvalidRequestError as failed:
            first = failed.exceptions[0]
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None
        return {url: task.result() for url, task in tasks.items()}

    async def _fetch_one(self, url: str, param: str) -> bytes:
        fetch = _Fetch(self, url)
        try:
            async with self._turns, asyncio.timeout(self.timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, fetch.run)
        except TimeoutError:
            why = f"it did not come within {self.timeout_s:g} s"
        except FetchError as error:
            why = str(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = f"the connection failed ({type(error).__name__})"
        finally:
            fetch.abandon()
        raise InvalidRequestError(
            f"Invalid value for '{param}': The image at {url[:80]!r} cannot be fetched: {why}.",
            param=param,
            code="image_not_fetched",
        )


class _Fetch:
    """One fetch, on a thread of its own; `abandon` from another one ends it."""

    def __init__(self, fetcher: Fetcher, url: str) -> None:
        self._fetcher = fetcher
        self._url = url
        self._socket: socket.socket | None = None
        self._abandoned = False
        self._lock = threading.Lock()

    def run(self) -> bytes:
        parts = self._checked()
        assert parts.hostname is not None
        connection = http.client.HTTPSConnection(parts.hostname, parts.port or 443)
        try:
            connection.sock = self._connected(parts.hostname, parts.port or 443)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "fastchat-q"})
            return self._read(connection.getresponse())
        finally:
            connection.close()

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it is closed already
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _checked(self) -> SplitResult:
        if len(self._url) > MAX_URL:
            raise FetchError(f"the URL has {len(self._url)} characters, the limit is {MAX_URL}")
        if not self._url.isascii() or any(c <= " " or c == "\x7f" for c in self._url):
            raise FetchError("the URL has characters that URLs do not have")
        parts = urlsplit(self._url)
        if parts.scheme != "https" or not parts.hostname:
            raise FetchError("only https URLs are fetched")
        if parts.username is not None or parts.password is not None:
            raise FetchError("the URL has a user name in it")
        return parts

    def _connected(self, host: str, port: int) -> ssl.SSLSocket:
        timeout_s = self._fetcher.timeout_s
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise FetchError("its host is not known") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not addresses or not all(self._fetcher.may_reach(address) for address in addresses):
            raise FetchError("its host is not on the public Internet")
        plain = socket.create_connection((addresses[0], port), timeout_s)
        with self._lock:
            self._socket = plain
            if self._abandoned:
                plain.close()
                raise FetchError("it took too long")
        context = self._fetcher.tls or ssl.create_default_context()
        try:
            wrapped = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
        with self._lock:
            self._socket = wrapped
        return wrapped

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        limit = self._fetcher.max_bytes
        if 300 <= response.status < 400:
            raise FetchError("the server redirects, and redirects are not followed")
        if response.status != 200:
            raise FetchError(f"the server answers with status {response.status}")
        if (response.length or 0) > limit:
            raise FetchError(f"it has {response.length} bytes, the limit is {limit}")
        content = bytearray()
        while part := response.read(PART_BYTES):
            content += part
            if len(content) > limit:
                raise FetchError(f"it has more than {limit} bytes")
            if media_type(bytes(content[:16])) is None and len(content) >= 16:
                break
        if media_type(bytes(content[:16])) is None:
            raise FetchError(f"it is not {KINDS}")
        return bytes(content)
