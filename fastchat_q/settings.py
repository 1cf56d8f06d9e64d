"""Settings that more than one process reads: flag over environment (``FASTCHAT_Q_*``) over default."""

import hashlib
import os
import tempfile
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

MAX_SOCKET_PATH = 100  # bytes; sun_path holds 104 on macOS and 108 on Linux


def default_state_dir() -> Path:
    """``$XDG_STATE_HOME/fastchat-q``, by default ``~/.local/state/fastchat-q``."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "fastchat-q"


class Settings(BaseSettings):
    """Everything that can be set, with its default. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix="FASTCHAT_Q_", env_ignore_empty=True, extra="forbid")

    state_dir: Path = Field(default_factory=default_state_dir)
    """The embedded server's data, the API key, logs."""
    redis_url: str | None = None
    """None: the embedded server if one runs in the state directory, else redis://127.0.0.1:6379/0."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    auth: bool = True
    """Ask for a bearer key. Can only be switched off on a loopback address."""
    api_key: SecretStr | None = None
    """The key clients send. None: the one in the state directory, made at the first start."""
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024)
    """A request larger than this is refused with 413, before anything is queued."""
    max_waiting: int = Field(default=2048, ge=1)
    """Waiting jobs a lane of one model may hold; the next is answered with 429."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """A job that is not done by then, waiting or running, ends as expired."""
    queue_comment_after_s: float = Field(default=1.0, ge=0)
    """A stream that has no token by then is opened with comments on its place in the queue. Until then an error is
    still an HTTP status of its own."""
    stalled_client_s: float = Field(default=60.0, gt=0)
    """A client that reads nothing for so long, while tokens wait for it, is given up and its job cancelled."""
    drain_s: float = Field(default=30.0, ge=0)
    """On SIGTERM, running work may go on this long."""

    @property
    def socket_path(self) -> Path:
        """The embedded server's unix socket; in a short runtime directory when the state directory's path is long."""
        path = self.state_dir.absolute() / "redis.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"fastchat-q-{os.getuid()}-{digest}" / "redis.sock"

    @property
    def resolved_redis_url(self) -> str:
        """The Redis URL that this process connects to."""
        if self.redis_url is not None:
            return self.redis_url
        if self.socket_path.exists():
            return f"unix://{self.socket_path}"
        return "redis://127.0.0.1:6379/0"


def unknown_variables() -> list[str]:
    """Names in the environment that look like settings and are none: a misspelt setting must not be silent."""
    prefix = "FASTCHAT_Q_"
    known = {prefix + name.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith(prefix) and name not in known)
