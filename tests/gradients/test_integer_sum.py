"""Test gradients that are summed as integers: any cut of the batch gives the same bits."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks, try_ranks
from torch import Tensor, nn

from distributed_mnist.common.digest import digest
from distributed_mnist.common.placement import ALONE
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import CheckpointError, UsageError
from distributed_mnist.exact.products import interface
from distributed_mnist.exact.scales import Scales
from distributed_mnist.gradients.exact import integer_sum, trial
from distributed_mnist.gradients.exact.integer_sum import ExactGradients
from distributed_mnist.gradients.interface import compute_gradients

WORLD = World(ALONE, torch.device("cpu"), "none")
BATCH = 11
CLASSES = 4


def network() -> nn.Module:
    """A model with a layer of each kind that has sums over samples."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 1, 7, 7, generator=generator)
    images[3] *= 100  # one sample decides the scales
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def forward(module: nn.Module, part: range) -> tuple[Tensor, Tensor]:
    """Run samples of the batch; return the logits and the gradient of the mean squared logits."""
    images, labels = samples()
    logits = module(images[part.start : part.stop])
    targets = F.one_hot(labels[part.start : part.stop], CLASSES)
    return logits, (logits.detach() - targets) / torch.tensor(float(BATCH))


def made(model: nn.Module, world: World = WORLD) -> tuple[ExactGradients, Scales]:
    scales = Scales(world.device)
    return ExactGradients(model, world, scales, name="net"), scales


def compute(world: World, batch: int = BATCH) -> tuple[list[np.ndarray], np.ndarray]:
    """Compute two steps; return the second gradient and the scales after it."""
    model = network()
    gradients, scales = made(model, world)
    gradients.prepare(forward, [1] * batch)
    for _ in range(2):
        compute_gradients(gradients, forward, [1] * batch)
    return [p.grad.numpy() for p in model.parameters() if p.grad is not None], scales.before.numpy()


def digest_of(result: tuple[list[np.ndarray], np.ndarray]) -> str:
    found, scales = result
    return digest([torch.from_numpy(each) for each in (*found, scales)])


def test_what_is_not_a_number_on_one_rank_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def maximum(world: World, x: Tensor) -> Tensor:  # as libraries may compute it
        return x.copy_(torch.where(x >= 0, x, 0))

    monkeypatch.setattr(World, "all_reduce_max_", maximum)
    model, factor = network(), [1.0]
    gradients, _ = made(model)

    def forward_spoilt(module: nn.Module, part: range) -> tuple[Tensor, Tensor]:
        logits, gradient = forward(module, part)
        return logits, gradient * factor[0]

    gradients.prepare(forward_spoilt, [1] * BATCH)
    factor[0] = math.nan
    compute_gradients(gradients, forward_spoilt, [1] * BATCH)
    assert all(p.grad is not None and p.grad.isnan().all() for p in model.parameters())


def test_gradients_are_close_to_autograds() -> None:
    found, _ = compute(WORLD)
    model = network().double()
    images, labels = samples()
    logits = model(images.double())
    logits.backward((logits.detach() - F.one_hot(labels, CLASSES)) / BATCH)
    for gradient, p in zip(found, model.parameters(), strict=True):
        assert p.grad is not None
        expected = p.grad.numpy()
        assert np.abs(gradient - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("per_pass", [1, 2, 7])
def test_any_size_of_passes_gives_the_same(per_pass: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digest_of(compute(WORLD))
    monkeypatch.setattr(integer_sum, "_LEAST_PER_PASS", 1)
    monkeypatch.setattr(integer_sum, "_MOST_PER_PASS", per_pass)
    assert digest_of(compute(WORLD)) == whole


def in_group(world: World, batch: int) -> str:
    return digest_of(compute(world, batch))


@pytest.mark.parametrize("batch", [BATCH, 2])
def test_any_number_of_ranks_gives_the_same(batch: int) -> None:
    """With two samples, one of three ranks has none."""
    assert set(run_ranks(in_group, 3, batch)) == {digest_of(compute(WORLD, batch))}


def test_another_order_of_the_samples_gives_the_same() -> None:
    def reversed_samples(module: nn.Module, part: range) -> tuple[Tensor, Tensor]:
        logits, gradient = forward(module, range(BATCH - part.stop, BATCH - part.start))
        return logits, gradient

    model = network()
    gradients, _ = made(model)
    gradients.prepare(forward, [1] * BATCH)
    found = []
    for run in (forward, reversed_samples):
        compute_gradients(gradients, run, [1] * BATCH)
        compute_gradients(gradients, run, [1] * BATCH)
        found.append([p.grad for p in model.parameters()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*found, strict=True) if b is not None)


def check_with_one_wrong(world: World) -> None:
    """Rank 1's gradients are different by one percent, in one pass."""

    def forward_here(module: nn.Module, part: range) -> tuple[Tensor, Tensor]:
        logits, gradient = forward(module, part)
        return logits, gradient * (1 + (world.rank == 1) / 100)

    gradients, _ = made(network(), world)
    gradients.prepare(forward, [1] * BATCH)
    gradients.check(forward, [1] * BATCH)
    gradients.check(forward_here, [1] * BATCH)


def test_a_rank_that_computes_something_else_is_named() -> None:
    for outcome in try_ranks(check_with_one_wrong, 3):
        assert outcome.error is not None
        assert re.search(r"TrainingError: rank 1 \(.*computes different gradients", outcome.error)


def test_a_batch_whose_sums_may_round_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution's sums have 9 positions for each sample."""
    monkeypatch.setattr(trial, "MOST_TERMS", 9 * (BATCH - 1) + 8)
    gradients, _ = made(network())
    with pytest.raises(UsageError, match=r"--batch-size 11: .* up to --batch-size 10$"):
        gradients.prepare(forward, [1] * BATCH)
    monkeypatch.setattr(trial, "MOST_TERMS", 9 * BATCH)
    made(network())[0].prepare(forward, [1] * BATCH)


def test_a_layer_with_too_many_terms_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "MOST_TERMS", 15)
    with pytest.raises(UsageError, match=r"--model net: .* a sum of 16 products may round.*\(layer 5\)"):
        made(nn.Sequential(*[nn.Flatten()] * 5, nn.Linear(16, 2)))[0].prepare(
            lambda module, part: (logits := module(torch.ones(len(part), 16)), torch.ones_like(logits)),
            [1] * BATCH,
        )


def nan_in(place: str) -> Callable[[nn.Module, range], tuple[Tensor, Tensor]]:
    def run(module: nn.Module, part: range) -> tuple[Tensor, Tensor]:
        images, _ = samples()
        if place == "images":
            images[5] = torch.nan
        logits = module(images[part.start : part.stop])
        gradient = torch.ones_like(logits) / BATCH
        if place == "gradient" and 5 in part:
            gradient[5 - part.start] = torch.inf
        return logits, gradient

    return run


@pytest.mark.parametrize("place", ["images", "gradient"])
def test_values_that_are_not_finite_are_not_lost(place: str) -> None:
    """They have no integer. The run then ends, because its weights are not finite."""
    model = network()
    gradients, _ = made(model)
    gradients.prepare(forward, [1] * BATCH)
    compute_gradients(gradients, forward, [1] * BATCH)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    compute_gradients(gradients, nan_in(place), [1] * BATCH)
    assert all(p.grad is not None and p.grad.isnan().all() for p in model.parameters())


def test_scales_of_another_model_are_refused() -> None:
    gradients, scales = made(network())
    scales.restore(torch.ones(20))
    with pytest.raises(
        CheckpointError,
        match=r"scales for 20 tensors, but --model net now has [0-9]+: its code has changed",
    ):
        gradients.prepare(forward, [1] * BATCH)
