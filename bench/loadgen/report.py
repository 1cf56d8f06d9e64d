"""What a run came to: counted while it goes, summed up at its end, told as text or JSON."""

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from .answers import Answer
from .config import Config

ERRORS_KEPT = 5
CLIENT_BOUND_CORE_SHARE = 0.8  # above this share of a core the generator itself may be the limit


@dataclass(frozen=True, slots=True)
class QuantilesMs:
    """Nearest-rank quantiles in milliseconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU time of one process over the run; None where the process was gone at the end.

    The costs divide by what ended ok, so failed requests inflate them.
    """

    name: str
    cpu_s: float | None
    us_per_token: float | None
    us_per_request: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What a run measured. Tokens, events and latencies are those of requests that ended ok, and of no others.

    `ttft_ms` is request sent -> first content event. `gap_ms` is between content events of one stream: 0 for events
    that arrived in one read.
    """

    config: Config
    ok: int
    failed: int
    not_sent: int  # because no slot was left: one that cannot connect ends
    errors: Mapping[str, int]  # the first few distinct texts, and how often each came
    wall_s: float  # first request sent -> last request ended
    requests_per_s: float
    tokens: int
    tokens_per_s: float
    content_events: int
    content_events_per_s: float
    ttft_ms: QuantilesMs | None
    gap_ms: QuantilesMs | None
    e2e_ms: QuantilesMs | None
    cpu: tuple[CpuUse, ...]  # the named processes in the order given, then the generator itself

    @property
    def clean(self) -> bool:
        """Every request asked for was sent and ended ok."""
        return self.ok == self.config.requests


class Tally:
    """What the requests of one run came to so far."""

    def __init__(self) -> None:
        self.ok = 0
        self.failed = 0
        self.tokens = 0
        self.content_events = 0
        self.ttft_s = array("d")
        self.e2e_s = array("d")
        self.gaps_s = array("d")
        self.zero_gaps = 0
        self.errors: dict[str, int] = {}
        self.last_end_s = 0.0

    def add_ok(self, answer: Answer, sent_at_s: float, now_s: float) -> None:
        """Count a whole answer."""
        self.ok += 1
        self.last_end_s = now_s
        self.e2e_s.append(now_s - sent_at_s)
        self.tokens += answer.tokens
        if answer.first_at_s is not None:
            self.ttft_s.append(answer.first_at_s - sent_at_s)
            self.content_events += answer.content_events
            self.gaps_s.extend(answer.gaps_s)
            self.zero_gaps += answer.content_events - 1 - len(answer.gaps_s)

    def add_failed(self, text: str, now_s: float) -> None:
        """Count a failure, and keep the first few distinct texts."""
        self.failed += 1
        self.last_end_s = now_s
        if text in self.errors or len(self.errors) < ERRORS_KEPT:
            self.errors[text] = self.errors.get(text, 0) + 1

    def report(self, config: Config, wall_s: float, cpu_s: Sequence[tuple[str, float | None]]) -> Report:
        """Sum up."""
        return Report(
            config=config,
            ok=self.ok,
            failed=self.failed,
            not_sent=config.requests - self.ok - self.failed,
            errors=dict(self.errors),
            wall_s=wall_s,
            requests_per_s=self.ok / wall_s,
            tokens=self.tokens,
            tokens_per_s=self.tokens / wall_s,
            content_events=self.content_events,
            content_events_per_s=self.content_events / wall_s,
            ttft_ms=quantiles_ms(self.ttft_s),
            gap_ms=quantiles_ms(self.gaps_s, self.zero_gaps),
            e2e_ms=quantiles_ms(self.e2e_s),
            cpu=tuple(CpuUse(name, s, _us_per(s, self.tokens), _us_per(s, self.ok)) for name, s in cpu_s),
        )


def _us_per(cpu_s: float | None, count: int) -> float | None:
    return cpu_s * 1e6 / count if cpu_s is not None and count else None


def quantiles_ms(values_s: Sequence[float], zeros: int = 0) -> QuantilesMs | None:
    """Quantiles of some seconds, plus that many values of 0 that nobody stored. None of nothing."""
    ordered = sorted(values_s)
    total = zeros + len(ordered)
    if not total:
        return None

    def at(share: float) -> float:
        rank = max(0, math.ceil(share * total) - 1)
        return 0.0 if rank < zeros else ordered[rank - zeros] * 1e3

    return QuantilesMs(p50=at(0.50), p90=at(0.90), p99=at(0.99))


def to_json(report: Report) -> str:
    """The report as JSON, without the API key."""
    fields = asdict(report)
    del fields["config"]["api_key"]
    return json.dumps(fields, indent=2)


def to_text(report: Report) -> str:
    """The report for a reader."""
    lines = [
        f"requests   ok {report.ok}  failed {report.failed}  {report.requests_per_s:.1f} requests/s",
        f"wall s     {report.wall_s:.3f}",
        f"tokens     {report.tokens}  {report.tokens_per_s:.0f} tokens/s",
        f"events     {report.content_events}  {report.content_events_per_s:.0f} content events/s",
        _quantiles_line("ttft ms", report.ttft_ms),
        _quantiles_line("gap ms", report.gap_ms),
        _quantiles_line("e2e ms", report.e2e_ms),
        *(_cpu_line(use) for use in report.cpu),
        *(f"note       {note}" for note in _notes(report)),
        *(f"error      {count} x {text}" for text, count in report.errors.items()),
    ]
    return "\n".join(lines)


def _quantiles_line(name: str, values: QuantilesMs | None) -> str:
    figures = f"p50 {values.p50:.3f}  p90 {values.p90:.3f}  p99 {values.p99:.3f}" if values else "-"
    return f"{name:<10} {figures}"


def _cpu_line(use: CpuUse) -> str:
    if use.cpu_s is None:
        return f"cpu        {use.name}: gone before the end"
    per_token = f"{use.us_per_token:.2f}" if use.us_per_token is not None else "-"
    per_request = f"{use.us_per_request:.1f}" if use.us_per_request is not None else "-"
    return f"cpu        {use.name}: {per_token} us/token  {per_request} us/request  {use.cpu_s:.2f} s"


def _notes(report: Report) -> list[str]:
    notes = []
    if report.not_sent:
        notes.append(f"{report.not_sent} requests not sent: no slot could connect any more")
    own_s = report.cpu[-1].cpu_s or 0.0
    if report.ok and own_s > CLIENT_BOUND_CORE_SHARE * report.wall_s:
        notes.append(f"the generator used {own_s / report.wall_s:.0%} of a core: it may be the limit")
    return notes
