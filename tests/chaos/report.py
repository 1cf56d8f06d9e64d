"""What a run found: violations with their evidence, and counts. The table for people, JSON for machines."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHOWN = 20
SLOWEST = 10


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept."""

    what: str
    subject: str
    """A job id, or a process."""
    evidence: str = ""


@dataclass(slots=True)
class Report:
    """Collected by all parts of a run."""

    seed: int
    minutes: float
    mutant: str | None
    began: float = field(default_factory=time.monotonic)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    pauses_s: list[float] = field(default_factory=list)
    """Longest pause between two events of each stream."""
    resumes_s: list[float] = field(default_factory=list)
    """From the moment a client's connection was gone to the head of the next one's response."""
    recoveries: list[tuple[float, str]] = field(default_factory=list)
    """From the moment a worker was hit to the next claim of each job that it ran; and which job."""
    timeline: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    def count(self, group: str, name: str, by: int = 1) -> None:
        """One more of something."""
        self.counts.setdefault(group, Counter())[name] += by

    def note(self, what: str) -> None:
        """A line of the timeline."""
        self.timeline.append(f"{time.monotonic() - self.began:7.2f} {what}")

    def violate(self, what: str, subject: str, evidence: str = "") -> None:
        """A promise was not kept."""
        self.violations.append(Violation(what, subject, evidence))
        self.note(f"VIOLATION {what}: {subject}")

    def write_json(self, path: Path) -> None:
        """The whole report."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The whole report, as JSON takes it."""
        return {
            "seed": self.seed,
            "minutes": self.minutes,
            "mutant": self.mutant,
            "seconds": round(time.monotonic() - self.began, 1),
            "counts": {group: dict(counter.most_common()) for group, counter in sorted(self.counts.items())},
            "pauses_s": percentiles(self.pauses_s),
            "resumes_s": percentiles(self.resumes_s),
            "recoveries_s": percentiles([seconds for seconds, _ in self.recoveries]),
            "slowest_recoveries": sorted(self.recoveries, reverse=True)[:SLOWEST],
            "violations": [{"what": v.what, "subject": v.subject, "evidence": v.evidence} for v in self.violations],
            "timeline": self.timeline,
        }

    def table(self) -> str:
        """The summary for people."""
        lines = [f"chaos seed={self.seed} minutes={self.minutes:g} mutant={self.mutant or '-'}"]
        for group, counter in sorted(self.counts.items()):
            total = sum(counter.values())
            lines.append(f"{group} ({total}): " + ", ".join(f"{name} {n}" for name, n in counter.most_common()))
        measured = {
            "longest pause of a stream": self.pauses_s,
            "coming back of a client": self.resumes_s,
            "recovery of a job": [seconds for seconds, _ in self.recoveries],
        }
        for name, values in measured.items():
            figures = ", ".join(f"{p} {value:.2f} s" for p, value in percentiles(values).items())
            lines.append(f"{name} ({len(values)}): {figures}")
        kinds = Counter(v.what for v in self.violations)
        lines.append(f"violations: {len(self.violations)}" + "".join(f"\n  {n} x {what}" for what, n in kinds.items()))
        for violation in self.violations[:SHOWN]:
            lines.append(f"--- {violation.what}: {violation.subject}")
            lines += ["    " + line for line in violation.evidence.splitlines()]
        return "\n".join(lines)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the maximum; empty without values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    ranks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[round(rank * (len(ordered) - 1))], 3) for name, rank in ranks.items()}
