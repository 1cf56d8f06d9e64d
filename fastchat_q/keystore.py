"""API keys in Redis: made, found by digest, listed, revoked. It keeps no key, and decides nothing about a request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from . import keys
from .credentials import new_api_key
from .errors import ConfigurationError
from .tenants import ApiKey, Caller, describe, digest, fingerprint


class UnknownKeyError(LookupError):
    """No key has this id or name."""


class AmbiguousNameError(LookupError):
    """Several keys have this name."""


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to a lookup: the record, if there is one, and whether the stored digests are made with our pepper."""

    record: ApiKey | None
    same_pepper: bool


class KeyStore:
    """All API keys of a Redis. Raises ``redis.RedisError`` when the server is away."""

    def __init__(self, redis: "Redis", pepper: str) -> None:
        self._redis = redis
        self._pepper = pepper

    def digest(self, key: str) -> str:
        """What ``key`` is stored under."""
        return digest(self._pepper, key)

    async def create(self, caller: Caller, name: str) -> tuple[str, ApiKey]:
        """Makes a key and its record; the key is in the return value and nowhere else.

        Raises:
            ConfigurationError: the keys in this Redis were made with another pepper; nothing was stored.
        """
        ours = fingerprint(self._pepper)
        if not await self._redis.set(keys.PEPPER, ours, nx=True):
            theirs = await self._redis.get(keys.PEPPER)
            if theirs is not None and theirs.decode() != ours:
                raise ConfigurationError(
                    "The API keys in this Redis were made with another pepper, so the API servers would not know this "
                    "one. Run this where their state directory is, or set FASTCHAT_Q_KEY_PEPPER as they do. If the "
                    f"pepper was changed on purpose: revoke the old keys, then fastchat-q redis DEL {keys.PEPPER}"
                )
        key = new_api_key()
        record, found_by = describe(caller, name, key), self.digest(key)
        pipe = self._redis.pipeline(transaction=False)
        pipe.hset(keys.API_KEYS, caller.key_id, found_by)  # first: a key that works is always in the list
        pipe.hset(keys.api_key(found_by), mapping=record.to_hash())
        await pipe.execute()
        return key, record

    async def find(self, found_by: str) -> Found:
        """The record of the key with this digest: one round trip."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(keys.api_key(found_by))
        pipe.get(keys.PEPPER)
        record, theirs = await pipe.execute()
        same = theirs is None or theirs.decode() == fingerprint(self._pepper)
        return Found(ApiKey.from_hash(record) if record else None, same)

    async def all(self) -> list[ApiKey]:
        """Every key, oldest first, expired ones included: two round trips."""
        return sorted((record for record, _ in await self._all()), key=lambda r: (r.created, r.caller.key_id))

    async def used(self, records: Sequence[ApiKey]) -> list[int]:
        """Tokens that these keys have used of their quotas."""
        if not records:
            return []
        pipe = self._redis.pipeline(transaction=False)
        for record in records:
            pipe.get(keys.token_use(record.caller.key_id))
        return [int(count or 0) for count in await pipe.execute()]

    async def set_quota(self, id_or_name: str, change: Callable[[int | None], int | None]) -> ApiKey:
        """Gives a key another quota, or none; API servers know it within seconds. What was used stays used.

        Args:
            change: from the quota that it has to the one that it gets.

        Raises:
            UnknownKeyError: there is no such key.
            AmbiguousNameError: several have this name; the message lists their ids. Nothing was changed.
            ValueError: it is no quota.
        """
        record, found_by = await self._one(id_or_name)
        fields = record.caller.model_dump() | {"token_quota": change(record.caller.token_quota)}
        changed = record.model_copy(update={"caller": Caller.model_validate(fields)})
        name = keys.api_key(found_by)
        if changed.caller.token_quota is None:
            await self._redis.hdel(name, "token_quota")  # type: ignore[misc]
        else:
            await self._redis.hset(name, "token_quota", str(changed.caller.token_quota))  # type: ignore[misc]
        return changed

    async def revoke(self, id_or_name: str) -> ApiKey:
        """Deletes a key; API servers refuse it within seconds.

        Raises:
            UnknownKeyError: there is none.
            AmbiguousNameError: several have this name; the message lists their ids. Nothing was deleted.
        """
        record, found_by = await self._one(id_or_name)
        pipe = self._redis.pipeline(transaction=False)
        pipe.delete(keys.api_key(found_by))
        pipe.delete(keys.token_use(record.caller.key_id))
        pipe.hdel(keys.API_KEYS, record.caller.key_id)
        await pipe.execute()
        return record

    async def _one(self, id_or_name: str) -> tuple[ApiKey, str]:
        rows = await self._all()
        found = [row for row in rows if row[0].caller.key_id == id_or_name]
        found = found or [row for row in rows if row[0].name == id_or_name]
        if not found:
            raise UnknownKeyError(f"No API key has the id or name {id_or_name!r}. fastchat-q key ls shows all.")
        if len(found) > 1:
            ids = ", ".join(sorted(record.caller.key_id for record, _ in found))
            raise AmbiguousNameError(f"{len(found)} API keys are named {id_or_name!r}. Name one of: {ids}")
        return found[0]

    async def _all(self) -> list[tuple[ApiKey, str]]:
        index: dict[bytes, bytes] = await self._redis.hgetall(keys.API_KEYS)  # type: ignore[misc]
        pipe = self._redis.pipeline(transaction=False)
        digests = [found_by.decode() for found_by in index.values()]
        for found_by in digests:
            pipe.hgetall(keys.api_key(found_by))
        records = await pipe.execute()
        return [(ApiKey.from_hash(raw), found_by) for raw, found_by in zip(records, digests, strict=True) if raw]
