"""What a server can do, found by asking it: forks and managed services say little with their version numbers."""

from redis import exceptions
from redis.asyncio import Redis

from .errors import ConfigurationError


async def has_command(redis: "Redis", name: str) -> bool:
    """Whether the server has a command, such as ``waitaof``: ``COMMAND INFO`` knows nothing of those it lacks."""
    [entry] = await redis.execute_command("COMMAND INFO", name)  # type: ignore[no-untyped-call]
    return bool(entry)


async def check_orchestrator_redis(redis: "Redis") -> None:
    """arq changes keys of several hash slots in one transaction, which no server in cluster mode takes.

    Raises:
        ConfigurationError: this server is in cluster mode.
    """
    if (await redis.info("cluster")).get("cluster_enabled"):
        raise ConfigurationError(
            "This Redis is in cluster mode, where the orchestrator cannot keep its own queue: name another server for "
            "that with FASTCHAT_Q_ORCHESTRATOR_REDIS_URL."
        )


async def check_streams(redis: "Redis", stream: str) -> None:
    """Asks for the newest thing that the queue needs: ranges that exclude their start, which came with Redis 6.2.

    Raises:
        ConfigurationError: the server does not know them.
    """
    try:
        await redis.xrange(stream, min="(0-0", count=1)
    except exceptions.ResponseError as error:
        raise ConfigurationError(
            f"This server is too old for fastchat-q, which needs Redis 6.2 or later, or Valkey ({error})."
        ) from error
