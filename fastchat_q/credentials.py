"""The secrets of a state directory: made once, kept in files that only their owner reads."""

import os
import secrets
from pathlib import Path

from .errors import ConfigurationError
from .settings import Settings

KEY_FILE = "api_key"
PEPPER_FILE = "key_pepper"
KEY_PREFIX = "sk-fcq-"
MIN_PEPPER = 32
"""Characters; ``openssl rand -hex 16`` has as many."""


def new_secret() -> str:
    """256 bits from the operating system, in 43 characters that need no quoting anywhere."""
    return secrets.token_urlsafe(32)


def new_api_key() -> str:
    """A 256-bit key."""
    return KEY_PREFIX + new_secret()


def load_or_create_api_key(state_dir: Path) -> tuple[str, bool]:
    """The key of ``state_dir`` and whether it was made just now. Two processes that start at once get the same one."""
    return _load_or_create(state_dir / KEY_FILE, new_api_key())


def load_or_create_pepper(settings: Settings) -> str:
    """The pepper of the settings or of the state directory: without it the stored digests of API keys say nothing.

    Raises:
        ConfigurationError: it is too short, or cannot be kept.
    """
    if settings.key_pepper is None:
        try:
            return _load_or_create(settings.state_dir / PEPPER_FILE, new_secret())[0]
        except OSError as error:
            raise ConfigurationError(
                f"The pepper of the API keys cannot be kept in {settings.state_dir} ({error.strerror}). "
                "Choose another --state-dir, or set FASTCHAT_Q_KEY_PEPPER."
            ) from error
    pepper = settings.key_pepper.get_secret_value().strip()
    if len(pepper) < MIN_PEPPER:
        raise ConfigurationError(
            f"FASTCHAT_Q_KEY_PEPPER has {len(pepper)} characters and needs {MIN_PEPPER}: try openssl rand -hex 32"
        )
    return pepper


def write_secret(path: Path, secret: str) -> None:
    """Writes a file with mode 0600, whatever the umask and whatever was there."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")


def _load_or_create(path: Path, secret: str) -> tuple[str, bool]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():  # also where the folder may only be read
        return path.read_text().strip(), False
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    write_secret(draft, secret)
    try:
        os.link(draft, path)  # unlike a rename, fails if somebody was faster
        created = True
    except FileExistsError:
        created = False
    finally:
        draft.unlink()
    return path.read_text().strip(), created
