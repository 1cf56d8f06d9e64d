"""Holds records, logs, terminal events and clients' transcripts against each other when a run is over."""

import itertools
from collections.abc import Iterable, Sequence

from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.jobs import Job
from fastchat_q.keys import parse_public_job_id

from . import MODEL
from .engine import Orders
from .observer import Observer, Record
from .report import Report
from .transcript import Transcript

NAMES = keys.model_keys(MODEL)
MARGIN_S = 1.0
"""Clocks, and messages under way."""
GRACE_USED_S = 2.5
"""A client that was away for longer may have lost its job: half of the grace that servers give."""
PERSISTENT = frozenset(
    {NAMES.stat, NAMES.dead, NAMES.bell, NAMES.away, keys.WORKERS, keys.MODELS, keys.API_KEYS, keys.PEPPER}
)
"""Keys that may live for ever: each of them is bounded."""


class Checker:
    """Writes violations into the report."""

    def __init__(self, report: Report, observer: Observer, transcripts: Sequence[Transcript]) -> None:
        self._report, self._observer = report, observer
        self._transcripts = transcripts
        self._of_job: dict[str, list[Transcript]] = {}
        for transcript in transcripts:
            parsed = parse_public_job_id(transcript.job_id)
            if parsed is None:
                report.violate("not a job id", transcript.job_id)
            else:
                self._of_job.setdefault(parsed[1], []).append(transcript)

    def check(self, hits: Sequence[tuple[int, float]], outages: Sequence[tuple[float, float]]) -> None:
        """All that needs no Redis any more."""
        for job_id in sorted({*self._of_job, *self._observer.seen} - set(self._observer.records)):
            self._report.violate("an accepted job did not end, or vanished", job_id, self._who(job_id))
        for record in self._observer.records.values():
            self._report.count("jobs", record.state)
            self._report.count("tokens", "logged", record.n)
            self._report.count("accepted", "known to a client" if record.job_id in self._of_job else "reply lost")
            self._check_end(record)
            self._check_events(record, outages)
            self._check_lifetime(record)
            self._measure(record, hits)
            for transcript in self._of_job.get(record.job_id, []):
                self._check_transcript(transcript, record)
        for transcript in self._transcripts:
            self._report.count("transcripts", f"{transcript.intent}: {transcript.end or 'no end'}")
            self._report.pauses_s.append(transcript.pause_s)

    async def check_redis(self, redis: "Redis") -> None:
        """What must be left in Redis when nothing is to be done: next to nothing."""
        counters = {"queued": NAMES.queued, "running": NAMES.running}
        for what, name in counters.items():
            left = await redis.hgetall(name)  # type: ignore[misc]
            if left:
                self._report.violate(f"the counter of {what} jobs is not back to 0", name, str(left))
        lines = [NAMES.lease, NAMES.live, NAMES.delay, *(NAMES.waiting(lane) for lane in keys.ALL_LANES)]
        lines += [name.decode() async for name in redis.scan_iter(NAMES.parked("*"))]
        for name in lines:
            left = await redis.zrange(name, 0, 10)
            if left:
                self._report.violate("a line is not empty", name, str(left))
        for lane in keys.ALL_LANES:
            length = await redis.xlen(NAMES.stream(lane))
            if length:
                groups = await redis.xinfo_groups(NAMES.stream(lane))
                self._report.violate("a lane's stream is not empty", NAMES.stream(lane), f"{length} entries, {groups}")
        for name in [name.decode() async for name in redis.scan_iter("*", count=1000)]:
            structural = (
                name in PERSISTENT
                or name.startswith(keys.api_key(""))
                or any(name in (NAMES.stream(x), NAMES.tags(x)) for x in keys.ALL_LANES)
            )
            if not structural and await redis.pttl(name) == -1:
                self._report.violate("a key has no TTL", name)

    def _check_end(self, record: Record) -> None:
        """The state is one that this job may have."""
        readers = self._of_job.get(record.job_id, [])
        poison = any(reader.intent == "poison" for reader in readers) or _is_poison(record)
        if not poison:
            self._report.count("workers lost by a job", record.fields["deaths"])
        if record.state == "succeeded":
            self._check_result(record)
            if poison:
                self._violate("a poison job succeeded", record)
            if any(reader.length != record.n for reader in readers):
                self._violate("a job succeeded with another length", record, self._who(record.job_id))
        elif record.state == "dead":
            if not poison:
                self._violate("an innocent job is dead", record)
        elif record.state == "cancelled":
            if readers and not any(_may_be_cancelled(reader) for reader in readers):
                self._violate("a job was cancelled that somebody wanted", record, self._who(record.job_id))
        else:
            self._violate(f"a job ended as {record.state}", record)
        if poison and record.state != "dead":
            self._violate(f"a poison job ended as {record.state}", record)

    def _check_result(self, record: Record) -> None:
        """The end was written by the last attempt: the engine puts its attempt in the place of prompt tokens."""
        said = f'"prompt_tokens":{record.fields["attempt"]},"completion_tokens":{record.n}}}'
        if said not in record.fields["result"]:
            self._violate("the end was not written by the last attempt", record)

    def _check_events(self, record: Record, outages: Sequence[tuple[float, float]]) -> None:
        """One terminal event on every channel, and at least one if somebody could hear it."""
        heard = self._observer.ends.get(record.job_id, {})
        if any(count > 1 for count in heard.values()):
            self._violate("a job has more than one end event", record, str(dict(heard)))
        if (
            not heard
            and record.fields["inbox"].strip("* ")
            and not _within(record.done_s, [*self._observer.deaf, *outages])
        ):
            self._violate("a job has no end event", record)
        self._report.count("end events", "heard" if heard else "not heard (observer cut off)")

    def _check_lifetime(self, record: Record) -> None:
        if record.record_ttl_ms <= 0:
            self._violate("a record has no TTL", record, f"{record.record_ttl_ms} ms")
        if record.text and record.log_ttl_ms <= 0:
            self._violate("a log has no TTL", record, f"{record.log_ttl_ms} ms")

    def _check_transcript(self, transcript: Transcript, record: Record) -> None:
        """What the client has is the log, all of it or its beginning; its end is that of the record."""
        text = record.text
        self._report.count("tokens", "received", transcript.seen)
        if transcript.resumes:
            self._report.count("resumes", transcript.scenario, transcript.resumes)
        if not text.startswith(transcript.text):
            self._violate("a transcript differs from the log", record, transcript.text[-300:])
        if transcript.end == "done" and (transcript.text != text or record.state != "succeeded"):
            self._violate("a transcript ended, and the log goes on", record, transcript.text[-300:])
        wanted = transcript.intent in ("read", "cancel", "poison")
        if wanted and not transcript.end and not transcript.broken:
            self._violate("a client has no end", record, repr(transcript)[:500])
        if transcript.intent == "detach" and record.state != "succeeded":
            self._violate(f"a job that was to go on ended as {record.state}", record)
        codes = {"succeeded": "done", "cancelled": "cancelled", "dead": "job_dead"}
        if transcript.end and transcript.end != codes.get(record.state):
            self._violate(f"a client was told {transcript.end!r} of a job that {record.state}", record)

    def _measure(self, record: Record, hits: Sequence[tuple[int, float]]) -> None:
        history = record.history()
        if int(record.fields["attempt"]) > 1:
            self._report.count("recoveries", "jobs with several attempts")
        for (began, worker, ended, how), (resumed, *_) in itertools.pairwise(history):
            self._report.count("recoveries", how)
            fatal = [at for pid, at in hits if f"-{pid}-" in worker and began <= at <= ended]
            if fatal and how != "released":
                self._report.recoveries.append((round(resumed - fatal[0], 3), record.job_id))

    def _violate(self, what: str, record: Record, more: str = "") -> None:
        self._report.violate(what, record.job_id, f"{more}\n{record.evidence()}\n{self._who(record.job_id)}")

    def _who(self, job_id: str) -> str:
        readers = self._of_job.get(job_id, [])
        return "\n".join(
            f"client {r.scenario}/{r.intent} seen={r.seen}/{r.length} last_id={r.last_id} end={r.end!r} "
            f"resumes={r.resumes} away={r.away_s:.2f}s"
            for r in readers
        )


def _may_be_cancelled(reader: Transcript) -> bool:
    return reader.intent in ("leave", "cancel") or reader.away_s > GRACE_USED_S


def _is_poison(record: Record) -> bool:
    """What a job that nobody knows was to do; its spec is kept when it is dead."""
    spec = record.fields.get("spec")
    return spec is not None and Orders.model_validate_json(Job.from_spec(spec).messages[-1].text).poison_at is not None


def _within(moment: float, intervals: Iterable[tuple[float, float]]) -> bool:
    return any(began - MARGIN_S <= moment <= ended + MARGIN_S for began, ended in intervals)
