"""Test that optimizers get the recipe's numbers, and schedules against rates computed by hand."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from distributed_mnist.common.digest import digest
from distributed_mnist.config import Recipe
from distributed_mnist.errors import UsageError
from distributed_mnist.optim.schedule import make_optimizer, make_schedule, set_learning_rate
from distributed_mnist.runs.optimizer_state import load_optimizer

CLOSE: Any = {"rel": 1e-12, "abs": 1e-15}


def rates(steps_per_epoch: int, **recipe: Any) -> list[float]:
    made = Recipe(**recipe)
    lr_at = make_schedule(made, steps_per_epoch)
    return [lr_at(step) for step in range(made.epochs * steps_per_epoch)]


def test_constant() -> None:
    assert rates(5, schedule="constant", lr=0.3, epochs=4) == [0.3] * 20


def test_the_original_scripts_rule() -> None:
    """The original sets `lr * 0.1 ** (epoch // 10)` at the start of each epoch."""
    got = rates(3, schedule="step", lr=1e-3, epochs=31, decay_every=10, decay_factor=0.1)
    expected = [1e-3 * (0.1 ** (epoch // 10)) for epoch in range(31) for _ in range(3)]
    assert got == pytest.approx(expected, **CLOSE)
    assert [got[0], got[29], got[30], got[59], got[60], got[92]] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-6], **CLOSE
    )


def test_step_with_other_numbers() -> None:
    got = rates(1, schedule="step", lr=8.0, epochs=6, decay_every=2, decay_factor=0.5)
    assert got == [8.0, 8.0, 4.0, 4.0, 2.0, 2.0]


def test_cosine() -> None:
    """With 20 steps, 4 rise in fifths and 16 fall along half a cosine."""
    got = rates(10, schedule="cosine", lr=1.0, epochs=2, warmup=0.2)
    assert got[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], **CLOSE)
    assert got[8] == pytest.approx((1 + math.sqrt(0.5)) / 2, **CLOSE)  # a quarter of the way
    assert got[12] == pytest.approx(0.5, **CLOSE)
    assert got[-1] == pytest.approx((1 - math.cos(math.pi / 16)) / 2, **CLOSE)
    assert all(a > b for a, b in pairwise(got[4:]))


def test_cosine_without_warmup() -> None:
    got = rates(4, schedule="cosine", lr=2.0, epochs=1, warmup=0.0)
    assert got == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)], **CLOSE)


def test_rates_have_the_same_bits_on_every_machine() -> None:
    """These rates were computed once, without a function of Python's that differs between libraries."""
    cosine = rates(100, schedule="cosine", lr=0.01, epochs=3, warmup=0.1)
    stepwise = rates(1, schedule="step", lr=0.01, epochs=60, decay_every=2, decay_factor=0.7)
    assert digest([cosine, stepwise])[:16] == "a6aba67e22a9de4d"


def test_one_cycle() -> None:
    """With 21 steps, 5.25 rise from a tenth, and the rest fall to a thousandth at the last step."""
    got = rates(7, schedule="one-cycle", lr=1.0, epochs=3, warmup=0.25)
    rise, fall = 0.9 / 5.25, 0.999 / (20 - 5.25)
    assert got[0] == pytest.approx(0.1, **CLOSE)
    assert got[3] == pytest.approx(0.1 + 3 * rise, **CLOSE)
    assert got[5] == pytest.approx(0.1 + 5 * rise, **CLOSE)
    assert got[6] == pytest.approx(1 - 0.75 * fall, **CLOSE)
    assert got[13] == pytest.approx(1 - 7.75 * fall, **CLOSE)
    assert got[20] == pytest.approx(0.001, **CLOSE)


def test_one_cycle_without_warmup() -> None:
    got = rates(5, schedule="one-cycle", lr=1.0, epochs=1, warmup=0.0)
    assert got == pytest.approx([1.0, 0.75025, 0.5005, 0.25075, 0.001], **CLOSE)


def test_one_cycle_to_another_end() -> None:
    got = rates(5, schedule="one-cycle", lr=1.0, epochs=1, warmup=0.0, final_div=5)
    assert got == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], **CLOSE)


def test_one_cycle_has_fallen_when_averaging_begins() -> None:
    """With 10 steps, the last five are averaged, all at the last rate."""
    got = rates(10, schedule="one-cycle", lr=1.0, epochs=1, warmup=0.1, final_div=5, average=0.5)
    assert got == pytest.approx([0.1, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2], **CLOSE)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "one-cycle"])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("average", [0.0, 0.3, 0.6, 1.0])
def test_every_rate_is_usable(schedule: str, warmup: float, steps: int, average: float) -> None:
    """At any length no rate is negative or above the recipe's, and at least one is useful."""
    if schedule == "one-cycle" and average and warmup + average >= 1:
        with pytest.raises(UsageError, match=r"^--average must be below 1 - --warmup "):
            Recipe(schedule="one-cycle", warmup=warmup, average=average)
        return
    got = rates(steps, schedule=schedule, lr=0.5, epochs=1, warmup=warmup, average=average)
    assert all(0 <= rate <= 0.5 * (1 + 1e-12) for rate in got)
    assert max(got) > 0


@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("steps", [5, 6, 7, 8, 470])
def test_one_cycle_ends_at_a_thousandth(warmup: float, steps: int) -> None:
    assert rates(steps, schedule="one-cycle", lr=1.0, epochs=1, warmup=warmup)[-1] == pytest.approx(1e-3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


ADAM: dict[str, Any] = {"lr": 0.02, "betas": (0.7, 0.8), "weight_decay": 0.3}
TORCHS: list[tuple[Recipe, Any]] = [
    (
        Recipe(optimizer="adam", lr=0.02, beta1=0.7, beta2=0.8, weight_decay=0.3),
        lambda parameters: torch.optim.Adam(parameters, **ADAM),
    ),
    (
        Recipe(optimizer="adamw", lr=0.02, beta1=0.7, beta2=0.8, weight_decay=0.3),
        lambda parameters: torch.optim.AdamW(parameters, **ADAM),
    ),
    (
        Recipe(optimizer="sgd", lr=0.02, momentum=0.6, weight_decay=0.3),
        lambda parameters: torch.optim.SGD(
            parameters, lr=0.02, momentum=0.6, weight_decay=0.3, nesterov=True
        ),
    ),
    (
        Recipe(optimizer="sgd", lr=0.02, momentum=0.0),
        lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    ),
]


@pytest.mark.parametrize(("recipe", "torchs"), TORCHS)
def test_optimizers_do_as_torchs_with_the_recipes_numbers(recipe: Recipe, torchs: Any) -> None:
    """They agree step by step, and their state has torch's names, because checkpoints hold it."""
    model, twin = network(), network()
    mine, its = make_optimizer(recipe, model), torchs(twin.parameters())
    for seed in range(5):
        noise = torch.Generator().manual_seed(seed)
        for p, other in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=noise)
            other.grad = p.grad.clone()
        mine.step()
        its.step()
        for p, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-7)
    (group,), (expected,) = mine.param_groups, its.param_groups
    assert len(group["params"]) == 4
    assert {name: group[name] for name in ("lr", "weight_decay")} == {
        name: expected[name] for name in ("lr", "weight_decay")
    }
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        kept = {name: value for name, value in its.state[other].items() if value is not None}
        assert mine.state[p].keys() == kept.keys()
        for name, value in kept.items():
            torch.testing.assert_close(mine.state[p][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("recipe", "torchs"), TORCHS)
def test_a_state_of_torchs_can_be_taken_over(recipe: Recipe, torchs: Any) -> None:
    """The state is as in a checkpoint of an earlier version; the next step is the same."""
    model, twin = network(), network()
    mine, its = make_optimizer(recipe, model), torchs(twin.parameters())
    for p in twin.parameters():
        p.grad = torch.ones_like(p)
    its.step()
    model.load_state_dict(twin.state_dict())
    load_optimizer(mine, copy.deepcopy(its.state_dict()), "here")
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad, other.grad = torch.full_like(p, 0.5), torch.full_like(p, 0.5)
    mine.step()
    its.step()
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "decays_apart"), [("adam", False), ("adamw", True)])
def test_a_step_is_the_textbooks(name: str, decays_apart: bool) -> None:
    """Compute Adam (Kingma and Ba) with decay in the gradient, or decoupled (Loshchilov and Hutter)."""
    recipe = Recipe(optimizer=name, lr=0.1, beta1=0.8, beta2=0.9, weight_decay=0.01)  # type: ignore[arg-type]
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    holder = nn.Module()
    holder.weight = weight
    optimizer = make_optimizer(recipe, holder)
    x, m, v = weight.detach().double(), torch.zeros(3).double(), torch.zeros(3).double()
    for t in range(1, 4):
        given = torch.tensor([0.5, -1.0, 0.1 * t]).double()
        weight.grad = given.float()
        optimizer.step()
        g = given if decays_apart else given + 0.01 * x
        x = x * (1 - 0.1 * 0.01) if decays_apart else x
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        x = x - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
    assert torch.allclose(weight.detach().double(), x, rtol=1e-5)


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    next(model.parameters()).requires_grad_(False)
    assert len(make_optimizer(Recipe(), model).param_groups[0]["params"]) == 3


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_rate_set_is_the_rate_used(name: str) -> None:
    model = network()
    optimizer = make_optimizer(Recipe(optimizer=name), model)  # type: ignore[arg-type]
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
