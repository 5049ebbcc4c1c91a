"""Who holds the others up: the ranks' times of a step, smoothed, as a line for people."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

_NEWEST = 0.3
"""Weight of the newest stretch of steps in the running mean."""
EVEN = 0.02
"""Share of a step below which nobody waits for anybody."""


class StragglerTracker:
    """Takes the `ranks` of `steps` events; `busy` and `exchange` are seconds a step by rank, smoothed."""

    def __init__(self) -> None:
        self.busy: list[float] = []
        self.exchange: list[float] = []
        self._hosts: list[str] = []

    def begin(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """A group of processes starts: each rank's `rank`, `host` and `pid`."""
        self.busy, self.exchange = [], []
        hosts = [str(rank["host"]) for rank in ranks]
        self._hosts = hosts if len(set(hosts)) > 1 else []

    def add(self, ranks: Mapping[str, Sequence[float]]) -> None:
        """The times of one more stretch of steps."""
        self.busy = _mixed(self.busy, ranks["busy"])
        self.exchange = _mixed(self.exchange, ranks["exchange"])

    @property
    def slowest(self) -> int:
        """The rank that the others wait for: the one that waits least itself."""
        return min(range(len(self.exchange)), key=self.exchange.__getitem__)

    @property
    def share(self) -> float:
        """Of a step, what the others wait for the slowest rank, on average: 0 to 1."""
        least = self.exchange[self.slowest]
        others = [each - least for rank, each in enumerate(self.exchange) if rank != self.slowest]
        step = self.busy[self.slowest] + least
        return fmean(others) / step if others and step > 0 else 0.0

    def line(self) -> str:
        """For people; empty for one process, and where the device hides what is exchange."""
        if len(self.exchange) < 2 or not any(self.exchange):
            return ""
        if self.share < EVEN:
            return "ranks even: nobody waits long for another"
        where = f" on {self._hosts[self.slowest]}" if self._hosts else ""
        return f"slowest: rank {self.slowest}{where}; the others wait {self.share:.0%} of a step for it"


def _mixed(old: Sequence[float], new: Sequence[float]) -> list[float]:
    if len(old) != len(new):
        return list(new)
    return [(1 - _NEWEST) * before + _NEWEST * now for before, now in zip(old, new, strict=True)]
