"""Test that the ledger returns what was recorded, and that the digest of ids is the chain done by hand."""

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks

from distributed_mnist.common.digest import START_OF_CHAIN
from distributed_mnist.common.placement import ALONE
from distributed_mnist.distributed.world import World
from distributed_mnist.training.batches import Batch
from distributed_mnist.training.ledger import IntervalRecord, Ledger

CPU = torch.device("cpu")
WORLD = World(ALONE, CPU, "none")
BATCH, SHARDS, STEPS = 10, 4, 12
SIZES = [10, 10, 10, 3] * 3
"""Three epochs of 33 samples; the last batch of each has fewer samples than shards."""

ORDER = [np.random.default_rng(epoch).permutation(33) for epoch in range(3)]


def ids_of(step: int) -> list[int]:
    epoch, b = divmod(step, 4)
    return ORDER[epoch][b * BATCH : (b + 1) * BATCH].tolist()


def losses_of(step: int) -> NDArray[np.float32]:
    """Return a loss for each position of the global batch."""
    return (1 + step + 0.1 * np.arange(SIZES[step])).astype(np.float32)


def spans(step: int) -> list[tuple[int, int, int]]:
    """Return (shard, start, stop) for the shards that hold samples."""
    n = SIZES[step]
    cuts = [(v, v * n // SHARDS, (v + 1) * n // SHARDS) for v in range(SHARDS)]
    return [(v, a, b) for v, a, b in cuts if a < b]


def logits_for(labels: torch.Tensor, correct: int) -> torch.Tensor:
    """Return logits that are correct on the first `correct` samples and wrong on the rest."""
    guesses = torch.where(torch.arange(len(labels)) < correct, labels, (labels + 1) % 10)
    return torch.nn.functional.one_hot(guesses, 10).float()


def record(
    ledger: Ledger, step: int, a: int, b: int, losses: Sequence[float], ids: list[int] | None = None
) -> int:
    """Record positions `a` to `b` of a step in one call; return the number of correct predictions."""
    chosen = np.array(ids_of(step)[a:b] if ids is None else ids)
    labels = torch.from_numpy(chosen % 10)
    correct = (step + a) % (b - a + 1)
    batch = Batch(torch.empty(len(chosen), 0), labels, chosen, a)
    ledger.record(batch, torch.tensor(losses), logits_for(labels, correct))
    return correct


def keep(
    intervals: list[int], *, bad: dict[tuple[int, int], float] | None = None
) -> tuple[list[IntervalRecord], list[int], str]:
    """Record all steps in intervals of these lengths; return records, correct counts and final digest."""
    ledger = Ledger(max(intervals), BATCH, CPU)
    digest, made, correct, step = START_OF_CHAIN, [], [], 0
    for length in intervals:
        correct.append(0)
        for _ in range(length):
            ledger.open(step, SIZES[step])
            losses = losses_of(step).tolist()
            for (at, position), loss in (bad or {}).items():
                if at == step:
                    losses[position] = loss
            for _, a, b in spans(step):
                correct[-1] += record(ledger, step, a, b, losses[a:b])
            step += 1
        assert len(ledger) == length
        interval, digest = ledger.close(WORLD, digest)
        assert len(ledger) == 0
        made.append(interval)
    assert step == STEPS
    return made, correct, digest


def chained(steps: list[list[int]]) -> str:
    """Compute the chain by hand: SHA-256 of the previous link and the ids as 64-bit numbers."""
    link = hashlib.sha256(b"").digest()
    for ids in steps:
        link = hashlib.sha256(link + b"".join(i.to_bytes(8, "little") for i in ids)).digest()
    return link.hex()


CUTS = [[12], [1] * 12, [5, 7], [4, 4, 4], [1, 2, 3, 6], [11, 1]]


@pytest.mark.parametrize("intervals", CUTS)
def test_what_was_recorded_comes_out(intervals: list[int]) -> None:
    made, correct, _ = keep(intervals)
    first = 0
    for interval, length, expected_correct in zip(made, intervals, correct, strict=True):
        steps = range(first, first + length)
        sums = [sum(losses_of(t).tolist()) for t in steps]
        assert interval.first_step == first
        assert interval.losses == pytest.approx(
            [s / SIZES[t] for s, t in zip(sums, steps, strict=True)], rel=1e-12
        )
        assert interval.loss_sums == pytest.approx(sums, rel=1e-12)
        assert interval.mean_loss == pytest.approx(sum(sums) / interval.images, rel=1e-12)
        assert interval.images == sum(SIZES[t] for t in steps)
        assert interval.correct == expected_correct
        assert interval.first_bad_step() is None
        first += length


@pytest.mark.parametrize("intervals", CUTS)
def test_the_digest_does_not_depend_on_where_intervals_end(intervals: list[int]) -> None:
    assert keep(intervals)[2] == chained([ids_of(step) for step in range(STEPS)])


def test_shards_may_come_together() -> None:
    """Several shards are recorded in one call, at the position of the first."""
    ledger = Ledger(1, BATCH, CPU)
    ledger.open(0, 10)
    correct = record(ledger, 0, 0, 7, [2.0] * 7) + record(ledger, 0, 7, 10, [3.0] * 3)
    interval, digest = ledger.close(WORLD, START_OF_CHAIN)
    assert interval.losses == [2.3]
    assert interval.loss_sums == [23.0]
    assert interval.correct == correct > 0
    assert digest == chained([ids_of(0)])


def test_how_a_batch_is_cut_changes_nothing() -> None:
    """Each sample has its own position, so the sums have the same bits no matter which rank recorded it."""
    intervals = []
    losses = np.random.default_rng(0).lognormal(sigma=6, size=BATCH).astype(np.float32).tolist()
    for cuts in ([0, 10], [0, 5, 10], [0, 2, 3, 9, 10], list(range(11))):
        ledger = Ledger(1, BATCH, CPU)
        ledger.open(0, BATCH)
        for a, b in pairwise(cuts):
            ids = np.array(ids_of(0)[a:b])
            labels = torch.from_numpy(ids % 10)
            batch = Batch(torch.empty(b - a, 0), labels, ids, a)
            ledger.record(batch, torch.tensor(losses[a:b]), logits_for(labels, 1))
        interval, digest = ledger.close(WORLD, START_OF_CHAIN)
        intervals.append((interval.losses, interval.loss_sums, digest))
        assert interval.correct == len(cuts) - 1
    assert all(interval == intervals[0] for interval in intervals)


def test_sums_are_rounded_once() -> None:
    """In float32, and in any order in float64, the small numbers would be lost."""
    ledger = Ledger(2, 4, CPU)
    for step in range(2):
        ledger.open(step, 4)
        for position, loss in enumerate([1e30, 1.0, 1.0, -1e30]):
            record(ledger, step, position, position + 1, [loss], ids=[position])
    interval, _ = ledger.close(WORLD, START_OF_CHAIN)
    assert interval.loss_sums == [2.0, 2.0]
    assert interval.losses == [0.5, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("intervals", [[12], [5, 7], [1] * 12])
@pytest.mark.parametrize("position", [(0, 0), (5, 9), (7, 2), (11, 1)])
def test_a_loss_that_is_not_finite_is_found_at_its_step(
    position: tuple[int, int], intervals: list[int], bad: float
) -> None:
    """It is the loss of a single sample, at any position."""
    made, _, _ = keep(intervals, bad={position: bad})
    found = [interval.first_bad_step() for interval in made if interval.first_bad_step() is not None]
    assert found == [position[0]]


def test_the_first_of_several_is_found() -> None:
    made, _, _ = keep([12], bad={(9, 0): math.nan, (4, 0): math.inf, (4, 1): -math.inf, (10, 3): math.nan})
    assert made[0].first_bad_step() == 4
    assert math.isnan(made[0].mean_loss)


def closed(parts: list[tuple[int, int, list[int]]]) -> str:
    """Return the digest after one step with these (start, stop, ids)."""
    ledger = Ledger(1, BATCH, CPU)
    ledger.open(0, BATCH)
    for a, b, ids in parts:
        record(ledger, 0, a, b, [1.0] * (b - a), ids=ids)
    return ledger.close(WORLD, START_OF_CHAIN)[1]


def test_twice_never_swapped_or_other_samples_change_the_digest() -> None:
    ids = ids_of(0)
    halves = [(0, 5, ids[:5]), (5, 10, ids[5:])]
    digests = {
        "as it should be": closed(halves),
        "a shard twice": closed([*halves, halves[1]]),
        "a shard never": closed(halves[:1]),
        "one sample in another's position": closed([halves[0], (5, 10, [ids[0], *ids[6:]])]),
        "halves swapped": closed([(0, 5, ids[5:]), (5, 10, ids[:5])]),
        "two samples swapped": closed([(0, 5, [ids[1], ids[0], *ids[2:5]]), halves[1]]),
    }
    assert digests["as it should be"] == chained([ids])
    wrong = [value for name, value in digests.items() if name != "as it should be"]
    assert digests["as it should be"] not in wrong


def test_a_missing_sample_zero_differs_from_a_present_one() -> None:
    with_zero = closed([(0, 5, [4, 3, 2, 1, 0])])
    assert with_zero != closed([(0, 4, [4, 3, 2, 1])])


def test_a_short_step_after_a_long_one_starts_clean() -> None:
    """The rows are reused: nothing of an earlier interval may stay in them."""
    ledger = Ledger(2, BATCH, CPU)
    for step in range(2):
        ledger.open(step, 10)
        record(ledger, step, 0, 10, [5.0] * 10)
    ledger.close(WORLD, START_OF_CHAIN)
    ledger.open(3, 3)
    ledger.open(4, 10)
    interval, digest = ledger.close(WORLD, START_OF_CHAIN)
    assert (interval.first_step, interval.images, interval.correct, interval.mean_loss) == (3, 13, 0, 0.0)
    assert interval.losses == [0.0, 0.0]
    assert digest != chained([ids_of(0)[:3], ids_of(1)])


def test_what_was_recorded_may_be_written_over() -> None:
    """The ledger keeps copies, because the loop reuses the tensors."""
    ledger = Ledger(1, 2, CPU)
    ledger.open(0, 2)
    losses, labels, logits = torch.tensor([1.0, 2.0]), torch.tensor([3, 4]), torch.eye(10)[[3, 4]]
    ledger.record(Batch(torch.empty(2, 0), labels, np.array([5, 6]), 0), losses, logits)
    for tensor in (losses, labels, logits):
        tensor.zero_()
    interval, digest = ledger.close(WORLD, START_OF_CHAIN)
    assert (interval.loss_sums, interval.correct) == ([3.0], 2)
    assert digest == chained([[5, 6]])


def share(world: World, cuts: list[int]) -> tuple[Any, ...]:
    """Record this rank's shards of three steps."""
    ledger = Ledger(3, BATCH, CPU)
    for step in (1, 2, 3):
        ledger.open(step, SIZES[step])
        for v, a, b in spans(step):
            if cuts[world.rank] <= v < cuts[world.rank + 1]:
                record(ledger, step, a, b, losses_of(step)[a:b].tolist())
    interval, digest = ledger.close(world, START_OF_CHAIN)
    return (
        interval.first_step,
        interval.losses,
        interval.loss_sums,
        interval.correct,
        interval.images,
        digest,
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_add_up_to_what_one_would_have_written(size: int) -> None:
    (alone,) = run_ranks(share, 1, [0, SHARDS])
    cuts = [rank * SHARDS // size for rank in range(size + 1)]
    assert run_ranks(share, size, cuts) == [alone] * size
    assert alone[-1] == chained([ids_of(step) for step in (1, 2, 3)])
    assert alone[2] == pytest.approx([float(losses_of(step).sum()) for step in (1, 2, 3)], rel=1e-6)
