"""The queue protocol once more, in plain Python and without Redis: what the scripts are compared with, step by step."""

from dataclasses import dataclass, field

from fastchat_q.queue import MAX_DEATHS, MAX_RETRIES, Claim

HANDED_BACK = 2**43
EPOCH, CREDIT = 2**32, 4
SUSPECT_DEATHS = 2
TERMINAL = {"succeeded", "failed", "cancelled", "expired", "dead"}


@dataclass
class ModelJob:
    """One job. ``place`` is line, parked, delay, lease, lost (its place was deleted), or empty when it has ended."""

    id: str
    tenant: str
    weight: float
    cost: int
    parallel: int
    home: str
    lane: str
    enq_ms: int
    score: float
    inbox: list[str]
    key: str
    state: str = "queued"
    place: str = "line"
    attempt: int = 0
    deaths: int = 0
    retries: int = 0
    log: list[int] = field(default_factory=list)
    claim: Claim | None = None
    worker: str = ""
    lease_out: bool = False
    due: bool = False
    late: str = ""
    ends: int = 0

    @property
    def n(self) -> int:
        """Tokens in the log."""
        return self.log[-1] if self.log else 0


class QueueModel:
    """All jobs of one queue, the accounts of fair queueing, the ward and the mode."""

    def __init__(self) -> None:
        self.jobs: dict[str, ModelJob] = {}
        self.idempotency: dict[str, tuple[str, str]] = {}
        self.virtual: dict[str, float] = {}
        self.accounts: dict[tuple[str, str], float] = {}
        self.away: set[str] = set()
        self.ward: tuple[str, int] | None = None
        self.mode = ""

    def at(self, place: str, lane: str = "", tenant: str = "") -> list[ModelJob]:
        """The jobs at a place, in the order in which they leave it."""
        found = [
            job
            for job in self.jobs.values()
            if job.place == place and lane in ("", job.lane) and tenant in ("", job.tenant)
        ]
        return sorted(found, key=lambda job: (job.score, job.id))

    def running(self, **of: str) -> list[ModelJob]:
        """Running jobs, with or without a lease, whose attributes are as given."""
        return [
            job
            for job in self.jobs.values()
            if job.state == "running" and all(getattr(job, name) == value for name, value in of.items())
        ]

    def queued(self, tenant: str = "") -> list[ModelJob]:
        """Jobs that wait, wherever."""
        return [job for job in self.jobs.values() if job.state == "queued" and tenant in ("", job.tenant)]

    def enqueue(self, job: ModelJob, had: int) -> None:
        """Stands a new job in its line, by start-time fair queueing."""
        if had:
            job.score, job.log = job.enq_ms - HANDED_BACK, [had]
        else:
            if not self.queued():
                self.virtual.pop(job.lane, None)
                self.accounts = {key: value for key, value in self.accounts.items() if key[0] != job.lane}
                job.score = EPOCH
            else:
                credit = CREDIT * len(self.at("lease")) * job.cost / job.weight
                behind = self.virtual.get(job.lane, EPOCH) - credit
                job.score = max(behind, self.accounts.get((job.lane, job.tenant), 0), 0)
            self.accounts[job.lane, job.tenant] = job.score + job.cost / job.weight
        self.jobs[job.id] = job
        self.away.discard(job.tenant)

    def claim(self, worker: str, lanes: list[tuple[str, int]], headroom: int = 0) -> tuple[int, list[ModelJob]]:
        """The code and the jobs that a CLAIM answers."""
        if self.mode == "paused":
            return 2, []
        self.promote()
        out: list[ModelJob] = []
        busy = len(self.running(worker=worker))
        if busy and self.ward == (worker, 1):
            return 3, []
        free = self.ward is None or self.ward[0] == worker or (not busy and self.ward[1] == 0)
        if self.at("line", "sus") and free:
            if busy:
                self.ward = (worker, 0)
                return 3, []
            self._serve(worker, "sus", 1, out)
            if out:
                self.ward = (worker, 1)
                return 0, out
            self.ward = None
        left, kept = max(limit for _, limit in lanes), False
        for lane, limit in lanes:
            kept |= self._serve(worker, lane, min(limit, left - len(out)), out, left - headroom)
        return 4 if kept else 0, out

    def _serve(self, worker: str, lane: str, limit: int, out: list[ModelJob], freely: int | None = None) -> bool:
        """Returns whether it left jobs because slots are kept; of ``out`` the first ``freely`` may be anybody's."""
        goal = len(out) + limit
        while len(out) < goal and (batch := self.at("line", lane)[: goal - len(out)]):
            if freely is not None and self.away:
                batch = batch[: max(freely - len(out), 1)]
                if len(out) >= freely and self._runs_more_than_its_share(batch[0].tenant):
                    return True
            last = batch[-1].score
            for job in batch:
                self._take(job, worker, out)
            if last > self.virtual.get(lane, 0):
                self.virtual[lane] = last
        return False

    def _runs_more_than_its_share(self, tenant: str) -> bool:
        tenants = {job.tenant for job in self.queued()} | self.away
        return len(self.running(tenant=tenant)) * len(tenants) > len(self.at("lease"))

    def _leaves(self, tenant: str) -> None:
        if not self.queued(tenant):
            self.away.add(tenant)

    def _take(self, job: ModelJob, worker: str, out: list[ModelJob]) -> None:
        if job.late == "deadline" or (job.late == "start" and not job.attempt and not job.n):
            job.place = "taken"
            self.end(job, "expired")
        elif job.parallel and len(self.running(tenant=job.tenant)) >= job.parallel:
            job.place = "parked"
        else:
            job.state, job.place, job.worker = "running", "lease", worker
            job.attempt, job.lease_out = job.attempt + 1, False
            self._leaves(job.tenant)
            out.append(job)

    def promote(self) -> None:
        """Lets go those whose pause is over."""
        for job in [job for job in self.at("delay") if job.due]:
            job.place, job.score = "line", job.enq_ms - HANDED_BACK

    def unpark(self, tenant: str) -> None:
        """The first parked job of a tenant goes back to its line."""
        for job in self.at("parked", tenant=tenant)[:1]:
            job.place = "line"

    def _stop_running(self, job: ModelJob) -> None:
        job.place, job.state = "", "queued"
        self.unpark(job.tenant)
        if job.lane == "sus":
            self.ward = None

    def hand_back(self, job: ModelJob, delayed: bool = False) -> None:
        """A running job waits again."""
        self._stop_running(job)
        if job.deaths >= SUSPECT_DEATHS:
            job.lane = "sus"
        job.place, job.due, job.worker = ("delay" if delayed else "line"), False, ""
        job.score = job.enq_ms - HANDED_BACK
        self.away.discard(job.tenant)

    def end(self, job: ModelJob, state: str) -> None:
        """The one end of a job."""
        if job.state == "running":
            self._stop_running(job)
        else:
            parked, job.place = job.place == "parked", ""
            if not parked:
                self.unpark(job.tenant)
        job.state, job.place = state, ""
        if state not in ("succeeded", "failed"):  # who asks again gets another job
            self.idempotency.pop(job.key, None)
            job.key = ""
        self._leaves(job.tenant)
        job.ends += "fq:inbox:t" in job.inbox

    def lose_worker(self, job: ModelJob) -> None:
        """Its worker is gone: back to the line, or dead."""
        job.deaths += 1
        if job.deaths >= MAX_DEATHS:
            self.end(job, "dead")
        else:
            self.hand_back(job)

    def finish(self, job: ModelJob, state: str, used: int) -> None:
        """What the worker says of its own job."""
        if state == "retry":
            job.retries += 1
            if job.retries <= MAX_RETRIES:
                return self.hand_back(job, delayed=True)
            return self.end(job, "dead")
        account = (job.lane, job.tenant)
        if self.at("line", job.lane) and account in self.accounts:
            self.accounts[account] += (used - job.cost) / job.weight
        return self.end(job, state)

    def reap(self) -> None:
        """Leases and clocks that ran out; all leases that did were set to the same moment."""
        self.promote()
        for job in sorted(self.running(place="lease"), key=lambda job: job.id):
            if job.lease_out:
                self.lose_worker(job)
        for job in sorted(self.jobs.values(), key=lambda job: job.id):
            if job.late and job.state not in TERMINAL:
                if job.late == "deadline" or (not job.attempt and not job.n):
                    self.end(job, "expired")
                else:
                    job.late = ""

    def reconcile(self, order: list[str]) -> None:
        """Finds a place for every job that lost its own; ``order``: in which the jobs are looked at."""
        for job in [self.jobs[job_id] for job_id in order]:
            if job.state == "running":
                if job.place == "lost":
                    job.place, job.lease_out = "lease", False
            elif job.place == "lost":
                job.place, job.score = "line", job.enq_ms - HANDED_BACK
            elif job.place == "parked" and not self.running(tenant=job.tenant):
                self.unpark(job.tenant)

    def revive(self, job: ModelJob, enq_ms: int, anew: bool) -> None:
        """A dead job's next life."""
        job.state, job.place, job.lane, job.late = "queued", "line", job.home, ""
        job.attempt = job.deaths = job.retries = 0
        job.enq_ms, job.score, job.worker = enq_ms, enq_ms - HANDED_BACK, ""
        job.inbox = ["*"]
        self.away.discard(job.tenant)
        if anew:
            job.log = []
