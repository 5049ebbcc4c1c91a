"""What `dmnist doctor` finds: a line each, good, doubtful or bad, and what to do about it."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["good", "doubtful", "bad"]
_RANKED: Sequence[Verdict] = ("good", "doubtful", "bad")


@dataclass(frozen=True)
class Finding:
    """One line."""

    name: str
    verdict: Verdict
    value: str
    advice: str = ""
    """What to do; empty where all is good."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def good(name: str, value: str) -> Finding:
    """As it should be."""
    return Finding(name, "good", value)


def doubtful(name: str, value: str, advice: str) -> Finding:
    """It works, but may not be what was meant."""
    return Finding(name, "doubtful", value, advice)


def bad(name: str, value: str, advice: str) -> Finding:
    """It will fail."""
    return Finding(name, "bad", value, advice)


def tried(name: str, probe: Callable[[], Finding], advice: str, seconds: float = 20.0) -> Finding:
    """What a probe finds; one that fails by itself, or does not come back (a file system whose server is
    gone), is bad news, not the end of the examination."""
    found = bad(name, f"no answer within {seconds:g} s", advice)

    def look() -> None:
        nonlocal found
        try:
            found = probe()
        except Exception as error:
            found = bad(name, f"{type(error).__name__}: {error}", advice)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(seconds)
    return found


def worst(findings: Sequence[Finding]) -> Verdict:
    """The worst verdict among them."""
    found = [_RANKED.index(finding.verdict) for finding in findings]
    return _RANKED[max(found, default=0)]


def merged(by_rank: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """One list of several ranks': a value that all share stands once, others with who has them.

    `by_rank` has each rank's name and its findings, of the same names in the same order.
    """
    lines: list[Finding] = []
    for row in zip(*(findings for _, findings in by_rank), strict=True):
        owners: dict[Finding, list[str]] = {}
        for (who, _), finding in zip(by_rank, row, strict=True):
            owners.setdefault(finding, []).append(who)
        for finding, whose in owners.items():
            told = f"{some(whose)}: {finding.value}" if len(owners) > 1 else finding.value
            lines.append(Finding(finding.name, finding.verdict, told, finding.advice))
    return lines


def some(names: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
