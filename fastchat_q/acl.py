"""Redis users: what each role of process may touch, as the rules of Redis's ACL. It only writes rules, it sets none.

Rules name data types rather than single commands, because every key is confined by a pattern. Left out on purpose is
what looks beyond those patterns (KEYS, SCAN, RANDOMKEY) or at the server itself (CONFIG, FLUSHALL, DEBUG, MONITOR).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from . import keys
from .choices import Role, ServerVersion

ROLES: tuple[Role, ...] = get_args(Role)
USER_PREFIX = "fq-"

CONNECTION = ("+@connection", "-@dangerous")
DATA = ("+@hash", "+@sortedset", "+@list", "+@string", "+@set", "+@stream")
KEYSPACE = (
    "+del", "+unlink", "+exists", "+type", "+expire", "+expireat", "+pexpire", "+pexpireat", "+persist", "+ttl", "+pttl"
)  # fmt: skip
SCRIPTS = ("+evalsha", "+script|load", "+time")
CHANNELS = ("+subscribe", "+unsubscribe", "+publish")
PROCESS = ("+@transaction", *DATA, *KEYSPACE, *SCRIPTS, *CHANNELS, *CONNECTION)
"""What our own processes do. ``-@dangerous`` comes last: it takes out SORT, CLIENT KILL and their like again."""
LOOK = ("+xlen", "+xpending", "+xinfo|stream", "+xinfo|groups", "+xinfo|consumers", "+zcard", "+zcount", "+zscore")
READ = ("+zrange", "+zrangebyscore", "+llen", "+hlen", "+hget", "+hmget", "+hgetall", "+get")
READ_KEYSPACE = ("+exists", "+type", "+ttl", "+pttl")


@dataclass(frozen=True, slots=True)
class Rules:
    """What a role may touch: key patterns to write and to read only, channels, commands."""

    write: Sequence[str]
    read: Sequence[str]
    channels: Sequence[str]
    commands: Sequence[str]


EVENTS = (keys.inbox("*"), keys.worker_channel("*"))
JOBS = f"{keys.EVERY_MODEL.prefix}*"
REGISTRY = (keys.worker("*"), keys.WORKERS, keys.MODELS)

RULES: dict[Role, Rules] = {
    "api": Rules(
        write=(
            *(JOBS, keys.api_server("*"), keys.idempotent_model("*", "*")),
            *(keys.rate_limit("*"), keys.token_use("*"), keys.EVERY_FILE_KEY, keys.EVERY_BATCH_KEY),
        ),
        read=(*REGISTRY, keys.ALIASES, keys.api_key("*"), keys.API_KEYS, keys.PEPPER),
        channels=EVENTS,
        commands=(*PROCESS, "+info"),  # it looks whether Redis keeps what it accepts
    ),
    "worker": Rules(write=(JOBS, *REGISTRY), read=(), channels=EVENTS, commands=PROCESS),
    "orchestrator": Rules(
        write=(
            JOBS,
            keys.ORCHESTRATOR_QUEUE,
            keys.ORCHESTRATOR_HEALTH,
            f"{keys.ORCHESTRATOR_JOBS}*",
            *(keys.rate_limit("*"), keys.token_use("*"), keys.EVERY_FILE_KEY, keys.EVERY_BATCH_KEY),
        ),
        read=(*REGISTRY, keys.ALIASES),
        channels=EVENTS,
        commands=(*PROCESS, "+info", "+dbsize"),  # arq logs both when it starts
    ),
    "metrics": Rules(
        write=(),
        read=(*keys.EVERY_MODEL.sizes, *REGISTRY, keys.api_server("*"), keys.ORCHESTRATOR_HEALTH),
        channels=(),
        commands=(*LOOK, *READ, *READ_KEYSPACE, *CONNECTION, "+info", "+dbsize"),
    ),
    "admin": Rules(write=("*",), read=(), channels=("*",), commands=("+@all",)),
}
"""``admin`` is no process: it is whoever runs ``fastchat-q key`` and ``fastchat-q redis``."""


@dataclass(frozen=True, slots=True)
class User:
    """One Redis user of a role."""

    role: Role
    password: str

    @property
    def name(self) -> str:
        """The user's name in Redis."""
        return f"{USER_PREFIX}{self.role}"

    def rules(self, *, version: ServerVersion, hashed: bool) -> str:
        """The rule string, which begins from nothing.

        Args:
            version: the oldest server it is for. Before 7.0 there are no read-only key patterns (``%R~``): there, what
                a role should only read it can also write.
            hashed: with the password's SHA-256 instead of the password.
        """
        rules = RULES[self.role]
        secret = f"#{hashlib.sha256(self.password.encode()).hexdigest()}" if hashed else f">{self.password}"
        read_only = "~" if version == "6.2" else "%R~"
        return " ".join(
            (
                "reset", "on", secret, "resetchannels",
                *(f"~{pattern}" for pattern in rules.write),
                *(f"{read_only}{pattern}" for pattern in rules.read),
                *(f"&{pattern}" for pattern in rules.channels),
                "-@all", *rules.commands,
            )
        )  # fmt: skip
