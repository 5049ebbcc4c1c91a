"""Test that each sample comes once per epoch, in an order that depends on (recipe, step) alone."""

from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distributed_mnist.config import Recipe
from distributed_mnist.data.split import Split, normalise
from distributed_mnist.training.batches import Batch, Batches, copy_to_device_

SIZES = [
    (103, 10, 8),
    (103, 25, 7),
    (103, 25, 11),
    (100, 25, 8),
    (97, 32, 4),
    (23, 11, 8),
    (5, 8, 8),
    (9, 4, 1),
]
"""(Samples N, global batch B, shards V); some divide evenly, and some last batches are smaller than V."""


def made_of(count: int) -> Split:
    """Return noise images; the first two pixels and the label identify the sample."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8))
    images[:, 0, 0] = torch.arange(count) % 256
    images[:, 0, 1] = torch.arange(count) // 256
    return Split(images, (torch.arange(count) % 10).to(torch.uint8))


def batches(count: int, batch: int, shards: int, **recipe: float) -> Batches:
    made = Recipe(batch_size=batch, shards=shards).replace(**recipe)
    return Batches(made_of(count), made, mean=0.0, std=1.0)


def holding(of: Batches, step: int, ranges: Iterable[range]) -> list[range]:
    """Return those of these shards that hold a sample."""
    return [part for part in ranges if of.span(step, part)[0] < of.span(step, part)[1]]


def single(shards: int) -> list[range]:
    """Return one range per shard."""
    return [range(v, v + 1) for v in range(shards)]


def order(of: Batches, epoch: int, shards: int) -> list[int]:
    """Return an epoch's ids, read one shard at a time."""
    steps = range(epoch * of.steps_per_epoch, (epoch + 1) * of.steps_per_epoch)
    return [int(i) for t in steps for part in holding(of, t, single(shards)) for i in of.take(t, part).ids]


def joined(parts: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    every = list(parts)
    images, labels = torch.cat([b.images for b in every]), torch.cat([b.labels for b in every])
    return images, labels, [int(i) for b in every for i in b.ids]


@pytest.mark.parametrize(("count", "batch", "shards"), SIZES)
def test_every_sample_exactly_once_per_epoch(count: int, batch: int, shards: int) -> None:
    made = batches(count, batch, shards)
    for epoch in (0, 1, 5):
        assert sorted(order(made, epoch, shards)) == list(range(count))


@pytest.mark.parametrize(("count", "batch", "shards"), SIZES)
def test_steps_sizes_and_spans(count: int, batch: int, shards: int) -> None:
    made = batches(count, batch, shards)
    full, rest = divmod(count, batch)
    sizes = [batch] * full + [rest] * (rest > 0)
    assert made.steps_per_epoch == len(sizes)
    for step, n in enumerate(sizes * 2):
        assert made.size(step) == n
        cuts = [made.span(step, range(v, v + 1)) for v in range(shards)]
        assert cuts[0][0] == 0
        assert cuts[-1][1] == n
        assert all(left[1] == right[0] for left, right in pairwise(cuts))
        lengths = [last - first for first, last in cuts]
        assert max(lengths) - min(lengths) <= 1
        assert made.span(step, range(shards)) == (0, n)
        for v, (first, last) in enumerate(cuts):
            part = made.take(step, range(v, v + 1))
            assert (part.start, len(part.ids), len(part.images), len(part.labels)) == (
                first,
                *[last - first] * 3,
            )


@pytest.mark.parametrize("augment", [{}, {"shift": 2.0}])
def test_an_empty_shard_is_an_empty_batch(augment: dict[str, float]) -> None:
    made = batches(103, 25, 8, **augment)
    empty = made.take(4, range(1, 2))  # of 3 samples in 8 shards
    assert (empty.start, len(empty.ids), len(empty.labels)) == (0, 0, 0)
    assert empty.images.shape == (0, 1, 28, 28)


def test_a_batch_holds_the_samples_it_names() -> None:
    made = batches(300, 64, 7)
    part = made.take(3, range(2, 6))
    pixels = made_of(300)
    assert part.images.shape == (len(part.ids), 1, 28, 28)
    assert (part.images.dtype, part.labels.dtype) == (torch.float32, torch.int64)
    for image, label, i in zip(part.images, part.labels, part.ids, strict=True):
        assert torch.equal(image, normalise(pixels.images[[int(i)]], 0.0, 1.0)[0])
        assert int(label) == i % 10


def test_normalise_against_float64() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(49)[: 16 * 784].reshape(16, 28, 28)
    expected = (images.numpy().astype(np.float64) / 255 - 0.1307) / 0.3081
    got = normalise(images, 0.1307, 0.3081)
    assert got.shape == (16, 1, 28, 28)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[:, 0].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(images.flatten()[:256], torch.arange(256, dtype=torch.uint8))


def test_mean_and_deviation_are_used() -> None:
    split, recipe = made_of(20), Recipe(batch_size=8)
    plain = Batches(split, recipe, mean=0.0, std=1.0).take(1, range(8)).images
    got = Batches(split, recipe, mean=0.25, std=0.5).take(1, range(8)).images
    assert torch.allclose(got, (plain - 0.25) / 0.5, atol=1e-6)
    shifted = Batches(split, recipe.replace(shift=1e-6), mean=0.25, std=0.5).take(1, range(8)).images
    assert torch.allclose(shifted, got, atol=1e-4)


def test_order_moves_with_epoch_and_seed_alone() -> None:
    first = order(batches(103, 25, 8), 0, 8)
    assert order(batches(103, 25, 8), 1, 8) != first
    assert order(batches(103, 25, 8, seed=1), 0, 8) != first
    assert order(batches(103, 25, 11), 0, 11) == first
    assert order(batches(103, 7, 8), 0, 8) == first
    assert order(batches(103, 25, 8, lr=0.5, epochs=9, rotate=5.0), 0, 8) == first


@pytest.mark.parametrize("augment", [{}, {"shift": 2.0, "rotate": 10.0, "scale": 0.1}])
def test_pure_in_the_step(augment: dict[str, float]) -> None:
    """The tensors are the same in any order of steps, or after a resume."""

    def fresh() -> Batches:
        return batches(53, 10, 8, **augment)

    straight = fresh()
    taken = {
        (t, part.start): straight.take(t, part)
        for t in range(18)
        for part in holding(straight, t, single(8))
    }
    places = list(taken)
    np.random.default_rng(1).shuffle(places)
    wild, resumed = fresh(), fresh()
    for made, some in ((wild, places), (resumed, [p for p in taken if p[0] >= 9])):
        for t, v in some:
            got, expected = made.take(t, range(v, v + 1)), taken[t, v]
            assert torch.equal(got.images, expected.images)
            assert torch.equal(got.labels, expected.labels)
            assert got.ids.tolist() == expected.ids.tolist()
            assert got.start == expected.start


@pytest.mark.parametrize("shards", [8, 7, 11])
@pytest.mark.parametrize("augment", [{}, {"shift": 2.0, "rotate": 10.0, "scale": 0.1}])
def test_grouping_shards_changes_nothing(augment: dict[str, float], shards: int) -> None:
    made = batches(103, 25, shards, **augment)
    for step in (0, 3, 4):  # 4 is the short one, of 3 samples
        images, labels, ids = joined([made.take(step, range(shards))])
        for cuts in ([1] * shards, [3, shards - 3], [1, 4, shards - 5]):
            edges = np.cumsum([0, *cuts]).tolist()
            ranges = [range(a, b) for a, b in pairwise(edges)]
            got = joined(made.take(step, part) for part in holding(made, step, ranges))
            assert torch.equal(got[0], images)
            assert torch.equal(got[1], labels)
            assert got[2] == ids


def test_a_short_last_batch_is_augmented() -> None:
    made, plain = batches(103, 25, 8, shift=2.0), batches(103, 25, 8)
    short, undistorted = made.take(4, range(8)), plain.take(4, range(8))
    assert len(short.ids) == 3
    assert short.ids.tolist() == undistorted.ids.tolist()
    assert not torch.equal(short.images, undistorted.images)


def test_what_is_taken_is_fresh() -> None:
    """Writing into a batch must not write into the data set or into the next batch."""
    made = batches(20, 20, 4)
    before = made.take(0, range(4)).images.clone()
    made.take(0, range(4)).images.zero_()
    assert torch.equal(made.take(0, range(4)).images, before)


def test_only_a_copy_to_a_cuda_device_does_not_wait() -> None:
    """On MPS a copy that does not wait may read the source after its memory has been given away."""
    for kind in ("cpu", "mps", "xpu", "cuda"):
        copied = list[Any]()
        target: Any = SimpleNamespace(
            device=torch.device(kind), copy_=lambda *source, made=copied, **how: made.extend((*source, how))
        )
        source: Any = SimpleNamespace(pin_memory=lambda: "pinned")
        copy_to_device_(target, source)
        on_cuda = kind == "cuda"
        assert copied == ["pinned" if on_cuda else source, {"non_blocking": on_cuda}]
