"""Between the record of a claimed job and the engine: what the engine is asked, and how the job ends by its answer."""

import random

import structlog
from redis.asyncio import Redis

from fastchat_q import blobs
from fastchat_q.abilities import check_can_do
from fastchat_q.errors import JobFailedError, RetryableError
from fastchat_q.events import Result
from fastchat_q.jobs import Job
from fastchat_q.queue import Finish
from fastchat_q.tokens import read_claimed

from .active import Active
from .engines.base import Ended, Request

log = structlog.get_logger()

BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0


async def read_request(redis: "Redis", active: Active) -> Request | None:
    """What the engine is asked; None: this server knows nothing of the claim, as in a failover.

    Raises:
        FastchatQError: the job cannot be done here.
        RedisError, OSError, KeyError, TypeError, ValueError: Redis is away, or somebody wrote into the log.
    """
    claim, card = active.claim, active.line.card
    job = Job.from_spec(claim.spec)
    check_can_do(card, job)  # the API may not have known the card
    images = await blobs.fetch(redis, card.name, job.blobs)
    if not claim.n:
        return Request(job, active.ticket, (), images)
    deltas = await read_claimed(redis, card.name, claim)
    if deltas is None:
        log.warning("the claim is not known where its log is", job=claim.job_id)
        return None
    prior = tuple(piece for delta in deltas for piece in delta.pieces)
    logged = sum(piece.k for piece in prior)
    if logged != claim.n:
        raise JobFailedError(f"The token log holds {logged} of {claim.n} tokens.", code="log_incomplete")
    log.info("resuming", job=claim.job_id, attempt=claim.attempt, tokens=claim.n)
    return Request(job, active.ticket, prior, images)


def finish_of(active: Active, ended: Ended) -> Finish:
    """The end of the job, or of this try."""
    claim, error = active.claim, ended.error
    if error is None:
        result = Result(ended.finish_reason, ended.usage, stop=ended.stop)
        return Finish(claim, active.n, "succeeded", ended.finish_reason or "stop", result)
    reason, result = error.code or error.type, Result.from_error(error)
    if isinstance(error, RetryableError):  # full jitter: jobs that failed together do not come back together
        backoff_s = error.retry_after_s or random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2**claim.retries))
        return Finish(claim, active.n, "retry", reason, result, backoff_s, error.counts)
    return Finish(claim, active.n, "failed", reason, result)
