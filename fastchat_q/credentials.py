"""The API key of a state directory: made once, kept in a file that only its owner reads."""

import os
import secrets
from pathlib import Path

KEY_FILE = "api_key"


def new_api_key() -> str:
    """A 256-bit key."""
    return f"sk-fcq-{secrets.token_urlsafe(32)}"


def load_or_create_api_key(state_dir: Path) -> tuple[str, bool]:
    """The key of ``state_dir`` and whether it was made just now. Two processes that start at once get the same one."""
    path = state_dir / KEY_FILE
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{KEY_FILE}.{os.getpid()}")
    write_api_key(draft, new_api_key())
    try:
        os.link(draft, path)  # unlike a rename, fails if somebody was faster
        created = True
    except FileExistsError:
        created = False
    finally:
        draft.unlink()
    return path.read_text().strip(), created


def write_api_key(path: Path, key: str) -> None:
    """Writes a key file with mode 0600, whatever the umask and whatever was there."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key + "\n")
