"""Cut each global batch into one part for each rank, for `--precision exact`; slower ranks may get less.

In exact arithmetic the cut does not change the result, so it may follow the measured speeds. It must be the
same on all ranks: it is computed in integers, from numbers that all ranks have gathered.
"""

from collections.abc import Sequence
from itertools import accumulate

_WHOLE = 2**24  # the sum of all shares, about
_LEAST = 16  # a rank keeps this fraction of an even share, so that its speed can still be measured
_TOLERATED_PERCENT = 5


class Parts:
    """The part of each rank: contiguous samples of the global batch, in the order of ranks.

    `size` is the number of ranks. Parts are as even as possible at first, and stay so unless `balance`.
    """

    def __init__(self, size: int, *, balance: bool = False) -> None:
        self._shares = [_WHOLE // size] * size
        self._balance = balance
        self._is_first = True

    def of(self, rank: int, count: int) -> range:
        """Return which of the `count` samples of a batch are a rank's."""
        ends = [0, *accumulate(self._shares)]
        return range(ends[rank] * count // ends[-1], ends[rank + 1] * count // ends[-1])

    def shares(self) -> list[float]:
        """Return the fraction of a batch that each rank takes."""
        return [share / sum(self._shares) for share in self._shares]

    def adjust(self, seconds: Sequence[float]) -> None:
        """Change the parts after an interval in which rank `i` computed `seconds[i]` seconds per step.

        Every rank must pass the same numbers. The first interval changes nothing, because the first step of
        a process is not typical.
        """
        if self._balance and not self._is_first:
            self._shares = balanced(self._shares, seconds)
        self._is_first = False


def balanced(shares: Sequence[int], seconds: Sequence[float]) -> list[int]:
    """Return the shares with which the ranks would take more nearly the same time than with `shares`.

    A rank's target is its speed, share by time. It moves half of the way there, so noise changes little. If
    all ranks take the same time, each is at its target. A part of a step takes the same time however small
    a share is, so a target is never beyond the balance, and the shares do not oscillate.
    """
    size, nanoseconds = len(shares), [max(1, round(1e9 * time)) for time in seconds]
    if max(nanoseconds) * size * 100 < sum(nanoseconds) * (100 + _TOLERATED_PERCENT):
        return list(shares)
    speeds = [(share << 32) // time for share, time in zip(shares, nanoseconds, strict=True)]
    targets = [_WHOLE * speed // sum(speeds) for speed in speeds]
    return [
        max((share + target) // 2, _WHOLE // (_LEAST * size))
        for share, target in zip(shares, targets, strict=True)
    ]
