"""How a batch is cut into the ranks' parts, and how the parts follow the measured speeds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from distributed_mnist.gradients.exact.parts import Parts


def sizes(parts: Parts, count: int, ranks: int) -> list[int]:
    """The sizes of the parts, which must cover the batch without a gap."""
    spans = [parts.of(rank, count) for rank in range(ranks)]
    assert [sample for span in spans for sample in span] == list(range(count))
    return [len(span) for span in spans]


@dataclass
class Group:
    """Ranks that take `fixed` seconds in each step, and `each` for a sample."""

    fixed: Sequence[float]
    each: Sequence[float]
    batch: int = 512
    noise: float = 0.05

    def __post_init__(self) -> None:
        self.parts = Parts(len(self.each), balance=self.batch)
        self._random = random.Random(1)

    def sizes(self) -> list[int]:
        return sizes(self.parts, self.batch, len(self.each))

    def seconds(self) -> float:
        """The time of a step: that of the slowest rank."""
        return max(self._times())

    def best(self) -> float:
        """The time of a step if samples could be cut, each rank took the same time, and no noise."""
        least, most = max(self.fixed), max(self.fixed) + self.batch * max(self.each)
        for _ in range(60):
            middle = (least + most) / 2
            done = sum((middle - fixed) / each for fixed, each in zip(self.fixed, self.each, strict=True))
            least, most = (least, middle) if done >= self.batch else (middle, most)
        return most

    def run(self, intervals: int) -> list[float]:
        """Train for some intervals, and return how long a step takes after each, as multiples of the
        best."""
        found = []
        for _ in range(intervals):
            noise = [self._random.uniform(1 - self.noise, 1 + self.noise) for _ in self.each]
            self.parts.adjust([time * odd for time, odd in zip(self._times(), noise, strict=True)])
            found.append(self.seconds() / self.best())
        return found

    def _times(self) -> list[float]:
        found = zip(self.fixed, self.each, self.sizes(), strict=True)
        return [fixed + each * count for fixed, each, count in found]


@pytest.mark.parametrize("ranks", [1, 3, 8, 11, 64])
def test_parts_cover_every_batch_evenly(ranks: int) -> None:
    for count in (1, 5, 64, 512, 513):
        counts = sizes(Parts(ranks), count, ranks)
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("fixed", "each", "soon", "late"),
    [
        pytest.param([5e-3] * 2, [1e-4, 3e-4], 1.10, 1.05, id="slowed to a third"),
        pytest.param([5e-3] * 8, [1e-4] * 7 + [4e-4], 1.20, 1.08, id="one of eight slowed"),
        pytest.param([1e-2, 3e-2], [1e-4, 3e-4], 1.30, 1.05, id="much is the same for any part"),
        pytest.param([2e-3, 3e-3], [1e-5, 5e-4], 1.25, 1.10, id="a GPU and a CPU, 50 times slower"),
        pytest.param([2e-3] + [3e-3] * 3, [1e-5] + [5e-4] * 3, 1.75, 1.10, id="a GPU and three CPUs"),
        pytest.param([2e-3, 1e-2], [5e-6, 1e-3], 1.25, 1.15, id="a GPU and a CPU, 200 times slower"),
    ],
)
def test_a_slow_rank_soon_gets_less(
    fixed: list[float], each: list[float], soon: float, late: float
) -> None:
    """The first interval changes nothing; a quarter of a second each, the fourth ends after a second."""
    group = Group(fixed, each)
    found = group.run(30)
    assert found[0] > 1.3
    assert found[3] < soon
    assert max(found[15:]) < late


def test_a_rank_that_was_slow_gets_more_again_when_it_is_as_fast_as_the_others() -> None:
    group = Group([1e-3, 1e-3], [1e-4, 1.0])
    group.run(10)
    assert group.sizes() == [511, 1]  # one sample, so that its time can be measured
    group.each = [1e-4, 1e-4]
    assert group.run(6)[-1] < 1.08


@pytest.mark.parametrize(("ranks", "batch", "most"), [(2, 512, 1.001), (8, 512, 1.001), (11, 64, 1.02)])
def test_equal_ranks_keep_even_parts_beside_a_little_noise(ranks: int, batch: int, most: float) -> None:
    """Of 64 samples some ranks of 11 have six and take longer than those with five: nothing can help."""
    group = Group([5e-3] * ranks, [1e-4] * ranks, batch, noise=0.03)
    assert max(group.run(60)) < most


def test_much_noise_costs_little() -> None:
    """As on a loaded machine: an interval may take one rank twice as long as another."""
    group = Group([5e-3] * 2, [1e-4] * 2, noise=0.35)
    found = group.run(400)
    assert sum(found) / len(found) < 1.06


@pytest.mark.parametrize(("ranks", "batch"), [(11, 64), (11, 12), (11, 11), (11, 5), (2, 1), (1, 64)])
def test_parts_cover_a_small_batch_whatever_was_measured(ranks: int, batch: int) -> None:
    group = Group([1e-9] * ranks, [10.0 ** (-rank) for rank in range(ranks)], batch, noise=0.9)
    for _ in range(20):
        group.run(1)
        assert min(group.sizes()) >= min(batch // ranks, 1)
        for count in (1, 3, batch - 1):  # a short last batch
            sizes(group.parts, count, ranks)
    group.parts.adjust([0.0] * ranks)  # a clock that does not move
    group.parts.adjust([1e9] + [0.0] * (ranks - 1))
    assert sum(group.sizes()) == batch


def test_without_balance_and_after_the_first_interval_parts_stay() -> None:
    parts = Parts(2)
    for _ in range(3):
        parts.adjust([1.0, 9.0])
    assert sizes(parts, 512, 2) == [256, 256]
    balanced = Parts(2, balance=512)
    balanced.adjust([1.0, 9.0])
    assert balanced.shares() == [0.5, 0.5]
    balanced.adjust([1.0, 9.0])
    assert balanced.shares() == [461 / 512, 51 / 512]
