"""A Redis URL becomes a client. Every option that versions of redis-py set differently is set here, explicitly."""

from typing import Any

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from .errors import ConfigurationError

SCHEMES = ("redis://", "rediss://", "unix://")
COMMAND_TIMEOUT_S = 10.0
RESENT = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError)
"""What redis-py itself tries again, a few times."""
TRANSIENT = (*RESENT, OSError)
"""What may pass by itself (a restart, a failover): worth sending again. Any other error of Redis is an answer."""


def connect(url: str, *, blocking: bool = False, max_connections: int = 32) -> "Redis":
    """A client that speaks bytes and connects when first used.

    Commands are sent again after a lost connection. That is safe: a repeated script finds its own work; only a CLAIM
    takes further jobs, and those of the lost reply come back when their lease runs out.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix:///path``.
        blocking: for pub/sub and blocking reads: no read timeout and no resending.
        max_connections: size of the pool; a call beyond it waits for a connection.

    Raises:
        ConfigurationError: the URL has another scheme.
    """
    if not url.startswith(SCHEMES):
        raise ConfigurationError(f"Redis URL {url!r}: expected one of {', '.join(SCHEMES)}.")
    options: dict[str, Any] = {
        "protocol": 2,
        "decode_responses": False,
        "max_connections": max_connections,
        "timeout": COMMAND_TIMEOUT_S,
        "socket_connect_timeout": 5.0,
        "socket_timeout": None if blocking else COMMAND_TIMEOUT_S,
        "health_check_interval": 0,
    }
    if not url.startswith("unix://"):
        options["socket_keepalive"] = True
    if not blocking:
        options["retry"] = Retry(ExponentialBackoff(cap=0.5, base=0.02), 3)
        options["retry_on_error"] = list(RESENT)
    try:
        return Redis.from_pool(BlockingConnectionPool.from_url(url, **options))
    except ValueError as error:
        raise ConfigurationError(f"Redis URL {url!r}: {error}.") from error
