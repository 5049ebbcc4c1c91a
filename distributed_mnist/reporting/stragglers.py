"""Find the straggler: the rank that the others wait for, from the smoothed times of a step."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

_NEWEST_WEIGHT = 0.3
"""Weight of the newest interval in the running mean."""
EVEN_SHARE = 0.02
"""If the others wait less than this share of a step, the ranks count as even."""
_EVEN_PARTS = 1.1
"""Parts of a batch whose sizes differ by a smaller factor count as even."""


class StragglerTracker:
    """Takes the `ranks` field of `steps` events.

    Attributes: `busy` and `exchange`, the smoothed seconds per step by rank; `share`, the fraction of each
    batch that a rank computes, if it is known.
    """

    def __init__(self) -> None:
        self.busy: list[float] = []
        self.exchange: list[float] = []
        self.share: list[float] = []
        self._hosts: list[str] = []

    def start_group(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Forget the times of an earlier group. `ranks` has `rank`, `host` and `pid` for each rank."""
        self.busy, self.exchange, self.share = [], [], []
        hosts = [str(rank["host"]) for rank in ranks]
        self._hosts = hosts if len(set(hosts)) > 1 else []

    def add(self, ranks: Mapping[str, Sequence[float]]) -> None:
        """Add the `busy` and `exchange` times of one more interval, in seconds per step for each rank."""
        self.busy = _smoothed(self.busy, ranks["busy"])
        self.exchange = _smoothed(self.exchange, ranks["exchange"])
        self.share = list(ranks.get("share", ()))

    @property
    def slowest_rank(self) -> int:
        """The rank that the others wait for: the one that waits least itself."""
        return min(range(len(self.exchange)), key=self.exchange.__getitem__)

    @property
    def waiting_share(self) -> float:
        """The share of a step, 0 to 1, that the other ranks wait for the slowest rank, on average."""
        slowest = self.slowest_rank
        least = self.exchange[slowest]
        waits = [seconds - least for rank, seconds in enumerate(self.exchange) if rank != slowest]
        step = self.busy[slowest] + least
        return fmean(waits) / step if waits and step > 0 else 0.0

    def summary(self) -> str:
        """Describe the straggler in one line. If parts of a batch are uneven, add their range.

        The line is empty for one process, and on a device whose exchange times cannot be measured.
        """
        straggler = self.straggler()
        if not straggler or not uneven(self.share):
            return straggler
        return f"{straggler}; parts {min(self.share):.0%} to {max(self.share):.0%}"

    def straggler(self) -> str:
        """Describe the straggler; see `summary`."""
        if len(self.exchange) < 2 or not any(self.exchange):
            return ""
        if self.waiting_share < EVEN_SHARE:
            return "ranks even: no rank waits long for another"
        rank, share = self.slowest_rank, self.waiting_share
        host = f" on {self._hosts[rank]}" if self._hosts else ""
        return f"slowest: rank {rank}{host}; the others wait {share:.0%} of a step for it"


def uneven(shares: Sequence[float]) -> bool:
    """Return whether some ranks' parts of a batch are clearly larger than others (`--balance`)."""
    return bool(shares) and max(shares) > _EVEN_PARTS * min(shares)


def _smoothed(old: Sequence[float], new: Sequence[float]) -> list[float]:
    if len(old) != len(new):
        return list(new)
    return [
        (1 - _NEWEST_WEIGHT) * before + _NEWEST_WEIGHT * now for before, now in zip(old, new, strict=True)
    ]
