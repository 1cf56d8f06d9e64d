"""Names of models: what ``--model`` takes, and what clients call it."""

from pathlib import Path

BUILTIN = ("tiny",)
"""Models inside the package."""


def named(words: str) -> tuple[str | None, str]:
    """(name, model) of ``NAME=MODEL``, or of a model alone."""
    name, equals, source = words.partition("=")
    return (name, source) if equals and name and source and not Path(words).exists() else (None, words)


def served_name(source: str) -> str:
    """The public name of a model when none is given: a hub id as it is, a folder or a GGUF file by its last part."""
    path = Path(source)
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if source not in BUILTIN and path.is_dir() else source
