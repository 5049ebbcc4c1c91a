"""Find out which rank is wrong, and where, or which link. Pure functions of what the ranks report."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .traced_pass import Trace


@dataclass(frozen=True)
class Report:
    """What one rank of a group says about a step that had a wrong result."""

    damage: str = ""
    """Which weight changed in memory during the step; empty if none did."""
    own: Trace = field(default_factory=dict)
    """What it computed of its own part."""
    received: Trace = field(default_factory=dict)
    """What it had after the exchange: the results of the whole batch."""
    again: Sequence[Trace] = ()
    """What it computes of the part of each rank of the group when it repeats the step."""
    total: Trace = field(default_factory=dict)
    """The results of the whole batch when it repeats the step."""


@dataclass(frozen=True)
class Finding:
    """What is wrong on a rank. The fields are among those of `findings` in `--json`."""

    rank: int
    step: int
    """Counts from one."""
    what: str
    """Which layer or tensor is wrong."""
    repeated: str = ""
    """What happened when the rank repeated the step; empty if it could not."""
    received: bool = False
    """Whether the rank computed its part rightly, but received a wrong result from the other ranks."""


@dataclass(frozen=True)
class Suspect:
    """What is to be replaced: a rank's host or device, or a link."""

    rank: int
    sender: int | None = None
    """Of a link, the rank that sent; -1 if it may be any."""


def judge(group: Sequence[int], reports: Sequence[Report], known: Trace, step: int) -> list[Finding]:
    """Return what is wrong in a group whose results of this step are not the known ones.

    `reports` are those of the group. The known results decide: a rank that reaches them when it repeats the
    step is right, and knows what each part should have been.
    """
    totals = [report.total for report in reports]
    right = next((report for report in reports if report.total == known), None)
    findings = []
    for index, (rank, report) in enumerate(zip(group, reports, strict=True)):
        what = report.damage
        if right is not None:
            what = what or first_difference(right.again[index], report.own)
        what = what or first_difference(known, report.total)
        if what:
            findings.append(Finding(rank, step, what, _repeated(report, totals, known)))
    if findings:
        return findings
    return [  # all have computed their parts rightly, so a result was wrong on its way
        Finding(rank, step, what, received=True)
        for rank, report in zip(group, reports, strict=True)
        if (what := first_difference(known, report.received))
    ]


def _repeated(report: Report, totals: Sequence[Trace], known: Trace) -> str:
    if report.total == known:
        return "right when repeated"
    others = totals.count(report.total) - 1
    alike = f", and {others} other rank{'s' if others > 1 else ''} computed the same" if others else ""
    return f"wrong again when repeated{alike}"


def suspect(finding: Finding, group: Sequence[int]) -> Suspect:
    """Return what a finding in a group is evidence against."""
    if not finding.received:
        return Suspect(finding.rank)
    others = [rank for rank in group if rank != finding.rank]
    return Suspect(finding.rank, others[0] if len(others) == 1 else -1)


def first_difference(right: Trace, other: Trace) -> str:
    """Return the name of the first thing that differs; empty if nothing does."""
    return next((name for name, value in right.items() if other.get(name) != value), "")
