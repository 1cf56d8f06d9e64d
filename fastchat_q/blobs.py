"""The images of jobs, beside the queue: each once under the digest of its bytes, so that job records stay small.

An API server stores what a job shows before it enqueues the job; a worker reads what a claimed job names. Nothing
deletes a blob but its TTL, for another job may have come with the same image meanwhile.
"""

from collections.abc import Mapping, Sequence

from redis.asyncio import Redis

from . import keys
from .errors import JobFailedError

MARGIN_S = 60.0
"""A blob outlives the deadline of its job by so much."""
LAST_MOMENT_MS = 10_000
"""A blob that is about to expire is stored anew rather than kept."""


async def store(redis: "Redis", model: str, blobs: Mapping[str, bytes], deadline_s: float) -> None:
    """Stores images by their digests, or makes those that are there live as long as this job can.

    Raises:
        redis.RedisError: the server is away, or refuses (``OutOfMemoryError`` at maxmemory).
    """
    if not blobs:
        return
    names = keys.model_keys(model)
    ttl_ms = round((deadline_s + MARGIN_S) * 1000)
    pipe = redis.pipeline(transaction=False)
    for digest in blobs:
        pipe.pttl(names.blob(digest))
    there = await pipe.execute()
    pipe = redis.pipeline(transaction=False)
    for (digest, content), left_ms in zip(blobs.items(), there, strict=True):
        if left_ms < LAST_MOMENT_MS:  # -2: there is none
            pipe.set(names.blob(digest), content, px=ttl_ms)
        elif left_ms < ttl_ms:
            pipe.pexpire(names.blob(digest), ttl_ms)
    for reply in await pipe.execute(raise_on_error=False):  # redis-py would write the image into the error's message
        if isinstance(reply, Exception):
            raise reply


async def fetch(redis: "Redis", model: str, digests: Sequence[str]) -> dict[str, bytes]:
    """The images of a job, in one round trip.

    Raises:
        JobFailedError: one is not there any more (code ``part_lost``).
        redis.RedisError: the server is away.
    """
    if not digests:
        return {}
    names = keys.model_keys(model)
    found: list[bytes | None] = await redis.mget([names.blob(digest) for digest in digests])
    blobs = {digest: content for digest, content in zip(digests, found, strict=True) if content is not None}
    if lost := len(digests) - len(blobs):
        raise JobFailedError(
            f"The queue does not have {lost} of the request's {len(digests)} images any more. Send the request again.",
            code="part_lost",
        )
    return blobs
