"""Cut each global batch into one part for each rank, for `--precision exact`; slower ranks may get less.

In exact arithmetic the cut does not change the result, so it may follow the measured speeds. It must be the
same on all ranks: it is computed in integers, from numbers that all ranks have gathered.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

_ONE = 2**16
"""One sample, as a fixed-point number."""
_LEAST_GAIN = 3
"""Percent: if a step would not be at least so much shorter, the parts stay."""
_FAR = 125
"""A rank that takes more than this percentage of the mean time, twice in a row, does so not by chance."""
_SMOOTHING = 4
"""Otherwise the parts move by this fraction of the way, 1 / 4, because differences are mostly noise."""


class Parts:
    """The part of each rank: contiguous samples of the global batch, in the order of ranks.

    `size` is the number of ranks. Parts are as even as possible at first. With `balance`, the number of
    samples in a full batch, `adjust` changes them, and leaves every rank at least one sample of a full
    batch: a rank that computes nothing could not be measured. Without it, they stay even.
    """

    def __init__(self, size: int, *, balance: int | None = None) -> None:
        self._weights = [1] * size
        """The size of each part, in proportion."""
        self._full = balance
        self._wanted = [(balance or 0) * _ONE // size] * size
        """How many samples of a full batch each rank would get if samples could be cut, smoothed."""
        self._far = set(range(size))
        """Ranks that took far more than the mean time in the interval before; at first all may have."""
        self._is_first = True

    def of(self, rank: int, count: int) -> range:
        """Return which of the `count` samples of a batch, or other things in order, are a rank's."""
        return range(*_cut(self._weights, count)[rank : rank + 2])

    def shares(self) -> list[float]:
        """Return the fraction of a batch that each rank takes."""
        return [weight / sum(self._weights) for weight in self._weights]

    def adjust(self, seconds: Sequence[float]) -> None:
        """Change the parts after an interval in which rank `i` computed `seconds[i]` seconds per step.

        Every rank must pass the same numbers. The first interval changes nothing, because the first step of
        a process is not typical.
        """
        if self._full is not None and not self._is_first and self._full > len(self._weights):
            counts = [len(self.of(rank, self._full)) for rank in range(len(self._weights))]
            times = [max(1, round(1e9 * each)) for each in seconds]  # nanoseconds
            far = {i for i, time in enumerate(times) if 100 * time * len(times) > _FAR * sum(times)}
            divisor = 1 if far & self._far else _SMOOTHING
            self._wanted = [
                old + (new - old) // divisor
                for old, new in zip(self._wanted, _balanced(counts, times), strict=True)
            ]
            self._far = far
            found = _whole(self._wanted, self._full)
            longest = max(new * time // old for new, time, old in zip(found, times, counts, strict=True))
            if 100 * longest <= (100 - _LEAST_GAIN) * max(times):
                self._weights = found
        self._is_first = False


def _balanced(counts: Sequence[int], times: Sequence[int]) -> list[int]:
    """Return the number of samples for each rank, in fixed point, so that all take the same time.

    A rank's speed is taken to be `counts[i] / times[i]`. A part of a step takes the same time however few
    samples there are, so the result lies between the present parts and the balance, never beyond it. If all
    ranks take the same time, the parts are as they should be.
    """
    speeds = [(count << 64) // time for count, time in zip(counts, times, strict=True)]
    return [sum(counts) * _ONE * speed // sum(speeds) for speed in speeds]


def _whole(wanted: Sequence[int], count: int) -> list[int]:
    """Round to whole samples, `count` in all: one for each rank, and the others as wanted."""
    ends = _cut([max(0, samples - _ONE) for samples in wanted], count - len(wanted))
    return [1 + after - before for before, after in pairwise(ends)]


def _cut(weights: Sequence[int], count: int) -> list[int]:
    """Return where parts of `count` things begin, and where the last one ends: rounded to nearest."""
    ends = [0, *accumulate(weights)]
    return [(2 * end * count + ends[-1]) // (2 * ends[-1]) for end in ends]
