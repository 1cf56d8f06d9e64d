"""The safetensors files of a folder, by their headers: what they hold, and whether they are whole."""

import json
import math
from pathlib import Path
from typing import Any

from fastchat_q.errors import ConfigurationError

INDEX = "model.safetensors.index.json"


def stored_bytes(source: str, folder: Path) -> tuple[int, int] | None:
    """(elements, bytes) of all tensors; None without any file of that kind.

    Raises:
        ConfigurationError: one of them is damaged or missing; the message names it.
    """
    files = weight_files(source, folder)
    count = size = 0
    for path in files:
        header = read_header(source, path)
        for name, entry in header.items():
            if name != "__metadata__":
                count += math.prod(entry["shape"])
                size += entry["data_offsets"][1] - entry["data_offsets"][0]
    return (count, size) if files else None


def weight_files(source: str, folder: Path) -> list[Path]:
    """The files that transformers reads: those of the index, or else the one."""
    index = folder / INDEX
    if not index.exists():
        one = folder / "model.safetensors"
        return [one] if one.exists() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise ConfigurationError(f"Model {source!r} cannot be loaded: its {INDEX} is broken: {error}") from error
    if missing := [name for name in names if not (folder / name).exists()]:
        raise ConfigurationError(
            f"Model {source!r} cannot be loaded: {len(missing)} of its {len(names)} shards are not there, such as "
            f"{missing[0]}. Download it again."
        )
    return [folder / name for name in names]


def read_header(source: str, path: Path) -> dict[str, Any]:
    """What a file says of its tensors. https://github.com/huggingface/safetensors#format

    Raises:
        ConfigurationError: it is no such file, or shorter than it says.
    """
    there = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version"):
            raise _damaged(source, path, "is a Git LFS pointer, not the weights; run `git lfs pull` there")
        if len(start) < 8 or length > there - 8:
            raise _damaged(source, path, "has no whole header")
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(source, path, f"has a broken header ({error})") from error
    if there < (whole := 8 + length + end):
        raise _damaged(source, path, f"is cut short: {there:,} of {whole:,} bytes")
    return dict(header)


def _damaged(source: str, path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(f"Model {source!r} cannot be loaded: {path.name} {why}. Download it again.")
