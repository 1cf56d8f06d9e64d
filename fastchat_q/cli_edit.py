"""Changing a dead job's spec, in the person's editor or from a file. A bad edit is refused, and its text is kept."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import typer

from .cli_common import EXIT_FAILED, fail, say
from .cli_jobs import decoded
from .errors import InvalidRequestError
from .operations import edited_spec


def validated(before: bytes, text: str) -> str:
    """The spec to store instead of ``before``; a bad one ends the command."""
    try:
        return edited_spec(before, text)
    except InvalidRequestError as error:
        fail(f"The spec is refused: {error.message} Nothing was changed.", EXIT_FAILED)


def edited(public_id: str, before: bytes) -> tuple[str, Path]:
    """Opens the spec in the editor until it is a job, or until the person gives up; returns it and the file it is in.

    The file is readable by its owner alone. It is left behind when the command ends here: no text is lost.
    """
    spec = decoded(before)
    original = spec if isinstance(spec, str) else json.dumps(spec, indent=2, ensure_ascii=False) + "\n"
    handle, name = tempfile.mkstemp(prefix=f"{public_id}-", suffix=".json")
    path = Path(name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(original)
    while True:
        _open_editor(path)
        text = path.read_text(encoding="utf-8", errors="backslashreplace")
        if text == original:
            path.unlink()
            fail(
                "Nothing was changed in the editor, so the job was not retried. "
                f"As it is: fastchat-q dead retry {public_id}"
            )
        try:
            return edited_spec(before, text), path
        except InvalidRequestError as error:
            say(f"fastchat-q: The spec is refused: {error.message}")
        if not (sys.stdin.isatty() and typer.confirm("Edit it again?", default=True, err=True)):
            fail(
                f"Nothing was changed. Your text is in {path}. "
                f"Mend it, then: fastchat-q dead retry {public_id} --spec {path}"
            )


def _open_editor(path: Path) -> None:
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        done = subprocess.run([*shlex.split(command), str(path)], check=False).returncode
    except (OSError, ValueError) as error:
        path.unlink()
        fail(f"The editor {command!r} cannot be started: {error}. Set EDITOR, or give a file with --spec.")
    if done != 0:
        fail(f"The editor {command!r} ended with {done}: nothing was changed. Your text is in {path}.")
