"""The address a server listens on: whether it may, and whether it can."""

import ipaddress
import re
import socket

from .errors import ConfigurationError
from .settings import Settings


def check_exposure(settings: Settings) -> None:
    """Refuses to listen beyond loopback without keys.

    Raises:
        ConfigurationError: authentication is off on an address that others can reach.
    """
    if not settings.auth and not is_loopback(settings.host):
        raise ConfigurationError(
            f"--no-auth on {settings.host}: anybody who reaches this address could use the server. "
            "Keep the keys on, or bind to 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def http_base(host: str, port: int) -> str:
    """``http://host:port``, with the brackets that an IPv6 address needs in a URL."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_port_free(host: str, port: int) -> None:
    """Fails early, and clearly, when somebody listens there already.

    Raises:
        ConfigurationError: the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot listen on {host}:{port} ({error.strerror}). Choose another --port."
        ) from error


def without_password(url: str) -> str:
    """The URL as it may be shown and logged."""
    return re.sub(r"([?&]\w*password=)[^&]*", r"\1***", re.sub(r"(://[^:/@?]*):[^?]*@", r"\1:***@", url))
