"""Gradients and exact metrics in real groups: against a plain reference, and between sizes to the bit."""

from collections.abc import Callable
from functools import cache

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from ranks import run_ranks
from torch import Tensor, nn

from distributed_mnist.batches import Batches, Split
from distributed_mnist.config import Recipe
from distributed_mnist.evaluate import Evaluation, evaluate
from distributed_mnist.gradients import DdpGradients, Gradients, TreeGradients
from distributed_mnist.keys import torch_seed
from distributed_mnist.models import build
from distributed_mnist.world import World

SIZES = (2, 3, 4)
MANY = tuple(pytest.param(size, marks=pytest.mark.slow) for size in (7, 8))
SHARDS = (8, 11)
# Samples and global batch; the last batch is looked at: uneven shards, 5 samples for 8 or 11 shards, one
# sample.
BATCHES = ((200, 103), (92, 87), (3, 2))
MODELS = ("linear", "mlp", "networks:dropout")


def split(count: int) -> Split:
    rng = np.random.default_rng(count)
    images = torch.from_numpy(rng.integers(0, 256, (count, 28, 28), np.uint8))
    return Split(images, torch.from_numpy(rng.integers(0, 10, count).astype(np.uint8)))


def loss_for(batches: Batches, step: int, draws: bool) -> Callable[[nn.Module, range], Tensor | None]:
    def loss_of(module: nn.Module, shards: range) -> Tensor | None:
        first, end = batches.span(step, shards)
        if first == end:
            return None
        batch = batches.take(step, shards)
        if draws:
            torch.manual_seed(torch_seed("noise", 0, step, shards.start))
        loss = F.cross_entropy(module(batch.images), batch.labels, reduction="sum")
        return loss / batches.size(step)

    return loss_of


def last_step(recipe: Recipe, count: int) -> tuple[Batches, int]:
    batches = Batches(split(count), recipe, 0.13, 0.31)
    return batches, batches.steps_per_epoch - 1


def flat(model: nn.Module) -> NDArray[np.float32]:
    grads = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        grads.append(parameter.grad.detach().flatten())
    return torch.cat(grads).numpy().copy()


def gradients_of(
    world: World, model: nn.Module, recipe: Recipe, micro_batch: int | None, draws: bool
) -> Gradients:
    if recipe.sync == "tree":
        return TreeGradients(model, world, recipe.shards)
    shard_size = -(-recipe.batch_size // recipe.shards)
    return DdpGradients(
        model, world, recipe.shards, shard_size=shard_size, one_by_one=draws, micro_batch=micro_batch
    )


Case = tuple[str, str, int, int, int, int | None]
"""sync, model, shards, samples, global batch, micro-batch."""

TREE: list[Case] = [
    ("tree", model, shards, count, batch, None)
    for model in MODELS
    for shards in SHARDS
    for count, batch in BATCHES
]
DDP: list[Case] = [
    ("ddp", model, 8, count, batch, micro_batch)
    for model in ("mlp", "networks:dropout")
    for count, batch in BATCHES
    for micro_batch in (None, 30)
]


def compute(world: World) -> list[NDArray[np.float32]]:
    """The gradient of the last, short batch in every case; computed twice, as a trainer would again."""
    found = []
    for sync, name, shards, count, batch, micro_batch in [*TREE, *DDP]:
        if world.size > shards:
            continue
        recipe = Recipe(
            model=name, batch_size=batch, shards=shards, sync="tree" if sync == "tree" else "ddp"
        )
        batches, step = last_step(recipe, count)
        draws = name == "networks:dropout"
        model = build(name, 10, seed=1)
        model.train()
        gradients = gradients_of(world, model, recipe, micro_batch, draws)
        gradients.compute(loss_for(batches, 0, draws))
        gradients.compute(loss_for(batches, step, draws))
        found.append(flat(model))
    return found


@cache
def computed(size: int) -> dict[Case, list[NDArray[np.float32]]]:
    """Every case's gradient on every rank."""
    ranks = run_ranks(compute, size)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate([*TREE, *DDP])}


@pytest.mark.parametrize("size", [*SIZES, *MANY])
def test_the_tree_gives_the_same_bits_at_every_size(size: int) -> None:
    alone = computed(1)
    for case in TREE:
        expected = alone[case][0].tobytes()
        assert [gradient.tobytes() for gradient in computed(size)[case]] == [expected] * size, case


def shard_gradient(case: Case, shard: int) -> NDArray[np.float32]:
    _, name, shards, count, batch, _ = case
    batches, step = last_step(Recipe(batch_size=batch, shards=shards), count)
    model = build(name, 10, seed=1)
    loss = loss_for(batches, step, name == "networks:dropout")(model, range(shard, shard + 1))
    if loss is None:
        return np.zeros_like(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy())
    loss.backward()
    return flat(model)


def in_a_tree(leaves: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The left part is the largest power of two smaller than the whole."""
    if len(leaves) == 1:
        return leaves[0]
    left = 1 << (len(leaves) - 1).bit_length() - 1
    return in_a_tree(leaves[:left]) + in_a_tree(leaves[left:])


@pytest.mark.parametrize("shards", SHARDS)
def test_the_tree_is_the_one_that_is_documented(shards: int) -> None:
    torch.set_num_threads(1)
    for case in TREE:
        if case[2] == shards and case[1] == "mlp":
            expected = in_a_tree([shard_gradient(case, shard) for shard in range(shards)])
            assert np.array_equal(computed(1)[case][0], expected), case


@pytest.mark.parametrize("size", [1, *SIZES, *MANY])
def test_both_ways_are_the_gradient_of_the_mean_over_the_whole_batch(size: int) -> None:
    for case, ranks in computed(size).items():
        sync, name, shards, count, batch, _ = case
        if name == "networks:dropout":
            continue
        batches, step = last_step(Recipe(batch_size=batch, shards=shards), count)
        model = build(name, 10, seed=1)
        whole = batches.take(step, range(shards))
        F.cross_entropy(model(whole.images), whole.labels).backward()
        for gradient in ranks if sync == "ddp" else ranks[:1]:
            np.testing.assert_allclose(gradient, flat(model), rtol=2e-4, atol=2e-6, err_msg=str(case))


@pytest.mark.parametrize("size", [1, *SIZES, *MANY])
def test_ddp_gives_all_ranks_the_same(size: int) -> None:
    for case in DDP:
        ranks = computed(size)[case]
        assert all(np.array_equal(ranks[0], other) for other in ranks), case


@pytest.mark.parametrize("size", [1, *SIZES, *MANY])
def test_ddp_draws_the_dropout_of_the_tree(size: int) -> None:
    """Masks are keyed by step and shard, so both ways train through the same ones."""
    for case in DDP:
        _, name, shards, count, batch, _ = case
        if name == "networks:dropout":
            tree = computed(1)["tree", name, shards, count, batch, None][0]
            np.testing.assert_allclose(
                computed(size)[case][0], tree, rtol=2e-4, atol=2e-6, err_msg=str(case)
            )


COUNTS = (1, 10, 250, 300, 1_007)  # chunks: 1, 1, 1, 2, 5; fewer than ranks, and not a multiple of them


def score(world: World) -> list[Evaluation]:
    model = networks.dropout(10)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.train()
    found = []
    for count in COUNTS:
        found.append(
            evaluate(model, split(count), world, classes=10, mean=0.13, std=0.31, precision="fp32")
        )
        assert model.training, "evaluate left the model in evaluation mode"
    return found


@pytest.mark.parametrize("size", [1, *SIZES, *MANY])
def test_evaluation_is_the_same_to_the_bit(size: int) -> None:
    alone = scored(1)[0]
    assert scored(size) == [alone] * size
    for count, evaluation in zip(COUNTS, alone, strict=True):
        assert evaluation.images == count
        classes = np.bincount(split(count).labels.numpy(), minlength=10)
        assert np.array_equal(np.sum(evaluation.confusion, axis=1), classes)
        assert evaluation.correct == np.trace(evaluation.confusion)


@cache
def scored(size: int) -> list[list[Evaluation]]:
    return run_ranks(score, size)
