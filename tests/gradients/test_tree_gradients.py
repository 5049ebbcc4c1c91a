"""Test how one process adds gradients: the tree is the same, regardless of which rank adds which part."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_mnist.common.generators import DrawsNotShared
from distributed_mnist.common.placement import ALONE
from distributed_mnist.config import Recipe, Run
from distributed_mnist.distributed.world import World
from distributed_mnist.gradients.interface import Gradients, compute_gradients
from distributed_mnist.gradients.per_shard import HookedLayers
from distributed_mnist.gradients.setup import make_gradients
from distributed_mnist.gradients.tree import TreeGradients
from distributed_mnist.gradients.tree_sum import BinaryCounter, owned_shards, shard_sizes, subtree_roots
from distributed_mnist.models.inspection import ModelProperties

ALL = [(size, shards) for shards in range(1, 18) for size in range(1, shards + 1)]
WORLD = World(ALONE, torch.device("cpu"), "none")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread, as with `tree`: two would add in another order, and compete for few cores."""
    torch.set_num_threads(1)


def tree_sum(leaves: list[Tensor]) -> Tensor:
    """Add the tree from the top: the left part is the largest power of two smaller than the whole."""
    if len(leaves) == 1:
        return leaves[0].clone()
    left = 1
    while 2 * left < len(leaves):
        left *= 2
    return tree_sum(leaves[:left]) + tree_sum(leaves[left:])


def made_leaves(count: int) -> list[Tensor]:
    """Return numbers of many magnitudes and both signs: every order of additions rounds differently."""
    rng = np.random.default_rng(count)
    values = rng.standard_normal((count, 200)) * 10.0 ** rng.integers(-4, 4, (count, 200))
    return list(torch.from_numpy(values.astype(np.float32)))


def counted(leaves: list[Tensor]) -> BinaryCounter:
    counter = BinaryCounter()
    for i, leaf in enumerate(leaves):
        counter.push(0, i, leaf.clone())
    return counter


@pytest.mark.parametrize("count", range(1, 18))
def test_rows_that_come_together_are_added_in_the_same_tree(count: int) -> None:
    leaves = made_leaves(count)
    for size in (1, 2, 3, 8, count):
        counter = BinaryCounter()
        for first in range(0, count, size):
            counter.push_rows(first, torch.stack(leaves[first : first + size]))
        assert [node[:2] for node in counter.nodes] == subtree_roots(range(count))
        assert torch.equal(counter.total(), tree_sum(leaves))


def zero_gradients(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)


def zero_some_outputs(model: nn.Sequential) -> None:
    def hide_white(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * 0 if float(inputs[0].mean()) > 0.9 else output

    model[1].register_forward_hook(hide_white)


@pytest.mark.parametrize("register", [zero_gradients, zero_some_outputs])
def test_hooks_are_called(register: Callable[[nn.Sequential], None]) -> None:
    """Layers that compute their gradients themselves would pass them by."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    register(model)
    gradients = make_gradients(Recipe(batch_size=8), Run(), WORLD, model, ModelProperties(7850, False, ()))

    def forward_shards(module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
        return module(torch.ones(len(shards), 1, 28, 28)), torch.ones(len(shards), 10)

    compute_gradients(gradients, forward_shards, [1] * 8)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


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


class Passes:
    """A `ForwardShards` as in the program, with the loss's gradient computed by autograd."""

    def __init__(self, images: Tensor, labels: Tensor, shards: int) -> None:
        self._images, self._labels, self._shards = images, labels, shards
        self.sizes = shard_sizes(len(labels), shards)
        self.taken: list[range] = []

    def rows(self, shards: range) -> slice:
        """The samples of some shards."""
        n = len(self._labels)
        return slice(shards.start * n // self._shards, shards.stop * n // self._shards)

    def loss(self, module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
        """The logits, and the share of the mean loss that these shards have."""
        rows = self.rows(shards)
        logits = module(self._images[rows])
        return logits, F.cross_entropy(logits, self._labels[rows], reduction="sum") / len(self._labels)

    def __call__(self, module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
        assert sum(self.sizes[shards.start : shards.stop]) > 0, "a pass over nothing"
        self.taken.append(shards)
        logits, loss = self.loss(module, shards)
        (outer,) = torch.autograd.grad(loss, logits, retain_graph=True)
        return logits, outer


def batch(n: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(n)
    images = torch.from_numpy(rng.standard_normal((n, 1, 28, 28)).astype(np.float32))
    return images, torch.from_numpy(rng.integers(0, 10, n))


def of_the_mean(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Return torch's own gradient of the whole batch's mean loss, in float64."""
    wide = [p.detach().double().requires_grad_() for p in model.parameters()]
    named = dict(zip([name for name, _ in model.named_parameters()], wide, strict=True))
    logits = torch.func.functional_call(model, named, (images.double(),))
    return list(torch.autograd.grad(F.cross_entropy(logits, labels), wide))


def ddp_alone(micro_batch: int | None, one_shard_per_pass: bool) -> Callable[[nn.Module, int], Gradients]:
    def make(model: nn.Module, shards: int) -> Gradients:
        recipe = Recipe(batch_size=4 * shards, shards=shards, sync="ddp")
        properties = ModelProperties(1, draws_random_numbers=one_shard_per_pass, unused=())
        return make_gradients(recipe, Run(micro_batch=micro_batch), WORLD, model, properties)

    return make


WAYS: dict[str, Callable[[nn.Module, int], Gradients]] = {
    "tree": lambda model, shards: TreeGradients(model, WORLD, shards),
    "tree by layers": lambda model, shards: TreeGradients(model, WORLD, shards, HookedLayers(model)),
    "tree, shards together": lambda model, shards: TreeGradients(
        model,
        WORLD,
        shards,
        HookedLayers(model),
        [(4, 4, 4, 4), (3, 4, 3, 4), (4, 4, 4), (3, 4, 4), (1, 1)],
    ),
    "ddp": ddp_alone(None, one_shard_per_pass=False),
    "ddp in small passes": ddp_alone(9, one_shard_per_pass=False),
    "ddp shard by shard": ddp_alone(None, one_shard_per_pass=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["linear", "conv", "channels last"])
@pytest.mark.parametrize(("n", "shards"), [(32, 8), (29, 8), (30, 7), (3, 8), (1, 8), (5, 1)])
def test_one_process_has_the_gradient_of_the_mean(way: str, kind: str, n: int, shards: int) -> None:
    """Uneven shards, and fewer samples than shards, get the right weights."""
    model = network(kind)
    gradients = WAYS[way](model, shards)
    for images, labels in (batch(n), batch(n + 100), batch(n)):  # what a step leaves is not in the next
        passes = Passes(images, labels, shards)
        compute_gradients(gradients, passes, passes.sizes)
    images, labels = batch(n)
    for p, expected in zip(model.parameters(), of_the_mean(model, images, labels), strict=True):
        assert p.grad is not None
        assert p.grad.shape == p.shape
        scale = float(expected.abs().max())
        assert float((p.grad.double() - expected).abs().max()) <= 2e-5 * scale


def of_each_shard(model: nn.Module, passes: Passes, layers: HookedLayers | None) -> list[list[Tensor]]:
    """Return every shard's gradient, one pass each, by autograd from the loss or by `layers`."""
    parameters = list(model.parameters())
    leaves: list[list[Tensor]] = []
    for v, size in enumerate(passes.sizes):
        if not size:
            leaves.append([torch.zeros_like(p) for p in parameters])
        elif layers is None:
            _, loss = passes.loss(model, range(v, v + 1))
            leaves.append(list(torch.autograd.grad(loss, parameters)))
        else:
            row = torch.full((1, sum(p.numel() for p in parameters)), torch.nan)
            with layers.recording():
                logits, outer = passes(model, range(v, v + 1))
            layers.write_gradients(logits, outer, [size], layers.views(row))
            pieces = zip(row[0].split([p.numel() for p in parameters]), parameters, strict=True)
            leaves.append([piece.as_strided(p.shape, p.stride()) for piece, p in pieces])
    return leaves


@pytest.mark.parametrize("by_layers", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "channels last"])
@pytest.mark.parametrize(("n", "shards"), [(32, 8), (29, 7), (3, 8), (40, 11)])
def test_the_tree_adds_shards_gradients_in_the_tree(
    kind: str, n: int, shards: int, by_layers: bool
) -> None:
    passes = Passes(*batch(n), shards)
    model = network(kind)
    layers = HookedLayers(model) if by_layers else None
    compute_gradients(TreeGradients(model, WORLD, shards, layers), passes, passes.sizes)
    assert passes.taken == [range(v, v + 1) for v, size in enumerate(passes.sizes) if size]
    got = [p.grad for p in model.parameters()]
    parameters = list(model.parameters())
    leaves = of_each_shard(model, passes, layers)
    for i, gradient in enumerate(got):
        assert gradient is not None
        assert torch.equal(gradient, tree_sum([leaf[i] for leaf in leaves]))
        assert gradient.stride() == parameters[i].stride()  # fused optimizers would copy otherwise


class Exact(nn.Module):
    """A model with integer inputs and outputs: sums are exact in any batch and order."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(12, 6), nn.Linear(6, 4)
        noise = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randint(-3, 4, p.shape, generator=noise).float()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.hidden(images.flatten(1)).relu())


RUNS: dict[str, tuple[int, int, list[Sequence[int]], list[int]]] = {
    "none": (32, 8, [], [1] * 8),
    "all": (32, 8, [(4,) * 8], [8]),
    "halves": (32, 8, [(4,) * 4], [4, 4]),
    "the longest first": (32, 8, [(4, 4), (4,) * 5, (4,) * 3], [5, 3]),
    "what is left goes alone": (32, 8, [(4,) * 3], [3, 3, 1, 1]),
    "uneven": (29, 8, [(3, 4, 3, 4), (4, 3, 4)], [4, 3, 1]),
    "other sizes": (32, 8, [(3, 4), (4, 3), (5,) * 8, (32,)], [1] * 8),
    "lists are tuples": (32, 8, [[4, 4]], [2] * 4),
    "with empty ones": (3, 8, [(0, 0, 1, 0), (1, 0, 1)], [4, 1, 3]),
    "more than there are": (32, 8, [(4,) * 9, (4,) * 7], [7, 1]),
}
"""(Samples, shards, sizes that may share a pass, expected number of shards in each pass)."""


@pytest.mark.parametrize("case", RUNS)
def test_shards_that_may_go_together_do(case: str) -> None:
    """They get the gradients that they have alone, to the bit because nothing is rounded."""
    n, shards, together, lengths = RUNS[case]
    noise = torch.Generator().manual_seed(n)
    images = torch.randint(-3, 4, (n, 1, 3, 4), generator=noise).float()
    outer = torch.randint(-3, 4, (n, 4), generator=noise).float()
    model, sizes = Exact(), shard_sizes(n, shards)
    taken: list[range] = []

    def forward_shards(module: nn.Module, part: range) -> tuple[Tensor, Tensor]:
        taken.append(part)
        rows = slice(part.start * n // shards, part.stop * n // shards)
        return module(images[rows]), outer[rows]

    gradients = TreeGradients(model, WORLD, shards, HookedLayers(model), together)
    for _ in range(2):
        taken.clear()
        compute_gradients(gradients, forward_shards, sizes)
        cuts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        runs = [range(a, b) for a, b in pairwise(cuts)]
        assert taken == [run for run in runs if sum(sizes[run.start : run.stop])]
    expected = torch.autograd.grad(model(images), list(model.parameters()), outer)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, gradient)


def test_shards_that_cannot_share_their_draws_go_alone_from_then_on() -> None:
    n, shards = 32, 8
    images, labels = batch(n)
    images, model = images[:, :, :3, :4], Exact()
    passes = Passes(images, labels.remainder(4), shards)
    taken: list[range] = []

    def forward_shards(module: nn.Module, part: range) -> tuple[Tensor, Tensor]:
        taken.append(part)
        if len(part) > 1 and len(taken) > 1:
            raise DrawsNotShared
        return passes(module, part)

    gradients = TreeGradients(model, WORLD, shards, HookedLayers(model), [(4,) * 8])
    found = []
    for _ in range(3):
        compute_gradients(gradients, forward_shards, passes.sizes)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    alone = [range(shard, shard + 1) for shard in range(shards)]
    assert taken == [range(8), range(8), *alone, *alone]
    for first, second, third in zip(*found, strict=True):
        assert torch.equal(second, third)
        assert torch.allclose(first, second, rtol=0, atol=1e-6)


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
    passes = Passes(*batch(10), 4)
    compute_gradients(gradients, passes, passes.sizes)
    assert model.frozen.weight.grad is None
    assert model.unused.weight.grad is not None
    assert not model.unused.weight.grad.any()
    assert model.used.weight.grad is not None
    assert model.used.weight.grad.any()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_added_to_what_was_there(way: str) -> None:
    model = network("linear")
    gradients = WAYS[way](model, 8)
    passes = Passes(*batch(20), 8)
    compute_gradients(gradients, passes, passes.sizes)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    compute_gradients(gradients, passes, passes.sizes)
    second = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("micro_batch", "one_shard_per_pass", "lengths"),
    [
        (None, False, [8]),
        (9, False, [2, 2, 2, 2]),
        (4, False, [1] * 8),
        (13, False, [3, 3, 2]),
        (None, True, [1] * 8),
        (30, True, [1] * 8),
    ],
)
def test_ddp_passes_have_as_many_shards_as_fit(
    micro_batch: int | None, one_shard_per_pass: bool, lengths: list[int]
) -> None:
    model, passes = network("linear"), Passes(*batch(32), 8)
    compute_gradients(ddp_alone(micro_batch, one_shard_per_pass)(model, 8), passes, passes.sizes)
    assert list(map(len, passes.taken)) == lengths
    assert [v for part in passes.taken for v in part] == list(range(8))
