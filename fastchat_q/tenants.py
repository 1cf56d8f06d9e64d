"""Who may ask, for what, and how much: the caller of a request and the record of an API key. It knows no Redis."""

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field

from .errors import ModelNotAllowedError

Scope = Literal["inference", "batch", "admin"]
"""``inference``: everything under ``/v1/``; ``batch``: jobs of the batch lane; ``admin``: everybody's jobs."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: frozenset[Scope] = frozenset({"inference", "batch"})
DEFAULT_TENANT = "default"
ADMIN_TENANT = "admin"
MAX_NAME = 100
LAST_SHOWN = 4
"""Characters of a key that are kept, so that people find the one they hold in a list."""

Limit = Annotated[int, Field(ge=1, le=10**9)]
Quota = Annotated[int, Field(ge=1, le=10**15)]
Tenant = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
ModelPattern = Annotated[str, Field(min_length=1, max_length=256)]


class Caller(BaseModel):
    """Whoever is behind a request. None means no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_id: str
    """Public: names the key in lists and logs."""
    tenant: Tenant
    """Jobs of one tenant share their turn; several keys may belong to one."""
    scopes: frozenset[Scope]
    models: tuple[ModelPattern, ...] = ()
    """Served names, one that ends in ``*`` stands for all that begin so; empty: every model."""
    expires: int | None = None
    """Unix seconds."""
    rpm: Limit | None = None
    """Requests a minute."""
    tpm: Limit | None = None
    """Tokens a minute, prompt and completion."""
    token_quota: Quota | None = None
    """Tokens ever, prompt and completion."""
    max_parallel: Limit | None = None
    """Running jobs."""
    max_queued: Limit | None = None
    """Waiting jobs."""
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    """Share of its tenant in a queue that is contended."""

    def expired(self, now: float) -> bool:
        """Whether the key's time is over at ``now``, in unix seconds."""
        return self.expires is not None and now >= self.expires

    def may_use(self, model: str) -> bool:
        """Whether the model is on the caller's list."""
        if not self.models:
            return True
        return any(
            model.startswith(allowed[:-1]) if allowed.endswith("*") else model == allowed for allowed in self.models
        )

    def check_model(self, model: str) -> None:
        """Refuses a model that is not on the list.

        Raises:
            ModelNotAllowedError: the message names the model and the list.
        """
        if not self.may_use(model):
            raise ModelNotAllowedError(
                f"This API key ({self.key_id}) may not use the model {model!r}. It may use: {', '.join(self.models)}.",
                param="model",
            )


ANONYMOUS = Caller(key_id="anonymous", tenant=DEFAULT_TENANT, scopes=frozenset(SCOPES))
"""Everybody, where authentication is off."""
BOOTSTRAP = Caller(key_id="bootstrap", tenant=ADMIN_TENANT, scopes=frozenset(SCOPES))
"""Whoever holds the key of the settings or of the state directory."""


class ApiKey(BaseModel):
    """What is kept of an API key: never the key itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    caller: Caller
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    created: int
    """Unix seconds."""
    last4: str

    def to_hash(self) -> dict[str, str]:
        """The fields of the Redis hash, readable; what is not set is left out."""
        fields = self.caller.model_dump(exclude_none=True) | {
            "scopes": " ".join(sorted(self.caller.scopes)),
            "models": json.dumps(self.caller.models),
            "name": self.name,
            "created": self.created,
            "last4": self.last4,
        }
        return {name: str(value) for name, value in fields.items()}

    @classmethod
    def from_hash(cls, raw: Mapping[bytes, bytes]) -> Self:
        """The inverse of `to_hash`.

        Raises:
            ValueError: not such a hash.
        """
        fields: dict[str, object] = {name.decode(): value.decode() for name, value in raw.items()}
        own = {name: fields.pop(name, None) for name in ("name", "created", "last4")}
        fields["scopes"] = str(fields.get("scopes", "")).split()
        fields["models"] = json.loads(str(fields.get("models", "[]")))
        return cls.model_validate({**own, "caller": fields})


def new_key_id() -> str:
    """Such as ``key_1f0c…``: 64 random bits."""
    return f"key_{secrets.token_hex(8)}"


def describe(caller: Caller, name: str, key: str) -> ApiKey:
    """The record of a key that was made just now."""
    return ApiKey(caller=caller, name=name, created=int(time.time()), last4=key[-LAST_SHOWN:])


def digest(pepper: str, key: str) -> str:
    """HMAC-SHA-256, 64 hex digits: what a key is found by. A fast hash is right for 256 random bits."""
    return hmac.digest(pepper.encode(), key.encode(), "sha256").hex()


def fingerprint(pepper: str) -> str:
    """Tells two peppers apart without telling anything of them."""
    return hashlib.sha256(b"fastchat-q pepper " + pepper.encode()).hexdigest()[:16]
