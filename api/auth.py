"""Who asks: a bearer header, or Anthropic's ``x-api-key`` becomes a `Caller`; a path tells the scope that it needs."""

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from fastapi import Request

from fastchat_q.credentials import KEY_PREFIX, new_api_key
from fastchat_q.errors import AuthenticationError, PermissionDeniedError, QueueUnavailableError
from fastchat_q.keystore import KeyStore
from fastchat_q.loops import AWAY
from fastchat_q.tenants import ANONYMOUS, BOOTSTRAP, ApiKey, Caller, Scope

log = structlog.get_logger()

PATH_SCOPES: tuple[tuple[str, Scope], ...] = (
    ("/v1/", "inference"),
    ("/tokenize", "inference"),
    ("/detokenize", "inference"),
)
"""Path prefix -> scope that a key needs there; the first that fits counts. Other paths need no key."""
KNOWN_S = 5.0
"""How long a key that was found is trusted without asking again: a revoked one is refused after that."""
UNKNOWN_S = 1.0
MAX_KNOWN, MAX_UNKNOWN = 4096, 1024
LOOKUP_LIMIT_S = 2.0
KEY_LENGTH = len(new_api_key())


def required_scope(path: str) -> Scope | None:
    """The scope that a path needs; None: it is open to everybody."""
    return next((scope for prefix, scope in PATH_SCOPES if path.startswith(prefix)), None)


def check_scope(caller: Caller, scope: Scope, what: str) -> None:
    """Refuses a caller without the scope.

    Raises:
        PermissionDeniedError: the message names the scope that is missing.
    """
    if scope not in caller.scopes:
        has = ", ".join(sorted(caller.scopes)) or "none"
        raise PermissionDeniedError(f"This API key ({caller.key_id}) has no scope {scope!r} for {what}. It has: {has}.")


def caller_of(request: Request) -> Caller:
    """The caller that the guard found."""
    caller = request.scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller


@dataclass(frozen=True, slots=True)
class _Answer:
    record: ApiKey | None
    until: float


class _Answers:
    """The latest answers, each for a while."""

    def __init__(self, size: int, kept_s: float, clock: Callable[[], float]) -> None:
        self._size, self._kept_s, self._clock = size, kept_s, clock
        self._rows: OrderedDict[str, _Answer] = OrderedDict()

    def get(self, digest: str) -> _Answer | None:
        """An answer that still holds."""
        row = self._rows.get(digest)
        if row is None or row.until <= self._clock():
            return None
        self._rows.move_to_end(digest)
        return row

    def put(self, digest: str, record: ApiKey | None) -> None:
        """Keeps an answer, at the cost of the one that was not asked for longest."""
        self._rows[digest] = _Answer(record, self._clock() + self._kept_s)
        self._rows.move_to_end(digest)
        if len(self._rows) > self._size:
            self._rows.popitem(last=False)

    def drop(self, digest: str) -> None:
        """Forgets an answer."""
        self._rows.pop(digest, None)


class Authenticator:
    """Knows callers by their keys. A key that was used within seconds costs no round trip."""

    def __init__(
        self, store: KeyStore | None, bootstrap_key: str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``store`` None: authentication is off, and everybody may do everything."""
        self._store = store
        self._bootstrap_key = (bootstrap_key or "").encode()
        self._known = _Answers(MAX_KNOWN, KNOWN_S, clock)
        # Apart from the others: a flood of invented keys must not push out those that are good.
        self._unknown = _Answers(MAX_UNKNOWN, UNKNOWN_S, clock)

    @property
    def on(self) -> bool:
        """Whether keys are asked for."""
        return self._store is not None

    async def caller(self, authorization: str | None, api_key: str | None = None) -> Caller:
        """The caller behind an Authorization header, or where there is none, behind ``x-api-key``.

        Raises:
            AuthenticationError: no key, an unknown one, or an expired one.
            QueueUnavailableError: the key may be good, but Redis cannot be asked now.
        """
        if self._store is None:
            return ANONYMOUS
        key = api_key.strip() if api_key and not authorization else _bearer(authorization)
        if self._bootstrap_key and hmac.compare_digest(key.encode(), self._bootstrap_key):
            return BOOTSTRAP
        record = await self._record(self._store, key) if _looks_like_a_key(key) else None
        if record is None:
            shown = f"{key[:6]}…{key[-4:]}" if len(key) > 16 else "…"
            raise AuthenticationError(f"Incorrect API key provided: {shown}. It is unknown, or was revoked.")
        expires = record.caller.expires
        if expires is not None and record.caller.expired(time.time()):
            when = datetime.fromtimestamp(expires, UTC).isoformat(timespec="seconds")
            raise AuthenticationError(
                f"This API key ({record.caller.key_id}) expired at {when}. Ask for a new one, made with: "
                "fastchat-q key create"
            )
        return record.caller

    async def _record(self, store: KeyStore, key: str) -> ApiKey | None:
        digest = store.digest(key)
        answer = self._known.get(digest) or self._unknown.get(digest)
        if answer is not None:
            return answer.record
        try:
            async with asyncio.timeout(LOOKUP_LIMIT_S):
                found = await store.find(digest)
        except AWAY as error:
            log.warning("cannot look up a key", error=str(error))
            raise QueueUnavailableError("API keys cannot be checked at the moment. Retry in a moment.") from error
        if found.record is not None:
            self._known.put(digest, found.record)
            return found.record
        self._known.drop(digest)
        self._unknown.put(digest, None)
        if not found.same_pepper:
            log.error("api keys were made with another pepper: set FASTCHAT_Q_KEY_PEPPER as where they were made")
        return None


def _bearer(authorization: str | None) -> str:
    scheme, _, given = (authorization or "").partition(" ")
    given = given.strip()
    if scheme.lower() != "bearer" or not given:
        raise AuthenticationError(
            "You didn't provide an API key. Send it in the header: Authorization: Bearer YOUR_KEY. "
            "The server wrote its key to the file api_key in its state directory."
        )
    return given


def _looks_like_a_key(key: str) -> bool:
    """Whether it is worth a look into Redis."""
    return key.startswith(KEY_PREFIX) and len(key) == KEY_LENGTH
