"""Muon: orthogonal steps for hidden layers, Adam's for the rest, a state that goes through checkpoints."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from distributed_mnist.checkpoint import load_optimizer
from distributed_mnist.config import Recipe
from distributed_mnist.errors import CheckpointError
from distributed_mnist.muon import Muon, orthogonalised
from distributed_mnist.optim import make_optimizer, set_learning_rate

RECIPE = Recipe(optimizer="muon", lr=0.1, momentum=0.9, adam_lr=0.01, beta1=0.8, beta2=0.9)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))


def give_gradients(model: nn.Module, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=noise)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("shape", [(8, 8), (16, 144), (144, 16), (3, 1), (1, 9)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.max() < 1.3
    if shape != (8, 8):  # a square matrix of noise has a direction of almost nothing
        assert values.min() > 0.6


def test_directions_are_kept() -> None:
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalised(matrix) @ right.T
    assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-4)


def test_a_zero_matrix_stays_zero() -> None:
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_the_first_step_is_the_papers() -> None:
    """Keller Jordan's update: the orthogonalised gradient, times the rate and a factor of its shape."""
    model = network()
    optimizer = make_optimizer(RECIPE, model)
    assert isinstance(optimizer, Muon)
    before = weights(model)
    give_gradients(model, 3)
    optimizer.step()
    convolution, _, hidden, _, last, _ = (
        p.detach() - old for p, old in zip(model.parameters(), before, strict=True)
    )
    gradients: list[Any] = [p.grad for p in model.parameters()]
    for moved, gradient in ((convolution, gradients[0]), (hidden, gradients[2])):
        rows, columns = gradient.flatten(1).shape
        expected = orthogonalised(gradient.flatten(1)) * -0.1 * math.sqrt(max(1, rows / columns))
        assert torch.allclose(moved.flatten(1), expected, atol=1e-5)
    assert torch.allclose(last, -0.01 * gradients[4].sign(), atol=1e-5)  # Adam's first step


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


def test_weight_decay_is_decoupled() -> None:
    model = network()
    optimizer = make_optimizer(RECIPE.replace(weight_decay=0.5), model)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for i, (new, old) in enumerate(zip(weights(model), before, strict=True)):
        assert torch.allclose(new, old * (1 - 0.5 * (0.1 if i in (0, 2) else 0.01)))


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
