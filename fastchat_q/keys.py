"""Every Redis key, channel and group name, with its type and lifetime. No name is spelt anywhere else, Lua included.

All keys of one model queue share the hash tag ``{slug}``, so that a script touches one Cluster slot.
``docs/redis-keys.md`` shows each of them with redis-cli.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache

GROUP = "w"
"""The consumer group of every lane stream."""

LANES = ("hi", "lo")
"""Priority lanes, first served first: ``hi`` interactive, ``lo`` batch."""


def slug(model: str) -> str:
    """The queue name of a model: ``[a-z0-9._-]{1,48}``; others keep a readable part plus a hash."""
    readable = re.sub(r"[^a-z0-9._-]+", "-", model.lower()).strip("-") or "model"
    if readable == model and len(model) <= 48:
        return model
    return f"{readable[:39]}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys of one model's queue. Build it with `model_keys`."""

    prefix: str

    def job(self, job_id: str) -> str:
        """Hash: the job record, the truth. Until deadline + 1 h; after the end: the result TTL."""
        return f"{self.prefix}j:{job_id}"

    def log(self, job_id: str) -> str:
        """Stream: the token log, ids ``0-<n>`` where n counts the tokens so far. Lives as long as the job."""
        return f"{self.prefix}t:{job_id}"

    def stream(self, lane: str) -> str:
        """Stream with group `GROUP`: the delivery index, entries ``{j: <id>}``; deleted when the job ends."""
        return f"{self.prefix}s:{lane}"

    def waiting(self, lane: str) -> str:
        """Zset: id -> place in the queue (milliseconds; negative for a job that was handed back). Queued jobs only."""
        return f"{self.prefix}wait:{lane}"

    @property
    def live(self) -> str:
        """Zset: id -> deadline in ms. Every job that has not ended."""
        return f"{self.prefix}live"

    @property
    def lease(self) -> str:
        """Zset: id -> lease expiry in ms. Every running job."""
        return f"{self.prefix}lease"

    @property
    def bell(self) -> str:
        """List of at most 64 wake-up tokens: idle workers block on it."""
        return f"{self.prefix}bell"

    @property
    def script_keys(self) -> tuple[str, ...]:
        """KEYS of every Lua script, in the order that ``lua/prelude.lua`` names them."""
        return (
            self.job(""),
            self.log(""),
            self.live,
            self.lease,
            self.bell,
            *(self.stream(lane) for lane in LANES),
            *(self.waiting(lane) for lane in LANES),
        )


@lru_cache(maxsize=4096)
def model_keys(model: str) -> ModelKeys:
    """The keys of a served model, by its public name."""
    return ModelKeys(f"fq:{{{slug(model)}}}:")


def public_job_id(model: str, job_id: str) -> str:
    """``<slug>.<ulid>``: the id that leaves the house, so that any API server can route by it."""
    return f"{slug(model)}.{job_id}"


def worker(worker_id: str) -> str:
    """Hash: a worker's registration (model card, slots, version, pid). TTL 15 s, renewed by its heartbeat."""
    return f"fq:w:{worker_id}"


WORKERS = "fq:workers"
"""Zset: worker id -> expiry of its registration in ms. Index over `worker`; pruned by every heartbeat."""

MODELS = "fq:models"
"""Zset: model name -> last seen in ms. Tells «no worker now» from «never heard of it»; forgotten after 24 h."""


def api_server(api_id: str) -> str:
    """Hash: an API server's registration. TTL 15 s."""
    return f"fq:api:{api_id}"


def inbox(api_id: str) -> str:
    """Channel: token and terminal events for one API process."""
    return f"fq:inbox:{api_id}"


WORKER_CHANNEL_PREFIX = "fq:hint:"


def worker_channel(worker_id: str) -> str:
    """Channel: hints for one worker, such as ``cancel <id>``. Losing one costs at most one decode step."""
    return f"{WORKER_CHANNEL_PREFIX}{worker_id}"


ORCHESTRATOR_QUEUE = "fq:arq"
"""Zset: arq's own queue of housekeeping functions."""

ORCHESTRATOR_HEALTH = "fq:orchestrator"
"""String: arq's health line, renewed every few seconds, with a TTL."""
