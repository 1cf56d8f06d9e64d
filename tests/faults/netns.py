"""A network namespace of the test's own, for partitions that nobody is told of: packets are dropped, both ways.

A pair of virtual interfaces joins it to the machine. Redis gets an address on our end of the pair (CONFIG SET, at run
time), a process under test runs inside, and `partition` drops Redis' packets inside. The machine's own interfaces and
firewall are never touched. Needs root, ``ip`` and ``iptables``; `unavailable` says what is missing.
"""

import itertools
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from tests.stack import RedisServer, free_port

_numbers = itertools.count()
TRIES = 20


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace that is up."""

    name: str
    outside: str
    """Address of our end of the pair."""
    inside: str
    """Address of its end."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command starts with to run inside."""
        return ("ip", "netns", "exec", self.name)

    def serve_redis(self, server: RedisServer) -> str:
        """Makes a server listen on our end too, and returns its URL for processes inside."""
        port = free_port()
        with server.client() as client:
            client.config_set("protected-mode", "no")  # only this machine and the namespace reach the address
            client.config_set("bind", self.outside)
            client.config_set("port", port)
        return f"redis://{self.outside}:{port}/0"

    @contextmanager
    def partitioned(self, url: str) -> Iterator[None]:
        """Drops all packets from and to the Redis of `serve_redis`, silently."""
        port = url.rpartition(":")[2].partition("/")[0]
        rules = [("INPUT", "--sport", port), ("OUTPUT", "--dport", port)]
        try:
            for chain, which, number in rules:
                _run(*self.prefix, "iptables", "-A", chain, "-p", "tcp", which, number, "-j", "DROP")
            yield
        finally:
            _run(*self.prefix, "iptables", "-F")


@contextmanager
def namespace() -> Iterator[Namespace]:
    """A namespace with an address pair that nobody else uses; all of it is gone afterwards, whatever happened."""
    tag = f"{os.getpid():x}{next(_numbers):x}"
    name, ours, theirs = f"fq{tag}", f"fqo{tag}", f"fqi{tag}"
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        outside, inside = _addresses()
        _run("ip", "address", "add", f"{outside}/30", "dev", ours)
        _run("ip", "link", "set", ours, "up")
        _run("ip", "-n", name, "address", "add", f"{inside}/30", "dev", theirs)
        _run("ip", "-n", name, "link", "set", theirs, "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        yield Namespace(name, outside, inside)
    finally:
        subprocess.run(["ip", "link", "delete", ours], capture_output=True, check=False)  # takes its peer along
        _run("ip", "netns", "delete", name)


@cache
def unavailable() -> str | None:
    """Why there are no namespaces here; None: there are. Found by making one."""
    try:
        with namespace() as space:
            _run(*space.prefix, "iptables", "-L", "-n")
    except (OSError, RuntimeError) as error:
        return f"network namespaces need root, ip and iptables: {error}"
    return None


def _addresses() -> tuple[str, str]:
    """Two addresses of a /30 in 10.64.0.0/10 that no route of this machine covers."""
    routes = _run("ip", "-4", "-o", "route", "show", "table", "all")
    for _ in range(TRIES):
        net = f"10.{random.randint(64, 127)}.{random.randint(0, 255)}"
        low = random.randrange(0, 256, 4)
        if f"{net}." not in routes:
            return f"{net}.{low + 1}", f"{net}.{low + 2}"
    raise RuntimeError("no free address pair in 10.64.0.0/10")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
