"""The rule that keeps a server without keys off the network."""

import ipaddress

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
