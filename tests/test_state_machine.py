"""Every order of events that Hypothesis can think of: after each step Redis agrees with `QueueModel`.

``FASTCHAT_Q_TEST_EXAMPLES=500`` looks deeper, and each time elsewhere;
``FASTCHAT_Q_TEST_SHRINK=1`` makes a failing run short (it takes minutes).
"""

import asyncio
import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fastchat_q import keys
from fastchat_q.errors import IdempotencyConflictError, QueueDrainingError, QueueFullError
from fastchat_q.events import Piece
from fastchat_q.jobs import Sampling
from fastchat_q.queue import Accepted, Claim, Finish, Terms
from fastchat_q.tokens import Chunk, Status, append

from . import protocol
from .protocol import DONE, MODEL, NAMES
from .queue_comparison import INBOX, PARALLEL, WEIGHTS, QueueComparison
from .queue_model import TERMINAL, ModelJob
from .stack import RedisServer

WORKERS = ("w1", "w2", "w3")
EXAMPLES = os.environ.get("FASTCHAT_Q_TEST_EXAMPLES")
SHRINK = os.environ.get("FASTCHAT_Q_TEST_SHRINK")
USED = 5  # tokens, as DONE says
pick = st.integers(0, 10**6)


class QueueMachine(QueueComparison):
    """The rules: what clients, workers, clocks and operators do."""

    def any_job(self, number: int, *states: str) -> ModelJob | None:
        """One of the jobs in these states."""
        found = [job for job in self.model.jobs.values() if job.state in states]
        return found[number % len(found)] if found else None

    def any_running(self, number: int) -> tuple[ModelJob, Claim] | None:
        """One of the running jobs, with its claim."""
        running = self.any_job(number, "running")
        if running is None:
            return None
        assert running.claim is not None
        return running, running.claim

    # --- clients ---

    @initialize(tenants=st.lists(st.sampled_from(sorted(WEIGHTS)), max_size=10), lane=st.sampled_from(keys.LANES))
    def a_rush(self, tenants: list[str], lane: str) -> None:
        """The day begins with some jobs in one lane."""
        plain = {"tokens": 40, "key": "", "body": "", "had": 0, "max_queued": 0, "max_waiting": 100, "detached": False}
        for tenant in tenants:
            self._enqueue(tenant=tenant, lane=lane, inbox=INBOX, **plain)

    @rule(
        tenant=st.sampled_from(sorted(WEIGHTS)),
        lane=st.sampled_from(keys.LANES),
        tokens=st.sampled_from([1, 40, 400]),
        key=st.sampled_from(["", "", "", "k1", "k2"]),
        body=st.sampled_from(["b1", "b1", "b2"]),
        max_queued=st.sampled_from([0, 0, 3]),
        max_waiting=st.sampled_from([100, 100, 100, 2]),
        had=st.sampled_from([0, 0, 0, 0, 2]),
        inbox=st.sampled_from([INBOX, INBOX, ""]),
        detached=st.booleans(),
    )
    def enqueue(self, **of: Any) -> None:
        """A request comes; the key may have been used before."""
        self._enqueue(**of)

    def _enqueue(self, tenant: str, lane: str, tokens: int, key: str, body: str, had: int, **of: Any) -> None:
        number = len(self.terms) + 1
        new = protocol.job(number, lane).model_copy(update={"sampling": Sampling(max_tokens=tokens)})
        terms = Terms(
            tenant=tenant,
            weight=WEIGHTS[tenant],
            max_parallel=PARALLEL[tenant],
            keep_s=3600.0,
            idempotency=(key, body) if key else None,
            **of,
        )
        self.terms[new.id] = (new, terms)
        known = f"{tenant}:{key}"
        model, before = self.model, self.model.idempotency.get(known) if key else None
        try:
            answer = self.do(self.queue.enqueue(new, terms, [(had, had, b'{"t":[],"s":""}')] if had else []))
        except IdempotencyConflictError:
            assert before is not None
            assert before[1] != body
            return
        except QueueDrainingError:
            assert before is None
            assert model.mode == "draining"
            return
        except QueueFullError:
            anywhere = self.do(self.redis.zcard(NAMES.live)) - self.do(self.redis.zcard(NAMES.lease))
            full = len(model.at("line", lane)) >= terms.max_waiting or anywhere >= 2 * terms.max_waiting
            assert before is None
            assert full or len(model.queued(tenant)) >= terms.max_queued > 0
            return
        if before is not None:
            assert before[1] == body
            assert answer == Accepted(before[0], 0)
            return
        assert model.mode != "draining"
        assert answer.job_id == new.id
        assert not 0 < terms.max_queued <= len(model.queued(tenant))
        words = (["*"] if terms.detached else []) + terms.inbox.split()
        enq_ms = int(self.field(new.id, "enq_ms"))
        fresh = ModelJob(
            new.id, tenant, terms.weight, new.cost, terms.max_parallel, lane, lane, enq_ms, 0.0, words, key and known
        )
        model.enqueue(fresh, had)
        ahead = len(model.at("line", "hi")) if lane == "lo" else 0
        assert answer.place == (1 if had else ahead + model.at("line", lane).index(fresh) + 1)
        if key:
            model.idempotency[known] = (new.id, body)

    @precondition(lambda self: self.any_job(0, "queued", "running", *TERMINAL))
    @rule(number=pick)
    def enqueue_again(self, number: int) -> None:
        """A resend after a lost reply."""
        before = self.any_job(number, "queued", "running", *TERMINAL)
        if before is not None:
            assert self.do(self.queue.enqueue(*self.terms[before.id])) == Accepted(before.id, 0)

    @precondition(lambda self: self.any_job(0, "queued", "running", *TERMINAL))
    @rule(number=pick)
    def cancel(self, number: int) -> None:
        """A client gives up, or asks for it again."""
        target = self.any_job(number, "queued", "running", *TERMINAL)
        if target is not None:
            assert self.do(self.queue.cancel(MODEL, target.id, "test")) == target.state
            if target.state not in TERMINAL:
                self.fence_out(target)
                self.model.end(target, "cancelled")

    @precondition(lambda self: self.any_job(0, "queued", "running"))
    @rule(number=pick, inbox=st.sampled_from([INBOX, "fq:inbox:u"]))
    def leave(self, number: int, inbox: str) -> None:
        """One of the readers leaves."""
        target = self.any_job(number, "queued", "running")
        if target is not None:
            assert self.do(self.queue.cancel(MODEL, target.id, "left", leaving=inbox)) == target.state
            rest = [word for word in target.inbox if word != inbox]
            if rest:
                target.inbox = rest
            else:
                self.fence_out(target)
                self.model.end(target, "cancelled")

    @precondition(lambda self: self.any_job(0, "queued", "running", *TERMINAL))
    @rule(number=pick, inbox=st.sampled_from([INBOX, "fq:inbox:u"]))
    def attach(self, number: int, inbox: str) -> None:
        """One more reader."""
        target = self.any_job(number, "queued", "running", *TERMINAL)
        if target is not None:
            assert self.do(self.queue.attach(MODEL, target.id, inbox, target.tenant)) is not None
            assert self.do(self.queue.attach(MODEL, target.id, inbox, "dora")) is None
            if target.state not in TERMINAL:
                target.inbox = [word for word in target.inbox if word != inbox] + [inbox]

    # --- workers ---

    @rule(
        worker=st.sampled_from(WORKERS),
        limits=st.tuples(st.integers(0, 4), st.integers(0, 4)),
        batch_first=st.booleans(),
        headroom=st.sampled_from([0, 1, 1, 4]),
    )
    def claim(self, worker: str, limits: tuple[int, int], batch_first: bool, headroom: int) -> None:
        """A worker with free slots. One that runs a suspect whose ward lapsed does not ask, as workers do."""
        lanes = list(zip(keys.LANES, limits, strict=True))
        if batch_first:
            lanes.reverse()
        self.take(worker, lanes, headroom)

    def take(self, worker: str, lanes: list[tuple[str, int]], headroom: int = 0) -> None:
        """A CLAIM, as the model has it."""
        if self.model.running(worker=worker, lane="sus") and self.model.ward != (worker, 1):
            return
        busy, self.nonce = len(self.model.running(worker=worker)), self.nonce + 1
        nonce = f"n{self.nonce}"
        taken = self.do(self.queue.claim(MODEL, worker, running=busy, lanes=lanes, nonce=nonce, headroom=headroom))
        code, expected = self.model.claim(worker, lanes, headroom)
        assert (taken.advice, [c.job_id for c in taken.claims]) == (code, [job.id for job in expected])
        for claim, held in zip(taken.claims, expected, strict=True):
            assert (claim.attempt, claim.n, claim.lane) == (held.attempt, held.n, held.lane)
            held.claim = claim
            if self.damaged:
                self.unindexed.add(claim.fence)
        if any(held.lane == "sus" for held in expected):
            assert (busy, len(expected)) == (0, 1), "a suspect runs alone"

    @precondition(lambda self: self.any_job(0, "running"))
    @rule(number=pick, ids=st.integers(1, 3), wrong=st.sampled_from(["", "", "", "again", "gap"]))
    def emit(self, number: int, ids: int, wrong: str) -> None:
        """Tokens: the next ones, those of a lost reply again, or with a hole before them."""
        if (found := self.any_running(number)) is None:
            return
        held, claim = found
        n, status = {
            "": (held.n + ids, Status.OK),
            "again": (held.n, Status.DUPLICATE),
            "gap": (held.n + ids + 1, Status.GAP),
        }[wrong]
        if n == 0:
            return
        [got] = self.do(append(self.redis, MODEL, [Chunk(claim, n, (Piece(tuple(range(ids)), "x"),))])).chunks
        assert got is status or (got is Status.UNHEARD and status is Status.OK)
        if status is Status.OK:
            assert (got is Status.UNHEARD) == ("*" not in held.inbox and INBOX not in held.inbox)
            held.log.append(n)
            held.place, held.lease_out = "lease", False

    @precondition(lambda self: self.any_job(0, "running"))
    @rule(number=pick, state=st.sampled_from(["succeeded", "failed", "retry", "retry"]), lost=st.booleans())
    def finish(self, number: int, state: Any, lost: bool) -> None:
        """The worker is done with a job; with a lost EMIT before it, it is refused."""
        if (found := self.any_running(number)) is None:
            return
        held, claim = found
        end = Finish(claim, held.n + lost, state, "test", DONE, backoff_s=3600.0)
        [status] = self.do(append(self.redis, MODEL, [], [end])).finishes
        assert status is (Status.GAP if lost else Status.OK)
        if not lost:
            self.fence_out(held)
            self.model.finish(held, state, USED)

    @precondition(lambda self: self.any_job(0, "running"))
    @rule(number=pick)
    def renew(self, number: int) -> None:
        """A sign of life."""
        if (found := self.any_running(number)) is not None:
            held, claim = found
            assert self.do(self.queue.renew(MODEL, [claim])) == []
            held.place, held.lease_out = "lease", False

    @precondition(lambda self: self.any_job(0, "running"))
    @rule(number=pick)
    def release(self, number: int) -> None:
        """A worker that drains."""
        if (found := self.any_running(number)) is not None:
            held, claim = found
            self.do(self.queue.release(MODEL, [claim]))
            self.fence_out(held)
            self.model.hand_back(held)

    @precondition(lambda self: self.zombies)
    @rule(number=pick)
    def a_zombie_wakes(self, number: int) -> None:
        """Whatever it says, nobody listens."""
        claim = self.zombies[number % len(self.zombies)]
        n = self.model.jobs[claim.job_id].n if claim.job_id in self.model.jobs else 0
        end = Finish(claim, n, "succeeded", "stop", DONE)
        answer = self.do(append(self.redis, MODEL, [Chunk(claim, n + 1, (Piece((1,), "z"),))], [end]))
        assert (answer.chunks, answer.finishes) == ([Status.LOST], [Status.LOST])
        assert self.do(self.queue.renew(MODEL, [claim])) == [claim]
        self.do(self.queue.release(MODEL, [claim]))

    @rule(worker=st.sampled_from(WORKERS), crashed=st.booleans(), knows=st.booleans())
    def disown(self, worker: str, crashed: bool, knows: bool) -> None:
        """Its process is gone, or the reply to its CLAIM was."""
        held = sorted(self.model.running(worker=worker), key=lambda job: job.id)
        known = [job.id for job in held[:1]] if knows and not crashed else []
        gone = [job for job in self.lease_order() if job.worker == worker and job.id not in known]
        back, dead = self.do(self.queue.disown(MODEL, worker, "test", crashed=crashed, known=known))
        assert back + dead == len(gone)
        for job in gone:
            self.fence_out(job)
            if crashed:
                self.model.lose_worker(job)
            else:
                self.model.hand_back(job)

    # --- clocks ---

    @precondition(lambda self: self.any_job(0, "running"))
    @rule(number=pick, reap=st.booleans())
    def a_lease_runs_out(self, number: int, reap: bool) -> None:
        """A worker froze."""
        target = self.any_job(number, "running")
        if target is not None and target.place == "lease":
            self.a_lease_runs_out_of(target)
            if reap:
                self.reap()

    def a_lease_runs_out_of(self, target: ModelJob) -> None:
        """Its last sign of life was long ago."""
        self.do(self.redis.zadd(NAMES.lease, {target.id: 1}))
        target.lease_out = True

    @rule()
    def reap(self) -> None:
        """What everybody does each second."""
        for job in self.model.running(place="lease"):
            if job.lease_out or job.late == "deadline":
                self.fence_out(job)
        for job in self.model.running(late="deadline"):
            self.fence_out(job)
        self.do(self.queue.reap(MODEL))
        self.model.reap()

    @precondition(lambda self: self.any_job(0, "running"))
    @rule(number=pick, times=st.integers(1, 3))
    def a_job_is_poison(self, number: int, times: int) -> None:
        """It takes worker after worker with it."""
        target = self.any_job(number, "running")
        for _ in range(times):
            if target is not None and target.place == "lease":
                self.a_lease_runs_out_of(target)
                self.reap()
                for worker in WORKERS:
                    if target.place == "line" and not self.model.running(worker=worker):
                        self.take(worker, [("hi", 4), ("lo", 4)])

    @precondition(lambda self: self.any_job(0, "queued", "running"))
    @rule(number=pick, clock=st.sampled_from(["start", "deadline"]))
    def a_clock_runs_out(self, number: int, clock: str) -> None:
        """Time passes."""
        target = self.any_job(number, "queued", "running")
        if target is None or (clock == "start" and (target.attempt or target.late)):
            return
        self.do(self.redis.zadd(NAMES.live, {target.id: 1}))
        self.set(target.id, "start_by_ms" if clock == "start" else "deadline_ms", target.enq_ms)
        target.late = clock

    @precondition(lambda self: self.model.at("delay"))
    @rule(number=pick)
    def a_pause_is_over(self, number: int) -> None:
        """A job that was to be tried again later."""
        delayed = self.model.at("delay")
        if delayed:
            target = delayed[number % len(delayed)]
            self.do(self.redis.zadd(NAMES.delay, {target.id: 1}))
            target.due = True

    @precondition(lambda self: self.model.away)
    @rule(number=pick)
    def a_tenant_stays_away(self, number: int) -> None:
        """It is not expected any more."""
        away = sorted(self.model.away)
        if away:
            tenant = away[number % len(away)]
            self.do(self.redis.zadd(NAMES.away, {tenant: 1}))
            self.model.away.remove(tenant)

    @precondition(lambda self: self.model.ward)
    @rule()
    def the_ward_is_not_heard_of(self) -> None:
        """Its key has a TTL."""
        self.do(self.redis.delete(NAMES.ward))
        self.model.ward = None

    # --- operators ---

    @rule(mode=st.sampled_from(["paused", "draining", "", "", ""]))
    def switch(self, mode: str) -> None:
        """Pauses, drains, or neither."""
        self.do(self.redis.set(NAMES.mode, mode) if mode else self.redis.delete(NAMES.mode))
        self.model.mode = mode

    @precondition(lambda self: self.any_job(0, "dead", "succeeded"))
    @rule(number=pick, anew=st.booleans())
    def revive(self, number: int, anew: bool) -> None:
        """A dead job gets another life; any other is left alone."""
        target = self.any_job(number, "dead", "dead", "succeeded")
        if target is None:
            return
        spec = self.terms[target.id][0].to_spec() if anew else ""
        done = self.call("revive", target.id, 600_000, 3_600_000, spec, 60_000)
        assert done == (target.state == "dead")
        if done:
            self.ended.pop(target.id, None)
            self.model.revive(target, int(self.field(target.id, "enq_ms")), anew)

    @precondition(lambda self: self.any_job(0, "dead", "failed"))
    @rule(number=pick)
    def drop(self, number: int) -> None:
        """A dead job is forgotten; any other is left alone."""
        target = self.any_job(number, "dead", "failed")
        if target is None:
            return
        assert self.call("drop", target.id) == (target.state == "dead")
        if target.state == "dead":
            del self.model.jobs[target.id]

    @rule(number=pick, tokens=st.integers(1, 3), stale=st.booleans())
    def restore(self, number: int, tokens: int, stale: bool) -> None:
        """A client has tokens that the log has not."""
        target = self.any_job(number, "queued", "running", "succeeded")
        if target is None:
            return
        have = target.n + stale
        done = self.do(self.queue.restore(MODEL, target.id, have, [(have + tokens, tokens, b'{"t":[],"s":""}')]))
        assert done == (0 if target.state in TERMINAL else 3 if stale else 1)
        if done == 1:
            target.log.append(have + tokens)
            if target.state == "running":
                self.fence_out(target)
                self.model.hand_back(target)

    @precondition(lambda self: len(self.model.jobs) > 2 and not self.damaged)
    @rule(lane=st.sampled_from(keys.ALL_LANES), destroy=st.booleans())
    def damage_a_stream(self, lane: str, destroy: bool) -> None:
        """XTRIM, or XGROUP DESTROY."""
        if self.do(self.redis.exists(NAMES.stream(lane))):
            if destroy:
                self.do(self.redis.xgroup_destroy(NAMES.stream(lane), keys.GROUP))
            else:
                self.do(self.redis.xtrim(NAMES.stream(lane), 0, approximate=False))
            self.damaged = True
            self.unindexed |= {job.claim.fence for job in self.model.running() if job.claim}

    @precondition(lambda self: len(self.model.jobs) > 4)
    @rule(what=st.sampled_from(["lease", "delay", *keys.ALL_LANES, *WEIGHTS, "counters"]))
    def delete_a_key(self, what: str) -> None:
        """DEL, or an eviction."""
        place = what if what in ("lease", "delay") else "line" if what in keys.ALL_LANES else "parked"
        name = {"lease": NAMES.lease, "delay": NAMES.delay}.get(what)
        if what in keys.ALL_LANES:
            name = NAMES.waiting(what)
            lost = self.model.at("line", lane=what)
        elif name is not None:
            lost = self.model.at(place)
        elif what == "counters":
            lost = []
            self.do(self.redis.hset(NAMES.running, "ghost", 7))
        else:
            name = NAMES.parked(what)
            lost = self.model.at("parked", tenant=what)
        if name is not None:
            self.do(self.redis.delete(name))
        for job in lost:
            job.place = "lost"
        self.damaged = True

    @rule()
    def reconcile(self) -> None:
        """What everybody does every five seconds; it ends with nothing to mend."""
        for _ in range(8):
            order = [i.decode() for i in self.do(self.redis.zrange(NAMES.live, 0, -1))]
            stuck = any(not self.model.running(tenant=job.tenant) for job in self.model.at("parked"))
            mended = self.do(self.queue.reconcile(MODEL))
            assert mended == 0 or self.damaged or stuck, "nothing was wrong"
            self.model.reconcile(order)
            if mended == 0:
                break
        else:
            raise AssertionError("it never ends")
        self.damaged = False


def test_redis_agrees_with_a_plain_model_of_the_protocol_whatever_happens(redis_server: RedisServer) -> None:
    QueueMachine.url = redis_server.url
    with asyncio.Runner() as QueueMachine.runner:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            QueueMachine,
            settings=settings(
                max_examples=int(EXAMPLES or 120),
                stateful_step_count=60,
                derandomize=EXAMPLES is None,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink] if SHRINK else [Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
