"""The token channel: appends to the logs (EMIT, many jobs a call) and reads them back (resume, gap repair)."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from . import keys, scripts
from .connection import TRANSIENT
from .events import Delta, Piece, decode_delta, encode_payload
from .queue import LEASE_MS, Claim, Finish, finish_call


class Status(IntEnum):
    """What a script says of one job's tokens, or of its end."""

    LOST = 0
    OK = 1
    DUPLICATE = 2
    GAP = 3
    UNHEARD = 4
    """OK, but no API process listens on the job's inbox."""
    DAMAGED = 5
    """Somebody else wrote into the job's log or record: it takes no token any more."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one claim, ready to append: they bring its count to ``n``."""

    claim: Claim
    n: int
    pieces: tuple[Piece, ...]

    @property
    def k(self) -> int:
        """How many they are."""
        return sum([piece.k for piece in self.pieces])


@dataclass(frozen=True, slots=True)
class Appended:
    """The answers to one `append`, in the order of its arguments."""

    chunks: list[Status]
    finishes: list[Status | RedisError]
    """An error: this end was refused, and no other."""


async def append(redis: "Redis", model: str, chunks: Sequence[Chunk], finishes: Sequence[Finish] = ()) -> Appended:
    """Logs and publishes chunks, then ends jobs, in one round trip.

    Raises:
        redis.RedisError: one of ``connection.TRANSIENT``: the server is away; the same call may be repeated. Another
            one: it refused the tokens.
    """
    calls: list[scripts.Call] = []
    if chunks:
        args: list[scripts.Arg] = [LEASE_MS]
        for c in chunks:
            args += (c.claim.job_id, c.claim.fence, c.n, c.k, encode_payload(c.pieces))
        calls.append(scripts.Call("emit", keys.model_keys(model).token_keys, args))
    calls += [finish_call(model, finish) for finish in finishes]
    replies: list[Any] = await scripts.call_many(redis, calls)
    for reply in replies:
        if isinstance(reply, TRANSIENT):
            raise reply
    ended = [
        reply if isinstance(reply, RedisError) else Status(reply) for reply in replies[len(calls) - len(finishes) :]
    ]
    if not chunks:
        return Appended([], ended)
    if isinstance(replies[0], RedisError):
        raise replies[0]
    return Appended([Status(code) for code in replies[0]], ended)


async def read(redis: "Redis", model: str, job_id: str, after: int = 0) -> list[Delta]:
    """The log of a job behind its first ``after`` tokens, oldest first."""
    entries = await redis.xrange(keys.model_keys(model).log(job_id), min=f"(0-{after}")
    return [entry_to_delta(entry_id, fields) for entry_id, fields in entries]


async def read_claimed(redis: "Redis", model: str, claim: Claim) -> list[Delta] | None:
    """The whole log behind a claim; None: this server knows nothing of the claim.

    Then somebody else has the job by now, or a failover is under way and the server is not the one that gave the claim:
    what its log holds says nothing.
    """
    names = keys.model_keys(model)
    pipe = redis.pipeline(transaction=False)
    pipe.hget(names.job(claim.job_id), "fence")
    pipe.xrange(names.log(claim.job_id))
    fence, entries = await pipe.execute()
    if fence is None or fence.decode() != claim.fence:
        return None
    return [entry_to_delta(entry_id, fields) for entry_id, fields in entries]


def entry_to_delta(entry_id: bytes, fields: dict[bytes, bytes]) -> Delta:
    """A log entry as XRANGE returns it."""
    return decode_delta(int(entry_id.partition(b"-")[2]), int(fields[b"k"]), fields[b"d"])
