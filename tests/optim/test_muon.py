"""Test Muon: orthogonal steps for hidden layers, Adam's for the rest, and its state in checkpoints."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_mnist.config import Recipe
from distributed_mnist.errors import CheckpointError
from distributed_mnist.optim.muon import Muon
from distributed_mnist.optim.newton_schulz import orthogonalise
from distributed_mnist.optim.schedule import make_optimizer, set_learning_rate
from distributed_mnist.runs.optimizer_state import load_optimizer

RECIPE = Recipe(optimizer="muon", lr=0.1, momentum=0.9, adam_lr=0.01, beta1=0.8, beta2=0.9)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))


def give_gradients(model: nn.Module, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=noise)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("shape", [(8, 8), (16, 144), (144, 16), (3, 1), (1, 9)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.max() < 1.3
    if shape != (8, 8):  # a square matrix of noise has a direction of almost nothing
        assert values.min() > 0.6


def test_directions_are_kept() -> None:
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalise(matrix) @ right.T
    assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-4)


def test_a_zero_matrix_stays_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(3, 5)), torch.zeros(3, 5))


def reference(
    weight: Tensor, gradients: list[Tensor], *, lr: float, momentum: float, rounds: int = 3
) -> Tensor:
    """Compute Keller Jordan's update in float64; after each the weight gets its norm back."""
    w = weight.double().flatten(1)
    rows, columns = w.shape
    norm, mean = w.norm(), torch.zeros_like(w)
    for gradient in gradients:
        g = gradient.double().flatten(1)
        mean = momentum * mean + (1 - momentum) * g
        ahead = momentum * mean + (1 - momentum) * g
        x = ahead / ahead.norm()
        for _ in range(rounds):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        w = w - lr * max(1, rows / columns) ** 0.5 * x
        w = w * (norm / w.norm())
    return w.reshape(weight.shape)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_step_is_the_papers(steps: int) -> None:
    """The step is Nesterov's direction made orthogonal, times the rate and a factor for the shape."""
    model = network()
    optimizer = make_optimizer(RECIPE, model)
    assert isinstance(optimizer, Muon)
    before = weights(model)
    gradients: list[list[Tensor]] = []
    for seed in range(steps):
        give_gradients(model, seed)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    for i in (0, 2):
        expected = reference(before[i], [each[i] for each in gradients], lr=0.1, momentum=0.9)
        assert not torch.allclose(before[i].double(), expected, atol=1e-2)
        torch.testing.assert_close(weights(model)[i].double(), expected, rtol=1e-5, atol=1e-6)
    if steps == 1:
        moved = weights(model)[4] - before[4]
        torch.testing.assert_close(moved, -0.01 * gradients[0][4].sign(), rtol=0, atol=1e-6)


def test_hidden_weights_keep_their_size_and_others_do_not() -> None:
    model = network()
    optimizer = make_optimizer(RECIPE, model)
    before = weights(model)
    for seed in range(50):
        give_gradients(model, seed)
        optimizer.step()
    for i, (new, old) in enumerate(zip(weights(model), before, strict=True)):
        kept = float(new.norm() / old.norm())
        assert (abs(kept - 1) < 1e-5) == (i in (0, 2))
        assert float((new - old).norm()) > 0.2 * float(old.norm())  # they did turn


def test_a_weight_of_zeros_may_leave_zero() -> None:
    """It changes by a whole step, because it has no norm to keep. After that it has one."""
    model = network()
    hidden: Any = model[3]
    nn.init.zeros_(hidden.weight)
    optimizer = make_optimizer(RECIPE, model)
    give_gradients(model, 1)
    gradient = hidden.weight.grad.clone()
    optimizer.step()
    expected = -0.1 * orthogonalise(gradient) * math.sqrt(max(1, 8 / 16))
    torch.testing.assert_close(hidden.weight.detach(), expected)
    norm = hidden.weight.norm()
    optimizer.step()
    torch.testing.assert_close(hidden.weight.norm(), norm)


@pytest.mark.parametrize("rows", [4, 16, 40])
def test_a_tall_matrix_steps_as_far_as_its_shape_says(rows: int) -> None:
    """From zero, the spectral norm of a step is about the rate times sqrt(rows / columns)."""
    matrix, last = nn.Parameter(torch.zeros(rows, 10)), nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon(
        [matrix, last], lr=0.1, momentum=0.9, adam_ratio=0.1, betas=(0.8, 0.9), weight_decay=0.0
    )
    matrix.grad = torch.randn(rows, 10, generator=torch.Generator().manual_seed(1))
    last.grad = torch.zeros(2, 2)
    optimizer.step()
    length = float(torch.linalg.matrix_norm(matrix.detach(), 2)) / math.sqrt(max(1, rows / 10))
    assert 0.08 < length < 0.13


def test_how_weights_lie_in_memory_changes_nothing() -> None:
    """Convolutions have the channels-last layout in training."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(4, 3))
    other = copy.deepcopy(one).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not other[0].weight.is_contiguous()
    for model in (one, other):
        optimizer = make_optimizer(RECIPE, model)
        for seed in range(3):
            give_gradients(model, seed)
            for p in model.parameters():
                assert p.grad is not None
                p.grad = torch.empty_like(p).copy_(p.grad)
            optimizer.step()
    assert not other[0].weight.is_contiguous()
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_biases_and_the_last_layer_move_as_adam_moves_them() -> None:
    model = network()
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(RECIPE, model)
    rest = [p for i, p in enumerate(twin.parameters()) if i not in (0, 2)]
    adam = torch.optim.Adam(rest, lr=0.01, betas=(0.8, 0.9))
    for seed in range(5):
        for each in (model, twin):
            give_gradients(each, seed)
        optimizer.step()
        adam.step()
    for i in (1, 3, 4, 5):
        assert torch.allclose(weights(model)[i], weights(twin)[i], atol=1e-6)


def test_one_rate_moves_both() -> None:
    model = network()
    optimizer = make_optimizer(RECIPE, model)
    before = weights(model)
    give_gradients(model, 1)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert all(map(torch.equal, weights(model), before))


def test_weight_decay_is_decoupled_and_for_the_rest() -> None:
    """A weight that keeps its norm has nothing to decay."""
    model = network()
    optimizer = make_optimizer(RECIPE.replace(weight_decay=0.5), model)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for i, (new, old) in enumerate(zip(weights(model), before, strict=True)):
        if i in (0, 2):
            assert torch.equal(new, old)
        else:
            torch.testing.assert_close(new, old * (1 - 0.5 * 0.01))


def test_a_model_of_one_layer_is_adams() -> None:
    model = nn.Linear(4, 2)
    optimizer = make_optimizer(RECIPE, model)
    give_gradients(model, 0)
    optimizer.step()
    assert len(optimizer.param_groups) == 1


def test_goes_on_from_its_saved_state() -> None:
    model = network()
    optimizer = make_optimizer(RECIPE, model)
    for seed in range(3):
        give_gradients(model, seed)
        optimizer.step()
    twin = copy.deepcopy(model)
    other = make_optimizer(RECIPE, twin)
    load_optimizer(other, copy.deepcopy(optimizer.state_dict()), "here")
    for each, its in ((model, optimizer), (twin, other)):
        give_gradients(each, 9)
        its.step()
    assert all(map(torch.equal, weights(model), weights(twin)))


@pytest.mark.parametrize(("index", "key"), [(0, "exp_avg_sq"), (4, "momentum_buffer")])
def test_a_state_with_something_missing_is_refused(index: int, key: str) -> None:
    model = network()
    optimizer = make_optimizer(RECIPE, model)
    give_gradients(model, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][index][key]
    with pytest.raises(CheckpointError, match=f"it lacks {key}"):
        load_optimizer(make_optimizer(RECIPE, network()), saved, "here")
