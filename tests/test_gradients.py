"""One process's part of adding gradients up: the tree is the tree, whoever adds which part of it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_mnist.gradients import (
    BinaryCounter,
    DdpGradients,
    LossOf,
    TreeGradients,
    owned_shards,
    subtree_roots,
)
from distributed_mnist.placement import ALONE
from distributed_mnist.world import World

ALL = [(size, shards) for shards in range(1, 18) for size in range(1, shards + 1)]
WORLD = World(ALONE, torch.device("cpu"), "none")


def tree_sum(leaves: list[Tensor]) -> Tensor:
    """The tree, written down from the top: the left part is the largest power of two below the whole."""
    if len(leaves) == 1:
        return leaves[0].clone()
    left = 1
    while 2 * left < len(leaves):
        left *= 2
    return tree_sum(leaves[:left]) + tree_sum(leaves[left:])


def made_leaves(count: int) -> list[Tensor]:
    """Numbers of many magnitudes and both signs, so that every order of additions rounds differently."""
    rng = np.random.default_rng(count)
    values = rng.standard_normal((count, 200)) * 10.0 ** rng.integers(-4, 4, (count, 200))
    return list(torch.from_numpy(values.astype(np.float32)))


def counted(leaves: list[Tensor]) -> BinaryCounter:
    counter = BinaryCounter()
    for i, leaf in enumerate(leaves):
        counter.push(0, i, leaf.clone())
    return counter


@pytest.mark.parametrize("count", range(1, 18))
def test_the_counter_adds_in_the_tree(count: int) -> None:
    leaves = made_leaves(count)
    assert torch.equal(counted(leaves).total(), tree_sum(leaves))


def test_these_numbers_can_tell_trees_apart() -> None:
    """Otherwise the test above could not fail."""
    for count in range(3, 18):
        leaves = made_leaves(count)
        in_turn = leaves[0].clone()
        for leaf in leaves[1:]:
            in_turn += leaf
        expected = tree_sum(leaves)
        assert torch.allclose(in_turn, expected, rtol=1e-3, atol=1e-2)
        # One after the other is the tree of three leaves.
        assert torch.equal(in_turn, expected) == (count == 3)
        assert not torch.equal(tree_sum([*leaves[1:], leaves[0]]), expected)


def test_the_counter_keeps_few() -> None:
    counter = BinaryCounter()
    for i in range(100):
        counter.push(0, i, torch.ones(1))
        assert len(counter.nodes) == (i + 1).bit_count()


@pytest.mark.parametrize(("size", "shards"), ALL)
def test_shards_are_shared_out(size: int, shards: int) -> None:
    owned = [owned_shards(rank, size, shards) for rank in range(size)]
    assert [shard for part in owned for shard in part] == list(range(shards))
    lengths = [len(part) for part in owned]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("size", "shards"), ALL)
def test_any_number_of_ranks_finishes_the_same_tree(size: int, shards: int) -> None:
    leaves = made_leaves(shards)
    finish = BinaryCounter()
    covered: list[int] = []
    for rank in range(size):
        owned = owned_shards(rank, size, shards)
        roots = subtree_roots(owned)
        here = BinaryCounter()
        for shard in owned:
            here.push(0, shard, leaves[shard].clone())
        assert [node[:2] for node in here.nodes] == roots
        for level, index, value in here.nodes:
            below = range(index << level, index + 1 << level)
            assert torch.equal(value, tree_sum(leaves[below.start : below.stop]))
            covered += below
            finish.push(level, index, value)
    assert covered == list(range(shards))
    assert torch.equal(finish.total(), tree_sum(leaves))


def network(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=3), nn.Flatten(), nn.Linear(6 * 8 * 8, 10)
    )
    if kind == "channels last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert any(not p.is_contiguous() for p in model.parameters())
    return model


def losses(images: Tensor, labels: Tensor, shards: int) -> LossOf:
    """The loss of some shards as the program defines it: samples `i * n // V` up."""
    n = len(labels)

    def loss_of(module: nn.Module, part: range) -> Tensor | None:
        rows = slice(part.start * n // shards, part.stop * n // shards)
        if not len(labels[rows]):
            return None
        return F.cross_entropy(module(images[rows]), labels[rows], reduction="sum") / n

    return loss_of


def batch(n: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(n)
    images = torch.from_numpy(rng.standard_normal((n, 1, 28, 28)).astype(np.float32))
    return images, torch.from_numpy(rng.integers(0, 10, n))


def of_the_mean(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """torch's own gradient of the whole batch's mean loss, in float64."""
    wide = [p.detach().double().requires_grad_() for p in model.parameters()]
    named = dict(zip([name for name, _ in model.named_parameters()], wide, strict=True))
    logits = torch.func.functional_call(model, named, (images.double(),))
    return list(torch.autograd.grad(F.cross_entropy(logits, labels), wide))


def ddp_alone(micro_batch: int | None, one_by_one: bool) -> Callable[[nn.Module, int], DdpGradients]:
    def make(model: nn.Module, shards: int) -> DdpGradients:
        return DdpGradients(
            model, WORLD, shards, shard_size=4, one_by_one=one_by_one, micro_batch=micro_batch
        )

    return make


WAYS: dict[str, Callable[[nn.Module, int], TreeGradients | DdpGradients]] = {
    "tree": lambda model, shards: TreeGradients(model, WORLD, shards),
    "ddp": ddp_alone(None, one_by_one=False),
    "ddp in small passes": ddp_alone(9, one_by_one=False),
    "ddp shard by shard": ddp_alone(None, one_by_one=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["linear", "conv", "channels last"])
@pytest.mark.parametrize(("n", "shards"), [(32, 8), (29, 8), (30, 7), (3, 8), (1, 8), (5, 1)])
def test_one_process_has_the_gradient_of_the_mean(way: str, kind: str, n: int, shards: int) -> None:
    """Uneven shards, and fewer samples than shards, weigh what they should."""
    model = network(kind)
    gradients = WAYS[way](model, shards)
    for images, labels in (batch(n), batch(n + 100), batch(n)):  # what a step leaves is not in the next
        gradients.compute(losses(images, labels, shards))
    images, labels = batch(n)
    for p, expected in zip(model.parameters(), of_the_mean(model, images, labels), strict=True):
        assert p.grad is not None
        assert p.grad.shape == p.shape
        scale = float(expected.abs().max())
        assert float((p.grad.double() - expected).abs().max()) <= 2e-5 * scale


@pytest.mark.parametrize("kind", ["linear", "channels last"])
@pytest.mark.parametrize(("n", "shards"), [(32, 8), (29, 7), (3, 8), (40, 11)])
def test_the_tree_adds_shards_gradients_in_the_tree(kind: str, n: int, shards: int) -> None:
    images, labels = batch(n)
    loss_of = losses(images, labels, shards)
    model = network(kind)
    TreeGradients(model, WORLD, shards).compute(loss_of)
    got = [p.grad for p in model.parameters()]
    parameters = list(model.parameters())
    leaves: list[list[Tensor]] = []
    for v in range(shards):
        loss = loss_of(model, range(v, v + 1))
        leaves.append(
            [torch.zeros_like(p) for p in parameters]
            if loss is None
            else list(torch.autograd.grad(loss, parameters))
        )
    for i, gradient in enumerate(got):
        assert gradient is not None
        assert torch.equal(gradient, tree_sum([leaf[i] for leaf in leaves]))
        assert gradient.stride() == parameters[i].stride()  # fused optimizers would copy otherwise


def test_frozen_and_unused_parameters() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(784, 10), nn.Linear(3, 4)
            self.frozen = nn.Linear(10, 10).requires_grad_(False)

        def forward(self, images: Tensor) -> Tensor:
            return self.frozen(self.used(images.flatten(1)))

    model = Sometimes()
    gradients = TreeGradients(model, WORLD, 4)
    gradients.compute(losses(*batch(10), 4))
    assert model.frozen.weight.grad is None
    assert model.unused.weight.grad is not None
    assert not model.unused.weight.grad.any()
    assert model.used.weight.grad is not None
    assert model.used.weight.grad.any()


def test_the_tree_does_not_add_to_what_was_there() -> None:
    model = network("linear")
    gradients = TreeGradients(model, WORLD, 8)
    loss_of = losses(*batch(20), 8)
    gradients.compute(loss_of)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    gradients.compute(loss_of)
    second = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
