"""The findings of `dmnist doctor`: each is good, doubtful or bad, and has advice unless it is good."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Verdict = Literal["good", "doubtful", "bad"]
_BEST_TO_WORST: Sequence[Verdict] = ("good", "doubtful", "bad")


@dataclass(frozen=True)
class Finding:
    """One line of the screen. The fields are those of `findings` in `--json`."""

    name: str
    verdict: Verdict
    value: str
    advice: str = ""
    """What to do; empty if the verdict is good."""

    def named(self, name: str) -> "Finding":
        """Return this finding with its name, which the code that finds it need not know."""
        return replace(self, name=name)


def good(value: str) -> Finding:
    """Make a good finding, still without a name."""
    return Finding("", "good", value)


def doubtful(value: str, advice: str) -> Finding:
    """Make a finding for something that works but may not be what the user meant."""
    return Finding("", "doubtful", value, advice)


def bad(value: str, advice: str) -> Finding:
    """Make a finding for something that will make training fail."""
    return Finding("", "bad", value, advice)


def run_probe(name: str, probe: Callable[[], Finding], advice: str, seconds: float = 20.0) -> Finding:
    """Run a probe and return its finding.

    A probe that raises, or that does not return in time (as on a file system whose server is gone), gives
    a bad finding, and the other probes still run.
    """
    finding = bad(f"no answer within {seconds:g} s", advice)

    def target() -> None:
        nonlocal finding
        try:
            finding = probe()
        except Exception as error:
            finding = bad(f"{type(error).__name__}: {error}", advice)

    # A daemon thread, because a probe that never returns must not keep the process from ending.
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    return finding.named(name)


def worst(findings: Sequence[Finding]) -> Verdict:
    """Return the worst verdict; good if there are no findings."""
    verdicts: list[Verdict] = ["good", *(finding.verdict for finding in findings)]
    return max(verdicts, key=_BEST_TO_WORST.index)


def merge(by_rank: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """Merge the findings of several ranks: equal ones become one line, others name their ranks.

    `by_rank` has each rank's name and its findings, with the same names in the same order on every rank.
    """
    merged: list[Finding] = []
    for findings in zip(*(findings for _, findings in by_rank), strict=True):
        ranks_of: dict[Finding, list[str]] = {}
        for (rank_name, _), finding in zip(by_rank, findings, strict=True):
            ranks_of.setdefault(finding, []).append(rank_name)
        for finding, ranks in ranks_of.items():
            value = f"{first_few(ranks)}: {finding.value}" if len(ranks_of) > 1 else finding.value
            merged.append(Finding(finding.name, finding.verdict, value, finding.advice))
    return merged


def first_few(names: Sequence[str]) -> str:
    """List the first three names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
