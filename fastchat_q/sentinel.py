"""Redis behind Sentinel: the URL, a pool of connections to the present master, and the check that they still are."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from redis import exceptions
from redis import sentinel as sync_sentinel
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection

from .addresses import without_password
from .errors import ConfigurationError
from .replies import NoReplicasError

SCHEME = "sentinel://"
PORT = 26379
FOLLOW_S = 2.0
"""How often a process asks whether its master is still the master: far below the 15 s after which a job that nobody
hears is cancelled."""
QUERY_OPTIONS = ("sentinel_username", "sentinel_password")
NOT_THE_MASTER = (exceptions.ReadOnlyError, exceptions.MasterDownError, NoReplicasError)
"""Replies of a server that was demoted, or of a master that was cut off and may have a successor by now."""


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """``sentinel://[user:password@]host:port[,host:port…]/service[/db][?sentinel_username=…&sentinel_password=…]``.

    User and password in front of the hosts are those of the Redis servers; the sentinels have their own.
    """

    hosts: tuple[tuple[str, int], ...]
    service: str
    db: int
    credentials: dict[str, str] = field(repr=False)
    sentinel_credentials: dict[str, str] = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> "SentinelUrl":
        """
        Raises:
            ConfigurationError: not such a URL.
        """
        try:
            return cls._parse(url)
        except ValueError as error:
            raise ConfigurationError(
                f"Redis URL {without_password(url)!r}: {error}. "
                "Expected sentinel://[user:password@]host:port[,host:port…]/service[/db]."
            ) from error

    @classmethod
    def _parse(cls, url: str) -> "SentinelUrl":
        rest, _, query = url.removeprefix(SCHEME).partition("?")
        authority, _, path = rest.partition("/")
        userinfo, _, hosts = authority.rpartition("@")
        user, _, password = userinfo.partition(":")
        service, _, db = path.partition("/")
        addresses = [urlsplit(f"//{host}") for host in hosts.split(",")]
        if not service or not all(address.hostname for address in addresses):
            raise ValueError("the sentinels or the name of the service are missing")
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
        unknown = sorted(options.keys() - set(QUERY_OPTIONS))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]}")
        return cls(
            hosts=tuple((address.hostname or "", address.port or PORT) for address in addresses),
            service=unquote(service),
            db=int(db or 0),
            credentials=_given(username=unquote(user), password=unquote(password)),
            sentinel_credentials=_given(**{name.removeprefix("sentinel_"): value for name, value in options.items()}),
        )


class MasterConnection(SentinelManagedConnection):
    """A connection to the master; it never stays on a server that is the master no longer."""

    async def connect_to(self, address: tuple[str, int]) -> None:
        """Connects, and asks the server itself: Sentinel may still name the one that it is just demoting."""
        await super().connect_to(address)  # type: ignore[no-untyped-call]
        await self.send_command("ROLE")
        role = await self.read_response()
        if role[0] not in (b"master", "master"):
            await self.disconnect()
            raise exceptions.ConnectionError(f"{address[0]}:{address[1]} is not the master any more")

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """A reply; those of `NOT_THE_MASTER` close the connection, so that Sentinel is asked again."""
        try:
            return await super().read_response(*args, **options)
        except NOT_THE_MASTER as error:
            await self.disconnect()
            raise exceptions.ConnectionError(f"the master cannot write: {error}") from error


class MasterPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the master that Sentinel names; a call beyond the size of the pool waits for one."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """Closes connections; all of them: those to the sentinels as well."""
        await super().disconnect(inuse_connections)
        if inuse_connections:
            for watcher in self.sentinel_manager.sentinels:
                await watcher.aclose()


def master_pool(url: str, connection_options: dict[str, Any]) -> MasterPool:
    """A pool for a sentinel URL, which connects when first used.

    Raises:
        ConfigurationError: not such a URL.
    """
    parsed = SentinelUrl.parse(url)
    to_sentinels = {
        name: connection_options[name] for name in ("protocol", "socket_connect_timeout", "socket_keepalive")
    }
    # A sentinel that does not answer must not keep us from asking the next one.
    to_sentinels |= {"socket_timeout": connection_options["socket_connect_timeout"], **parsed.sentinel_credentials}
    return MasterPool(
        parsed.service,
        Sentinel(parsed.hosts, sentinel_kwargs=to_sentinels),  # type: ignore[no-untyped-call]
        connection_class=MasterConnection,
        db=parsed.db,
        **parsed.credentials,
        **connection_options,
    )


async def follow_master(*clients: "Redis") -> None:
    """Drops the connections of clients whose master has a successor; does nothing for those without Sentinel.

    A master that was cut off from the sentinels, but not from us, goes on answering: a subscription there would be
    silent for ever.

    Raises:
        redis.RedisError: no sentinel knows a master at the moment.
    """
    for client in clients:
        pool = client.connection_pool
        if isinstance(pool, MasterPool) and pool.master_address is not None:
            before = pool.master_address
            if await pool.get_master_address() != before:  # type: ignore[no-untyped-call]
                await pool.disconnect()


def master_url(url: str) -> str:
    """The ``redis://`` URL of the present master, for programs that know nothing of Sentinel.

    Raises:
        ConfigurationError: not a sentinel URL.
        redis.RedisError: no sentinel knows a master.
    """
    parsed = SentinelUrl.parse(url)
    sentinels = sync_sentinel.Sentinel(  # type: ignore[no-untyped-call]
        parsed.hosts, sentinel_kwargs={"socket_timeout": 5.0, **parsed.sentinel_credentials}
    )
    host, port = sentinels.discover_master(parsed.service)  # type: ignore[no-untyped-call]
    user, password = (quote(parsed.credentials.get(name, ""), safe="") for name in ("username", "password"))
    userinfo = f"{user}:{password}@" if password else ""
    return f"redis://{userinfo}{f'[{host}]' if ':' in host else host}:{port}/{parsed.db}"


def _given(**values: str) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}
