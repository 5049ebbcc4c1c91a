"""Test gradients and running statistics of models with batch norm against a plain loop over shards."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_mnist.common.generators import ModelDraws, seed_generators
from distributed_mnist.common.placement import ALONE
from distributed_mnist.config import Recipe, Run
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import UsageError
from distributed_mnist.gradients.interface import Gradients, compute_gradients
from distributed_mnist.gradients.setup import make_gradients
from distributed_mnist.gradients.shard_gradients import ShardGradients
from distributed_mnist.gradients.tree_sum import shard_sizes
from distributed_mnist.models.inspection import inspect
from distributed_mnist.training.forward import keyed_forward
from distributed_mnist.training.sync_points import PhaseTimer

CPU = torch.device("cpu")
WORLD = World(ALONE, CPU, "none")
SHARDS = 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Again(nn.Module):
    """Repeats its forward pass in the backward pass, as `torch.utils.checkpoint` does to save memory."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> Any:
        logits = self.body(images)

        def repeat(_: Tensor) -> None:
            with torch.no_grad():
                self.body(images)

        if logits.requires_grad:
            logits.register_hook(repeat)
        return logits


def conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 5, stride=4), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))
    )


def flat(**norm: Any) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.BatchNorm1d(6, **norm), nn.Linear(6, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "2d": conv,
    "1d": flat,
    "cumulative": lambda: flat(momentum=None),
    "no running statistics": lambda: flat(track_running_stats=False),
    "no weights": lambda: flat(affine=False),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), conv()),
    "repeated in the backward pass": lambda: Again(flat()),
}


class Passes:
    """`ForwardShards` over one random batch, which count the passes."""

    def __init__(self, count: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 1, 28, 28, generator=random) * 2 + 0.5
        self.labels = torch.randint(10, (count,), generator=random)
        self.sizes = shard_sizes(count, SHARDS)
        self.shards: list[range] = []

    def rows(self, shards: range) -> slice:
        count = len(self.images)
        return slice(shards.start * count // SHARDS, shards.stop * count // SHARDS)

    def __call__(self, module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
        self.shards.append(shards)
        rows = self.rows(shards)
        logits = module(self.images[rows])
        outer = logits.detach().softmax(1) - F.one_hot(self.labels[rows], 10)
        return logits, outer / len(self.images)


def make(model: nn.Module, count: int) -> Gradients:
    properties = inspect(model, "mine", 10, CPU)
    return make_gradients(Recipe(batch_size=count, shards=SHARDS), Run(), WORLD, model, properties)


def plain_step(model: nn.Module, passes: Passes) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the batch's gradients, and the buffers after the step, with each shard in a fresh copy."""
    whole = copy.deepcopy(model).double()
    gradients = [torch.zeros_like(p) for p in whole.parameters()]
    buffers = {name: torch.zeros_like(b, dtype=torch.float64) for name, b in whole.named_buffers()}
    for shard, size in enumerate(passes.sizes):
        if not size:
            continue
        rows = passes.rows(range(shard, shard + 1))
        alone = copy.deepcopy(whole)
        logits = alone(passes.images[rows].double())
        loss = F.cross_entropy(logits, passes.labels[rows], reduction="sum") / len(passes.images)
        found = torch.autograd.grad(loss, list(alone.parameters()))
        gradients = [total + part for total, part in zip(gradients, found, strict=True)]
        for name, buffer in alone.named_buffers():
            buffers[name] += buffer * size / len(passes.images)
    return gradients, buffers


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_is_that_of_a_plain_loop_over_shards(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    counts = (22, 19, 22) if kind != "2d" else (22, 3, 22)  # with 3, one shard is empty
    gradients = make(model, counts[0])
    for step, count in enumerate(counts):
        passes = Passes(count, step)
        expected, buffers = plain_step(model, passes)
        compute_gradients(gradients, passes, passes.sizes)
        assert all(len(shards) == 1 for shards in passes.shards)
        for p, gradient in zip(model.parameters(), expected, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad.double(), gradient, rtol=1e-4, atol=1e-6)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer.double(), buffers[name], rtol=1e-5, atol=1e-6)
    counted = {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
    steps = 2 * len(counts) if "repeated" in kind else len(counts)
    assert counted <= {0 if kind == "instance norm" else steps, len(counts)}


@pytest.mark.parametrize("kind", ["2d", "cumulative", "repeated in the backward pass"])
def test_checks_change_no_running_statistics(kind: str) -> None:
    model, passes = MODELS[kind](), Passes(20, 1)
    gradients = make(model, 20)
    compute_gradients(gradients, passes, passes.sizes)
    before = {name: b.clone() for name, b in model.named_buffers()}
    gradients.prepare(passes, passes.sizes)
    for _ in range(3):
        gradients.check(passes, passes.sizes)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_recomputed_statistics_are_the_mean_over_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=0.3), nn.Flatten(), nn.Linear(784, 10))
    gradients, batches = make(model, 20), [Passes(20, 1), Passes(12, 2)]
    compute_gradients(gradients, batches[0], batches[0].sizes)
    weights = [p.detach().clone() for p in model.parameters()]
    gradients.recompute_statistics((batch, batch.sizes) for batch in batches)
    shards = [batch.images.split(len(batch.images) // SHARDS) for batch in batches]
    mean = torch.stack([batch.images.mean() for batch in batches]).mean()
    variance = torch.stack([images.var() for batch in shards for images in batch]).mean()
    norm = cast(nn.BatchNorm2d, model[0])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean[0], mean)
    torch.testing.assert_close(norm.running_var[0], variance)
    assert norm.num_batches_tracked == 2
    assert norm.momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


class Disturbed(ModelDraws):
    """Says that another thread drew during the first pass."""

    def were_own(self, size: int, own_state: Callable[[], Any]) -> bool:
        own_state()
        self._repeats += 1
        return self._repeats > 1


def test_a_repeated_pass_counts_once() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(784, 10))
    images = torch.randn(5, 1, 28, 28)
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1

    model.register_forward_hook(count)

    def changes(draws: ModelDraws | None) -> Tensor:
        batch = SimpleNamespace(images=images)
        context = SimpleNamespace(
            draws=draws, recipe=Recipe(), world=WORLD, batches=SimpleNamespace(take=lambda *_: batch)
        )

        def forward_shards(module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
            seed_generators("noise", 0, 0, 0)
            _, logits = keyed_forward(module, cast(Any, context), PhaseTimer(WORLD), 0, shards)
            return logits, torch.ones_like(logits)

        return ShardGradients(model).of_shard(forward_shards, 0, [5])

    once = changes(None)
    assert made == 1
    assert torch.equal(changes(Disturbed(("torch",))), once)
    assert made == 5
    assert once[-3:].all()


def test_sizes_too_small_for_batch_norm() -> None:
    make(flat(), 8)
    make(conv(), 7)
    with pytest.raises(UsageError, match="a batch of 7 cut into 4 shards leaves one image"):
        make(flat(), 7)


def test_a_moving_average_of_weights_needs_a_model_without_running_statistics() -> None:
    def make_averaged(model: nn.Module) -> Gradients:
        properties = inspect(model, "mine", 10, CPU)
        return make_gradients(
            Recipe(batch_size=16, shards=SHARDS, ema=0.9), Run(), WORLD, model, properties
        )

    make_averaged(flat(track_running_stats=False))
    with pytest.raises(UsageError, match="--ema the running statistics of its layer 2 would not fit"):
        make_averaged(flat())
