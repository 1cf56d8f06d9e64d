"""A network namespace of the test's own, for partitions that nobody is told of: packets are dropped, both ways.

A pair of virtual interfaces joins it to the machine, with two networks on it: one for Redis, which gets an address on
our end (CONFIG SET, at run time), and one for all else. A process under test runs inside. `partitioned` gives both ends
of Redis' network a wrong hardware address for each other: the kernel drops what comes in for somebody else, and neither
sender is told. The machine's own interfaces and firewall are never touched. Needs root and ``ip``; `unavailable` says
what is missing.
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
NOBODY = "02:00:00:00:00:01"


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace that is up."""

    name: str
    links: tuple[str, str]
    """The interfaces: ours, and the one inside."""
    redis: tuple[str, str]
    """The addresses of Redis' network: ours, and the one inside."""
    address: str
    """Where processes inside are reached, partition or not."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command starts with to run inside."""
        return ("ip", "netns", "exec", self.name)

    def serve_redis(self, server: RedisServer) -> str:
        """Makes a server listen on our end too, and returns its URL for processes inside."""
        port = server.port or free_port()
        with server.client() as client:
            client.config_set("protected-mode", "no")  # only this machine and the namespace reach the address
            client.config_set("bind", f"127.0.0.1 {self.redis[0]}")
            if not server.port:
                client.config_set("port", port)
        return f"redis://{self.redis[0]}:{port}/0"

    @contextmanager
    def partitioned(self) -> Iterator[None]:
        """Drops all packets from and to the Redis of `serve_redis`, silently."""
        (ours, theirs), (outside, inside) = self.links, self.redis
        ends = (("ip", "neighbour"), inside, ours), (("ip", "-n", self.name, "neighbour"), outside, theirs)
        try:
            for command, address, link in ends:
                _run(*command, "replace", address, "lladdr", NOBODY, "dev", link, "nud", "permanent")
            yield
        finally:
            for command, address, link in ends:
                _run(*command, "delete", address, "dev", link)


@contextmanager
def namespace() -> Iterator[Namespace]:
    """A namespace with an address pair that nobody else uses; all of it is gone afterwards, whatever happened."""
    tag = f"{os.getpid():x}{next(_numbers):x}"
    name, ours, theirs = f"fq{tag}", f"fqo{tag}", f"fqi{tag}"
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        _run("ip", "link", "set", ours, "up")
        _run("ip", "-n", name, "link", "set", theirs, "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        redis, (_, address) = (_add_network(name, ours, theirs) for _ in range(2))
        yield Namespace(name, (ours, theirs), redis, address)
    finally:
        subprocess.run(["ip", "link", "delete", ours], capture_output=True, check=False)  # takes its peer along
        _run("ip", "netns", "delete", name)


@cache
def unavailable() -> str | None:
    """Why there are no namespaces here; None: there are. Found by making one."""
    try:
        with namespace() as space, space.partitioned():
            pass
    except (OSError, RuntimeError) as error:
        return f"network namespaces need root and ip: {error}"
    return None


def _add_network(name: str, ours: str, theirs: str) -> tuple[str, str]:
    """Gives both ends of a pair an address in a network of their own: (ours, theirs)."""
    outside, inside = _addresses()
    _run("ip", "address", "add", f"{outside}/30", "dev", ours)
    _run("ip", "-n", name, "address", "add", f"{inside}/30", "dev", theirs)
    return outside, inside


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
