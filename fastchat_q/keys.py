"""Every Redis key, channel and group name, with its type and lifetime. No name is spelt anywhere else, Lua included.

All keys of one model queue share the hash tag ``{slug}``, so that a script touches one Cluster slot.
``docs/redis-keys.md`` shows each of them with redis-cli.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

GROUP = "w"
"""The consumer group of every lane stream."""

LANES = ("hi", "lo")
"""The lanes that clients choose, first served first: ``hi`` interactive, ``lo`` batch."""

QUARANTINE = "sus"
"""The lane of jobs that lost two workers: each runs alone."""

ALL_LANES = (*LANES, QUARANTINE)

"""Wake-up tokens that a bell holds at the most; the same number stands in ``lua/transitions.lua``."""


def slug(model: str) -> str:
    """The queue name of a model: ``[a-z0-9._-]{1,48}``; others keep a readable part plus a hash."""
    readable = re.sub(r"[^a-z0-9._-]+", "-", model.lower()).strip("-") or "model"
    if readable == model and len(model) <= 48:
        return model
    return f"{readable[:39]}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class ModelKeys:
    """The keys of one model's queue. Build it with `model_keys`."""

    prefix: str

    def job(self, job_id: str) -> str:
        """Hash: the job record, the truth. Until deadline + 1 h; after the end: the result TTL."""
        return f"{self.prefix}j:{job_id}"

    def log(self, job_id: str) -> str:
        """Stream: the token log, ids ``0-<n>`` where n counts the tokens so far. Lives as long as the job."""
        return f"{self.prefix}t:{job_id}"

    def blob(self, digest: str) -> str:
        """String: an image of jobs, by the SHA-256 of its bytes. As long as the last job that came with it can run."""
        return f"{self.prefix}blob:{digest}"

    @property
    def lease(self) -> str:
        """Zset: id -> lease expiry in ms. Every running job."""
        return f"{self.prefix}lease"

    @property
    def live(self) -> str:
        """Zset: id -> its next clock in ms (until when it must be started, then its deadline). Every job not ended."""
        return f"{self.prefix}live"

    @property
    def bell(self) -> str:
        """List of at most 64 wake-up tokens: idle workers block on it."""
        return f"{self.prefix}bell"

    @property
    def delay(self) -> str:
        """Zset: id -> when it may be tried again, in ms. Jobs between two tries."""
        return f"{self.prefix}delay"

    @property
    def dead(self) -> str:
        """Stream of some 10,000 entries ``{j: <id>, reason}`` at the most: the dead letters. Their jobs live 7 days."""
        return f"{self.prefix}dead"

    @property
    def stat(self) -> str:
        """Hash: how many jobs ended in each state, ``service_ms`` (measured mean of a job), RECONCILE's cursor."""
        return f"{self.prefix}stat"

    @property
    def queued(self) -> str:
        """Hash: tenant -> its jobs that wait (in line, parked or delayed)."""
        return f"{self.prefix}queued"

    @property
    def running(self) -> str:
        """Hash: tenant -> its jobs that run."""
        return f"{self.prefix}running"

    @property
    def mode(self) -> str:
        """String: ``paused`` (nothing is claimed) or ``draining`` (nothing is accepted); absent: neither. No TTL."""
        return f"{self.prefix}mode"

    @property
    def ward(self) -> str:
        """String: the worker that runs suspects alone, and whether it has begun. TTL 15 s."""
        return f"{self.prefix}ward"

    @property
    def load(self) -> str:
        """String: the worker that loads the model on demand, so that no second one does. TTL 15 s."""
        return f"{self.prefix}load"

    def parked(self, tenant: str) -> str:
        """Zset: id -> place. Jobs of a tenant that runs as many as it may; gone when it runs fewer."""
        return f"{self.prefix}parked:{tenant}"

    def idempotency(self, suffix: str) -> str:
        """String: ``<id> <digest of request>`` for ``<tenant>:<digest of the key>``. Lives as long as its job."""
        return f"{self.prefix}idem:{suffix}"

    def stream(self, lane: str) -> str:
        """Stream with group `GROUP`: one undelivered entry for each job in line, one pending for each that runs."""
        return f"{self.prefix}s:{lane}"

    def waiting(self, lane: str) -> str:
        """Zset: the line. id -> place (fair-queueing tag; negative for a job that was claimed before)."""
        return f"{self.prefix}wait:{lane}"

    def tags(self, lane: str) -> str:
        """Hash: the accounts of fair queueing: ``V`` and ``F:<tenant>``. Starts anew when nothing waits."""
        return f"{self.prefix}tags:{lane}"

    @property
    def away(self) -> str:
        """Zset: tenant -> until when it is expected back, in ms. Tenants that have nothing in line, and had lately."""
        return f"{self.prefix}away"

    @property
    def token_keys(self) -> tuple[str, ...]:
        """KEYS of the scripts on the token path, in the order of ``lua/prelude.lua``."""
        return (self.job(""), self.log(""), self.lease)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The keys that tell how a queue is doing, and none that holds a prompt or an answer."""
        lanes = [name(lane) for name in (self.stream, self.waiting) for lane in ALL_LANES]
        sets = (self.live, self.lease, self.delay, self.parked("*"), self.bell)
        return (*lanes, *sets, self.dead, self.stat, self.queued, self.running, self.mode, self.ward)

    @cached_property
    def script_keys(self) -> tuple[str, ...]:
        """KEYS of all other scripts, in the order of ``lua/prelude.lua`` and ``lua/transitions.lua``."""
        return (
            *self.token_keys,
            self.live,
            self.bell,
            self.delay,
            self.dead,
            self.stat,
            self.queued,
            self.running,
            self.mode,
            self.ward,
            self.parked(""),
            self.idempotency(""),
            *(self.stream(lane) for lane in ALL_LANES),
            *(self.waiting(lane) for lane in ALL_LANES),
            *(self.tags(lane) for lane in ALL_LANES),
            self.away,
        )


@lru_cache(maxsize=4096)
def model_keys(model: str) -> ModelKeys:
    """The keys of a served model, by its public name."""
    return ModelKeys(f"fq:{{{slug(model)}}}:")


EVERY_MODEL = ModelKeys("fq:{*}:")
"""Glob patterns over the keys of all models, for access rules."""


def public_job_id(model: str, job_id: str) -> str:
    """``<slug>.<ulid>``: the id that leaves the house, so that any API server can route by it."""
    return f"{slug(model)}.{job_id}"


def parse_public_job_id(public_id: str) -> tuple[str, str] | None:
    """The inverse of `public_job_id`: (slug, id), or None if it cannot be one. A slug is its own slug."""
    name, _, job_id = public_id.rpartition(".")
    if re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{26}", job_id) and re.fullmatch(r"[a-z0-9._-]{1,48}", name):
        return name, job_id
    return None


def worker(worker_id: str) -> str:
    """Hash: a worker's registration (model card, slots, version, pid). TTL 15 s, renewed by its heartbeat."""
    return f"fq:w:{worker_id}"


WORKERS = "fq:workers"
"""Zset: worker id -> expiry of its registration in ms. Index over `worker`; pruned by every heartbeat."""

MODELS = "fq:models"
"""Zset: model name -> last seen in ms. Tells «no worker now» from «never heard of it»; forgotten after 24 h."""


ALIASES = "fq:aliases"
"""Hash: alias -> JSON object of the models it stands for and their weights. Until an operator removes it."""


def idempotent_model(tenant: str, digest: str) -> str:
    """String: the slug of the model that an idempotency key was used for. As long as its job can be kept."""
    return f"fq:idem:{tenant}:{digest}"


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

ORCHESTRATOR_JOBS = "arq:"
"""Prefix that arq itself gives its bookkeeping of those functions. Strings, for minutes."""


def api_key(digest: str) -> str:
    """Hash: the record of an API key, under the HMAC of the key. Until it is revoked."""
    return f"fq:key:{digest}"


API_KEYS = "fq:keys"
"""Hash: key id -> digest. Index over `api_key`."""

PEPPER = "fq:pepper"
"""String: fingerprint of the pepper that the digests are made with, so that two different ones are noticed."""


def rate_limit(key_id: str) -> str:
    """Hash: the two buckets of an API key. TTL: until both are full again, at the most about a minute."""
    return f"fq:rl:{{{key_id}}}"


_FILES = "fq:files:{f}:"
"""One hash tag: a file is added to all of its indexes, and taken out, in one step."""


def file_record(file_id: str) -> str:
    """String: the record of a file, as JSON; the storage has the same beside the file. Until the file is deleted."""
    return f"{_FILES}id:{file_id}"


def files_of(tenant: str) -> str:
    """Zset of file ids, all with score 0 and so in the order of their ids, which is that of time: a tenant's files."""
    return f"{_FILES}of:{tenant}"


FILES = f"{_FILES}all"
"""Zset, as `files_of`: everybody's files."""

FILE_EXPIRY = f"{_FILES}expiry"
"""Zset: file id -> unix seconds at which it is deleted. Files that expire."""

FILE_BYTES = f"{_FILES}bytes"
"""Hash: tenant -> bytes of its files."""

FILES_COMPARED = f"{_FILES}compared"
"""String: there while the indexes need no comparison with the storage. TTL 1 h; gone with all else that Redis loses."""

FILE_STORAGE = f"{_FILES}storage"
"""String: the id of the storage of files and batches, so that processes with another one are noticed. No TTL."""

EVERY_FILE_KEY = f"{_FILES}*"
"""Glob pattern, for access rules."""


def token_use(key_id: str) -> str:
    """String: tokens that an API key with a quota has used, reservations included. Until the key is revoked."""
    return f"fq:use:{{{key_id}}}"


_BATCHES = "fq:batches:{b}:"
"""One hash tag: a batch is written with all its indexes in one step."""


def batch(batch_id: str) -> str:
    """Hash ``{rank, json}``: a batch as GET shows it. The storage is the truth, and can make it again. As the batch."""
    return f"{_BATCHES}id:{batch_id}"


def batches_of(tenant: str) -> str:
    """Zset of batch ids, all with score 0 and so in the order of time: a tenant's batches."""
    return f"{_BATCHES}of:{tenant}"


def open_batches_of(tenant: str) -> str:
    """Set of batch ids: a tenant's batches that have not ended."""
    return f"{_BATCHES}open:{tenant}"


BATCHES = f"{_BATCHES}all"
"""Zset, as `batches_of`: everybody's batches."""

OPEN_BATCHES = f"{_BATCHES}open"
"""Zset: batch id -> rank. Batches that have not ended: what ticks are for."""

BATCH_TICKS = f"{_BATCHES}ticks"
"""Hash: batch id -> ticks begun so far. Names the next one, so that one at the most waits. While the batch is open."""

BATCHES_INDEXED = f"{_BATCHES}indexed"
"""String: the id of the storage whose batches are all in the indexes; gone with all else that Redis loses. No TTL."""


def batch_lease(batch_id: str) -> str:
    """String: who drives the batch at the moment. TTL 6 s, renewed while the tick runs."""
    return f"{_BATCHES}lease:{batch_id}"


EVERY_BATCH_KEY = f"{_BATCHES}*"
"""Glob pattern, for access rules."""
