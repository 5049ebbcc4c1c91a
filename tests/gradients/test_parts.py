"""How a batch is cut into the ranks' parts, and how the parts follow the measured speeds."""

import random

import pytest

from distributed_mnist.gradients.parts import Parts


def sizes(parts: Parts, count: int, ranks: int) -> list[int]:
    """The sizes of the parts, which must cover the batch without a gap."""
    spans = [parts.of(rank, count) for rank in range(ranks)]
    assert [sample for span in spans for sample in span] == list(range(count))
    return [len(span) for span in spans]


def after(parts: Parts, intervals: int, seconds_per_image: list[float], fixed: float, noise: float) -> None:
    """Let ranks take `fixed` seconds per step and some per image, for some intervals."""
    random_numbers = random.Random(0)
    for _ in range(intervals):
        counts = sizes(parts, 512, len(seconds_per_image))
        parts.adjust(
            [
                (fixed + each * count) * random_numbers.uniform(1 - noise, 1 + noise)
                for each, count in zip(seconds_per_image, counts, strict=True)
            ]
        )


@pytest.mark.parametrize("ranks", [1, 3, 8, 11, 64])
def test_parts_cover_every_batch_evenly(ranks: int) -> None:
    for count in (1, 5, 64, 512, 513):
        counts = sizes(Parts(ranks), count, ranks)
        assert max(counts) - min(counts) <= 1


def test_a_slow_rank_gets_less_until_all_take_the_same_time() -> None:
    parts = Parts(3, balance=True)
    after(parts, 12, [1e-4, 1e-4, 3e-4], fixed=5e-3, noise=0.02)
    times = [
        5e-3 + each * count for each, count in zip([1e-4, 1e-4, 3e-4], sizes(parts, 512, 3), strict=True)
    ]
    assert max(times) < 1.06 * min(times)
    after(parts, 20, [1e-4, 1e-4, 1e-4], fixed=5e-3, noise=0.02)  # it is as fast as the others again
    assert min(sizes(parts, 512, 3)) > 150


def test_equal_ranks_keep_nearly_even_parts_and_nobody_is_left_without_work() -> None:
    even, stopped = Parts(2, balance=True), Parts(2, balance=True)
    after(even, 50, [1e-4, 1e-4], fixed=1e-3, noise=0.1)
    assert min(sizes(even, 512, 2)) > 220
    after(stopped, 50, [1e-4, 1.0], fixed=1e-3, noise=0.0)
    assert 512 // 32 <= min(sizes(stopped, 512, 2)) < 40


def test_without_balance_and_after_the_first_interval_parts_stay() -> None:
    parts = Parts(2)
    after(parts, 5, [1e-4, 9e-4], fixed=0.0, noise=0.0)
    assert sizes(parts, 512, 2) == [256, 256]
    parts = Parts(2, balance=True)
    after(parts, 1, [1e-4, 9e-4], fixed=0.0, noise=0.0)
    assert parts.shares() == [0.5, 0.5]
