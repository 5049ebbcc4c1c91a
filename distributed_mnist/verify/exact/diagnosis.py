"""Find out which rank computed what wrongly. Pure functions of what the ranks report."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .traced_pass import Trace


@dataclass(frozen=True)
class Report:
    """What one rank of a group says about a step with a wrong answer."""

    damage: str = ""
    """Which weights are not what they were, and since when; empty if all are."""
    damaged_step: int = 0
    own: Trace = field(default_factory=dict)
    """What it computed of its own part."""
    received: Trace = field(default_factory=dict)
    """The sums that it got after the exchange."""
    again: Sequence[Trace] = ()
    """What it computes of every part of the group when it repeats the step."""
    total: Trace = field(default_factory=dict)
    """The sums of these parts."""


@dataclass(frozen=True)
class Finding:
    """What is wrong on a rank. The fields are those of `findings` in `--json`."""

    rank: int
    step: int
    """Counts from one."""
    what: str
    """Which layer or tensor is wrong."""
    repeated: str
    """What happened when the rank repeated the step."""


def judge(group: Sequence[int], reports: Sequence[Report], known: Trace, step: int) -> list[Finding]:
    """Return what is wrong in a group whose sums in this step are not the known ones.

    `reports` are those of the group. Who reaches the known sums when the step is repeated is right; if
    nobody does, the majority is.
    """
    sound = [report.total == known for report in reports]
    votes = Counter(str(report.again) for report in reports)
    right = max(range(len(group)), key=lambda i: (sound[i], votes[str(reports[i].again)]))
    reference, findings = reports[right], []
    for index, (rank, report) in enumerate(zip(group, reports, strict=True)):
        again = "right when repeated" if sound[index] else "wrong again when repeated"
        if report.damage:
            findings.append(Finding(rank, report.damaged_step, report.damage, again))
            continue
        pairs = [(reference.again[index], report.own), *zip(reference.again, report.again, strict=True)]
        what = next((wrong for pair in pairs if (wrong := first_difference(*pair))), "")
        if what:
            findings.append(Finding(rank, step, what, again))
    if not findings:  # all parts are right, so a sum was wrong on its way
        for index, (rank, report) in enumerate(zip(group, reports, strict=True)):
            if what := first_difference(reference.total, report.received):
                what = f"the sum that it received: {what}"
                findings.append(Finding(rank, step, what, "right when repeated" if sound[index] else ""))
    if not findings:  # all agree, on something else than the known answer
        what = first_difference(known, reference.total) or "the sums"
        findings = [Finding(rank, step, what, "every rank computes the same") for rank in group]
    return findings


def first_difference(right: Trace, other: Trace) -> str:
    """Return the name of the first thing that differs; empty if nothing does."""
    return next((name for name, value in right.items() if other.get(name) != value), "")
