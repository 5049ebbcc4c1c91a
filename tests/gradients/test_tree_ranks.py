"""Test gradients and metrics in real groups, against a plain reference and, to the bit, between sizes."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import user_models
from numpy.typing import NDArray
from ranks import PATIENCE, run_ranks, server, try_ranks
from torch import Tensor, nn

from distributed_mnist.common.placement import ALONE
from distributed_mnist.common.random_keys import torch_seed
from distributed_mnist.config import Precision, Recipe, Run
from distributed_mnist.data.broadcast import Data
from distributed_mnist.data.split import Split
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import WorkerLost
from distributed_mnist.gradients.interface import Gradients, compute_gradients
from distributed_mnist.gradients.loss import cross_entropy
from distributed_mnist.gradients.per_shard import HookedLayers
from distributed_mnist.gradients.setup import make_gradients, make_tree_gradients
from distributed_mnist.gradients.shard_gradients import ForwardShards
from distributed_mnist.gradients.tree import TreeGradients
from distributed_mnist.models.build import build, forward, place
from distributed_mnist.models.inspection import ModelProperties, inspect
from distributed_mnist.training.batches import Batches
from distributed_mnist.training.evaluate import Evaluation, evaluate

SIZES = (2, 3)
MANY = (pytest.param(8, marks=pytest.mark.slow),)
SHARDS = (8, 11)
# Samples and global batch; the first batch is looked at and the last one: uneven shards, 5 samples for 8 or
# 11 shards, one sample.
BATCHES = ((200, 103), (92, 87), (3, 2))
MODELS = ("linear", "mlp", "user_models:dropout")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread, as the ranks do."""
    torch.set_num_threads(1)


def split(count: int) -> Split:
    rng = np.random.default_rng(count)
    images = torch.from_numpy(rng.integers(0, 256, (count, 28, 28), np.uint8))
    return Split(images, torch.from_numpy(rng.integers(0, 10, count).astype(np.uint8)))


@dataclass(frozen=True)
class Case:
    """A gradient to compute: the model, the shards, and the way to add them."""

    sync: str
    model: str
    shards: int
    count: int
    batch: int
    micro_batch: int | None = None
    precision: Precision = "fp32"

    @property
    def recipe(self) -> Recipe:
        sync = "ddp" if self.sync == "ddp" else "tree"
        return Recipe(
            model=self.model, batch_size=self.batch, shards=self.shards, sync=sync, precision=self.precision
        )

    @property
    def draws(self) -> bool:
        return self.model == "user_models:dropout"

    def made_model(self) -> nn.Module:
        """Trained a little, as it were: a last layer of zeros would hide what is before it."""
        model = place(build(self.model, 10, seed=1), CPU)
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=noise), alpha=0.02)
        return model.train()

    def batches(self) -> Batches:
        return Batches(split(self.count), self.recipe, 0.13, 0.31)

    def gradients(self, model: nn.Module, world: World) -> Gradients:
        """What adds up: the tree as the program sets it up, or plainly, each shard in a pass of its own."""
        if self.sync == "tree":
            return TreeGradients(model, world, self.shards)
        if self.sync == "together":
            return make_tree_gradients(self.recipe, world, model, properties(self.model))
        if self.sync == "apart":
            return TreeGradients(model, world, self.shards, HookedLayers(model))
        options = Run(micro_batch=self.micro_batch)
        return make_gradients(self.recipe, options, world, model, properties(self.model))


@cache
def properties(name: str) -> ModelProperties:
    return inspect(place(build(name, 10, seed=1), CPU), name, 10, CPU)


def pass_for(case: Case, batches: Batches, step: int) -> ForwardShards:
    """Return a `ForwardShards` like that of training.

    Autograd computes the loss's gradient, except in the cases that test the tree as the program sets it up.
    """

    def forward_shards(module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
        first, end = batches.span(step, shards)
        assert first < end, "a pass over nothing"
        batch = batches.take(step, shards)
        if case.draws:
            torch.manual_seed(torch_seed("noise", 0, step, shards.start))
        logits = forward(module, batch.images, case.precision)
        if case.sync in ("together", "apart"):
            return logits, cross_entropy(logits, batch.labels, 0.1)[1] / batches.size(step)
        loss = F.cross_entropy(logits, batch.labels, reduction="sum") / batches.size(step)
        return logits, torch.autograd.grad(loss, logits, retain_graph=True)[0]

    return forward_shards


def flat(model: nn.Module) -> NDArray[np.float32]:
    grads = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        grads.append(parameter.grad.detach().flatten())
    return torch.cat(grads).numpy().copy()


TREE = [
    Case("tree", model, shards, count, batch)
    for model in MODELS
    for shards in SHARDS
    for count, batch in BATCHES
]
DDP = [
    Case("ddp", model, 8, count, batch, micro_batch)
    for model in ("mlp", "user_models:dropout")
    for count, batch in BATCHES
    for micro_batch in (None, 30)
]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
# Equal shards; two sizes of shards; 11 shards; more images than go through the model at once.
TOGETHER_BATCHES = ((8, 300, 256), (8, 140, 130), (11, 200, 103), (8, 700, 640))
TOGETHER = [
    Case("together", model, *batch, precision=precision)
    for model, batches in (
        ("linear", TOGETHER_BATCHES),
        ("mlp", TOGETHER_BATCHES[1:3]),
        ("cnn-small", TOGETHER_BATCHES[:3]),
    )
    for batch in batches
    for precision in PRECISIONS
]
TOGETHER.append(Case("together", "cnn-small", *TOGETHER_BATCHES[3], precision="bf16"))  # recipe `fast`
FEW = [
    Case("together", model, shards, 2 * batch + 1, batch)
    for model in ("linear", "cnn-small")
    for shards, batch in ((8, 5), (11, 2), (8, 1))
]
"""Cases in which some shards, and some ranks, have no samples."""
CASES = (*TREE, *DDP, *TOGETHER, *FEW)


def compute(world: World, cases: Sequence[Case]) -> list[list[NDArray[np.float32]]]:
    """Return the gradients of the first and of the last, short batch in every case."""
    found = []
    for case in cases:
        model, batches = case.made_model(), case.batches()
        gradients = case.gradients(model, world)
        each = []
        for step in (0, batches.steps_per_epoch - 1):
            compute_gradients(gradients, pass_for(case, batches, step), batches.shard_sizes(step))
            each.append(flat(model))
        found.append(each)
    return found


def cases_for(size: int) -> list[Case]:
    """DDP at two sizes is enough: it is torch's own, and takes a second to import on each rank. A rank of
    eight has one of eight shards, so that none go together; `TREE` has such cases."""
    if size <= max(SIZES):
        return list(CASES)
    return [
        case for case in CASES if case.sync == "tree" or (case.sync == "together" and case.shards > size)
    ]


def compute_and_score(world: World) -> tuple[list[list[NDArray[np.float32]]], list[dict[str, Any]]]:
    return compute(world, cases_for(world.size)), score(world)


@cache
def all_ranks(size: int) -> list[tuple[list[list[NDArray[np.float32]]], list[dict[str, Any]]]]:
    """Compute everything in one group of this size; return what each rank came to."""
    return run_ranks(compute_and_score, size)


@cache
def computed(size: int) -> dict[Case, list[list[NDArray[np.float32]]]]:
    """Return every case's gradients on every rank."""
    return {
        case: [gradients[i] for gradients, _ in all_ranks(size)] for i, case in enumerate(cases_for(size))
    }


def scored(size: int) -> list[list[dict[str, Any]]]:
    """Return every rank's evaluations."""
    return [scores for _, scores in all_ranks(size)]


@cache
def apart() -> dict[Case, list[NDArray[np.float32]]]:
    """Return the gradients of the same cases on one process, with one shard per pass."""
    cases = (*TOGETHER, *FEW)
    alone = World(ALONE, CPU, "none")
    return dict(zip(cases, compute(alone, [replace(case, sync="apart") for case in cases]), strict=True))


def bits(gradients: list[NDArray[np.float32]]) -> list[bytes]:
    return [gradient.tobytes() for gradient in gradients]


@pytest.mark.parametrize("size", [*SIZES, *MANY])
def test_the_tree_gives_the_same_bits_at_every_size(size: int) -> None:
    alone = computed(1)
    for case in TREE:
        expected = bits(alone[case][0])
        assert [bits(each) for each in computed(size)[case]] == [expected] * size, case


@pytest.mark.parametrize("size", [1, *SIZES, *MANY])
def test_shards_that_go_together_change_no_bit(size: int) -> None:
    """Compare the tree as the program sets it up with one process that has one shard per pass."""
    for case in cases_for(size):
        if case in apart():  # also with fewer samples than shards
            assert [bits(each) for each in computed(size)[case]] == [bits(apart()[case])] * size, case


def test_some_do_go_together() -> None:
    """Otherwise the test above could not fail."""
    found = set()
    for case in TOGETHER:
        model, batches = case.made_model(), case.batches()
        forward_shards, taken = pass_for(case, batches, 0), list[int]()

        def noted(
            module: nn.Module,
            shards: range,
            forward_shards: ForwardShards = forward_shards,
            taken: list[int] = taken,
        ) -> tuple[Tensor, Tensor]:
            taken.append(len(shards))
            return forward_shards(module, shards)

        gradients = case.gradients(model, World(ALONE, CPU, "none"))
        compute_gradients(gradients, noted, batches.shard_sizes(0))
        if max(taken) > 1:
            found.add((case.model, case.precision))
    assert {("cnn-small", precision) for precision in PRECISIONS} <= found  # others where kernels allow it


def shard_gradient(case: Case, step: int, shard: int) -> NDArray[np.float32]:
    """Return the gradients that autograd computes from the loss."""
    batches, model = case.batches(), case.made_model()
    batch = batches.take(step, range(shard, shard + 1))
    if not len(batch.labels):
        return np.zeros_like(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy())
    loss = F.cross_entropy(model(batch.images), batch.labels, reduction="sum") / batches.size(step)
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
    for case in TREE:
        if case.shards == shards and case.model == "mlp":
            steps = (0, case.batches().steps_per_epoch - 1)
            for step, found in zip(steps, computed(1)[case][0], strict=True):
                expected = in_a_tree([shard_gradient(case, step, shard) for shard in range(shards)])
                assert np.array_equal(found, expected), case


@pytest.mark.parametrize("size", [1, *SIZES, *MANY])
def test_all_ways_are_the_gradient_of_the_mean_over_the_whole_batch(size: int) -> None:
    for case, ranks in computed(size).items():
        if case.draws or case.precision == "bf16" or case in FEW:
            continue
        batches, model = case.batches(), case.made_model()
        smoothing = 0.1 if case.sync == "together" else 0.0
        for i, step in enumerate((0, batches.steps_per_epoch - 1)):
            whole = batches.take(step, range(case.shards))
            model.zero_grad()
            F.cross_entropy(model(whole.images), whole.labels, label_smoothing=smoothing).backward()
            for rank in ranks if case.sync == "ddp" else ranks[:1]:
                np.testing.assert_allclose(rank[i], flat(model), rtol=2e-4, atol=2e-6, err_msg=str(case))


@pytest.mark.parametrize("size", [1, *SIZES])
def test_ddp_gives_all_ranks_the_same(size: int) -> None:
    for case in DDP:
        ranks = computed(size)[case]
        assert all(bits(ranks[0]) == bits(other) for other in ranks), case


@pytest.mark.parametrize("size", [1, *SIZES])
def test_ddp_draws_the_dropout_of_the_tree(size: int) -> None:
    """Masks are keyed by step and shard, so both ways use the same ones."""
    for case in DDP:
        if case.draws:
            tree = computed(1)[replace(case, sync="tree", micro_batch=None)][0]
            for found, expected in zip(computed(size)[case][0], tree, strict=True):
                np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6, err_msg=str(case))


def lose_one(world: World, victim: int, noticed: Barrier) -> None:
    """One rank leaves after some steps; the others continue until they notice."""
    case = Case("ddp", "mlp", 8, 64, 64)
    batches, model = case.batches(), case.made_model()
    gradients = case.gradients(model, world)
    forward_shards = pass_for(case, batches, 0)
    for _ in range(3):
        compute_gradients(gradients, forward_shards, batches.shard_sizes(0))
    if world.rank == victim:
        os._exit(9)
    try:
        while True:
            compute_gradients(gradients, forward_shards, batches.shard_sizes(0))
    except WorkerLost:
        noticed.wait(PATIENCE)  # who leaves at once would be lost to the next in turn
        raise


@pytest.mark.parametrize("victim", [0, 2])
def test_ddp_says_whom_it_lost(victim: int) -> None:
    ends = try_ranks(lose_one, 3, victim, server().Barrier(2))
    assert ends[victim].error == "died without a word"
    for rank, end in enumerate(ends):
        if rank != victim:
            assert re.search(rf"WorkerLost: lost rank {victim} \(pid \d+ on \S+\): ", end.error or ""), (
                end.error
            )
            assert (end.error or "").strip().endswith(", in an all-reduce")


COUNTS = (1, 10, 250, 300, 1_007)  # chunks: 1, 1, 1, 2, 5; fewer than ranks, and not a multiple of them


def plain(evaluation: Evaluation) -> dict[str, Any]:
    """Return values that can be compared, and sent from a process that ends."""
    tensors = {name: getattr(evaluation, name).tolist() for name in ("predicted", "confidence")}
    return {**vars(evaluation), **tensors}


def data_of(images: Split) -> Data:
    return Data(images, images, "test", tuple("0123456789"), 0.13, 0.31, "", "")


def score(world: World) -> list[dict[str, Any]]:
    model = user_models.dropout(10)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.train()
    found = []
    for count in COUNTS:
        result = evaluate(model, data_of(split(count)), world, "fp32")
        found.append(plain(result))
        assert model.training, "evaluate left the model in evaluation mode"
    return found


@pytest.mark.parametrize("size", [1, *SIZES, *MANY])
def test_evaluation_is_the_same_to_the_bit(size: int) -> None:
    alone = scored(1)[0]
    assert scored(size) == [alone] * size
    for count, evaluation in zip(COUNTS, alone, strict=True):
        assert evaluation["images"] == count == len(evaluation["predicted"])
        classes = np.bincount(split(count).labels.numpy(), minlength=10)
        assert np.array_equal(np.sum(evaluation["confusion"], axis=1), classes)
        assert evaluation["correct"] == np.trace(evaluation["confusion"])
