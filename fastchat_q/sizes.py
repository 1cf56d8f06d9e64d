"""Amounts of memory, as people write and read them."""

import re

from .errors import ConfigurationError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def in_words(count: int) -> str:
    """``1.2 GiB``; what is smaller than a tenth of one in MiB or KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit / 10:
            return f"{count / unit:.2f} {name}"
    return f"{count / 2**10:.1f} KiB"


def parse_bytes(text: str, option: str) -> int:
    """``20GiB``, ``800 MB`` or plain bytes. Raises ConfigurationError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigurationError(f"{option} {text!r} is no amount of memory: write it as 20GiB, 800MB or in bytes.")
    return int(float(match[1]) * UNITS[(match[2] or "").upper()])
