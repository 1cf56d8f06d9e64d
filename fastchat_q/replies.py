"""Error replies of a server as exceptions of their own, where redis-py knows only a text. It sends nothing again."""

import re

from redis.asyncio.connection import DefaultParser
from redis.exceptions import ClusterDownError, MasterDownError, ResponseError, TryAgainError

IN_SCRIPT = re.compile(r"^ERR Error running script .*?: -([A-Z]+ .*)$", re.DOTALL)
"""How a server before Redis 7 wraps the error of a command that a script called."""


class NoReplicasError(ResponseError):
    """Fewer replicas are connected than ``min-replicas-to-write`` asks for: the master takes no writes."""


class ReplyParser(DefaultParser):  # type: ignore[misc, valid-type]
    """redis-py's parser, which also knows the errors of failovers and of cluster mode."""

    EXCEPTION_CLASSES = {  # noqa: RUF012  redis-py's own declaration
        **DefaultParser.EXCEPTION_CLASSES,
        "CLUSTERDOWN": ClusterDownError,
        "MASTERDOWN": MasterDownError,
        "NOREPLICAS": NoReplicasError,
        "TRYAGAIN": TryAgainError,
    }

    @classmethod
    def parse_error(cls, response: str) -> ResponseError:
        """The exception for an error reply."""
        wrapped = IN_SCRIPT.match(response)
        error: ResponseError = super().parse_error(wrapped[1] if wrapped else response)
        return error
