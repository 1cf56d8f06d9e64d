"""Settings that more than one process reads: flag over environment (``FASTCHAT_Q_*``) over default."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MAX_SOCKET_PATH = 100  # bytes; sun_path holds 104 on macOS and 108 on Linux

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@,*]+")


def default_state_dir() -> Path:
    """``$XDG_STATE_HOME/fastchat-q``, by default ``~/.local/state/fastchat-q``."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "fastchat-q"


class Settings(BaseSettings):
    """Everything that can be set, with its default. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix="FASTCHAT_Q_", env_ignore_empty=True, extra="forbid")

    state_dir: Path = Field(default_factory=default_state_dir)
    """The embedded server's data, the API key, the pepper, logs."""
    redis_url: str | None = None
    """None: the embedded server if one runs in the state directory, else redis://127.0.0.1:6379/0. With Sentinel:
    sentinel://[user:password@]host:port[,host:port…]/service[/db]."""
    orchestrator_redis_url: str | None = None
    """Where the orchestrator keeps its own queue. None: with all else, which then must not be in cluster mode."""
    redis_server: Path | None = None
    """The server program that ``up`` starts. None: the Valkey of the package, else one on the PATH."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    auth: bool = True
    """Ask for a bearer key. Can only be switched off on a loopback address."""
    api_key: SecretStr | None = None
    """The key clients send. None: the one in the state directory, made at the first start."""
    base_url: str | None = None
    """The API server that ``run``, ``embed`` and ``batch`` ask. None: the one that ``up`` runs on the state directory,
    else the one at ``host`` and ``port``."""
    key_pepper: SecretStr | None = None
    """The secret that API keys are hashed with: the same for all API servers and for ``fastchat-q key``. None: the one
    in the state directory, made when first needed."""
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024)
    """A request larger than this is refused with 413, before anything is queued."""
    body_timeout_s: float = Field(default=120.0, gt=0)
    """A request whose body is not whole by then is refused with 408."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Web pages of these origins may ask, such as https://chat.example.org,http://localhost:3000; * stands for all.
    They need a key all the same, and cookies are never sent."""
    max_images: int = Field(default=16, ge=0)
    """Images that a request may hold."""
    max_image_body_bytes: int = Field(default=32 * 1024 * 1024, ge=1024)
    """A chat request that holds images as data URLs may be so large; all but the images within ``max_body_bytes``."""
    allow_remote_images: bool = False
    """Fetch images that are named by https URL. Whoever may ask a model then has this server connect to any public
    address; nothing else is reached."""
    max_image_bytes: int = Field(default=20 * 1024 * 1024, ge=1)
    """Of an image, decoded or fetched."""
    max_inputs: int = Field(default=2048, ge=1)
    """Texts that a request may have embedded, or ranked."""
    storage_url: str | None = None
    """Where files are kept: file:///folder, s3://bucket/prefix, gs://… or az://…, with credentials from the variables
    of each. None: the folder ``files`` in the state directory. API servers and the orchestrator must share it."""
    max_file_bytes: int = Field(default=200 * 1024 * 1024, ge=1)
    """Of an uploaded file."""
    max_stored_bytes: int = Field(default=10 * 1024**3, ge=1)
    """Of all files of one tenant; beyond it uploads are refused."""
    max_batch_lines: int = Field(default=50_000, ge=1)
    """Requests that a batch may hold."""
    max_open_batches: int = Field(default=32, ge=1)
    """Batches of one tenant that have not ended; the next is answered with 429."""
    batch_window: int = Field(default=512, ge=1)
    """Jobs that all open batches together keep in the queue: they share it equally."""
    batch_window_bytes: int = Field(default=64 * 1024 * 1024, ge=1)
    """The same in bytes of requests, so that large ones do not fill Redis."""
    max_waiting: int = Field(default=2048, ge=1)
    """Waiting jobs a lane of one model may hold; the next is answered with 429."""
    queue_deadline_s: float = Field(default=600.0, gt=0)
    """A job that no worker has begun by then ends as expired."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """A job that is not done by then, waiting or running, ends as expired."""
    stall_s: float | None = Field(default=None, gt=0)
    """A running job that gets no token for so long is tried again, on another worker if there is one. None: 60 s, and
    600 s where the model is another server."""
    load_stall_s: float = Field(default=600.0, gt=0)
    """A model whose loading says nothing for so long is given up: its process is ended and started again."""
    disconnect_grace_s: float = Field(default=5.0, ge=0)
    """A client whose stream was cut may come back for so long; then its job is cancelled."""
    result_ttl_s: float = Field(default=86400.0, ge=120)
    """How long jobs with an idempotency key, and those that go on without a client, are kept after their end."""
    queue_comment_after_s: float = Field(default=1.0, ge=0)
    """A stream that has no token by then is opened with comments on its place in the queue. Until then an error is
    still an HTTP status of its own."""
    stalled_client_s: float = Field(default=60.0, gt=0)
    """A client that reads nothing for so long, while tokens wait for it, is given up and its job cancelled."""
    drain_s: float = Field(default=30.0, ge=0)
    """On SIGTERM, running work may go on this long."""
    batch_reserve: float = Field(default=0.25, ge=0, lt=1)
    """The part of a worker's slots that the batch lane may not hold, so that an interactive job finds one free."""
    tenant_headroom: float = Field(default=0.125, ge=0, lt=1)
    """The part of a worker's slots that a tenant which runs more than its share leaves free while other tenants came
    within the last 10 s; at least one of four slots and more. 0: none."""

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin: write it as https://host or https://host:port, or *")
        return origins

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
