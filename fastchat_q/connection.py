"""A Redis URL becomes a client. Every option that versions of redis-py set differently is set here, explicitly."""

import os
from typing import Any

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from . import sentinel
from .addresses import without_password
from .errors import ConfigurationError
from .replies import NoReplicasError, ReplyParser

SCHEMES = ("redis://", "rediss://", "unix://", sentinel.SCHEME)
COMMAND_TIMEOUT_S = 10.0
RESENT = (
    exceptions.ConnectionError,  # BusyLoadingError is one of them
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,  # MasterDownError is one of them
    exceptions.TryAgainError,
    NoReplicasError,
)
"""What redis-py itself tries again, a few times, on a new connection."""
TRANSIENT = (*RESENT, OSError)
"""What may pass by itself (a restart, a failover): worth sending again. Any other error of Redis is an answer."""


def connect(
    url: str,
    *,
    blocking: bool = False,
    resend: bool = True,
    timeout_s: float = COMMAND_TIMEOUT_S,
    max_connections: int = 32,
) -> "Redis":
    """A client that speaks bytes and connects when first used.

    Commands are sent again after a lost connection. That is safe: a repeated script finds its own work; only a CLAIM
    takes further jobs.

    Args:
        url: ``redis://``, ``rediss://``, ``unix:///path``, or ``sentinel://`` (see `sentinel.SentinelUrl`). With
            ``rediss://`` the server's certificate and name are checked; ``?ssl_ca_certs=FILE`` names a CA of one's own,
            ``ssl_certfile`` and ``ssl_keyfile`` a client certificate.
        blocking: for pub/sub and blocking reads: no read timeout and no resending.
        resend: False: a command whose reply is lost raises, and the caller knows that it may have been executed.
        timeout_s: bound on waiting for a reply.
        max_connections: size of the pool; a call beyond it waits for a connection.

    Raises:
        ConfigurationError: the URL has another scheme, or cannot be read.
    """
    if not url.startswith(SCHEMES):
        raise ConfigurationError(f"Redis URL {without_password(url)!r}: expected one of {', '.join(SCHEMES)}.")
    options: dict[str, Any] = {
        "protocol": 2,
        "parser_class": ReplyParser,
        "decode_responses": False,
        "max_connections": max_connections,
        "timeout": COMMAND_TIMEOUT_S,
        "socket_connect_timeout": 5.0,
        "socket_timeout": None if blocking else timeout_s,
        "health_check_interval": 0,
    }
    if not url.startswith("unix://"):
        options["socket_keepalive"] = True
    if url.startswith("rediss://"):
        options |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
    if resend and not blocking:
        options["retry"] = Retry(ExponentialBackoff(cap=0.5, base=0.02), 3)
        options["retry_on_error"] = list(RESENT)
    if url.startswith(sentinel.SCHEME):
        return Redis.from_pool(sentinel.master_pool(url, options))
    try:
        pool = BlockingConnectionPool.from_url(url, **options)
        made = pool.make_connection()  # type: ignore[no-untyped-call]  # it connects later, but refuses options that do not exist now
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"Redis URL {without_password(url)!r}: {error}.") from error
    _check_files(url, made)
    return Redis.from_pool(pool)


def _check_files(url: str, made: AbstractConnection) -> None:
    """Raises ConfigurationError for a certificate that is not there: connecting would only fail, and not say why."""
    context = getattr(made, "ssl_context", None)
    for option in ("ca_certs", "certfile", "keyfile"):
        path = getattr(context, option, None)
        if path and not os.path.exists(path):
            raise ConfigurationError(f"Redis URL {without_password(url)!r}: ssl_{option} {path}: no such file.")
