"""Make the recipe's optimizer, and its learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import Recipe
from ..distributed.world import World
from ..exact.elementary import sin_and_cos
from . import own_optimizer
from .kernels import EXACT, FUSED
from .muon import Muon
from .optimizers import SGD, Adam
from .shared_work import SharedWork, map_here


def make_optimizer(recipe: Recipe, model: nn.Module, world: World | None = None) -> torch.optim.Optimizer:
    """Make the recipe's optimizer for this model. The ranks of `world` share its work if all are on CPU.

    Raises `UsageError` for one that cannot be used.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if ":" in recipe.optimizer:
        return own_optimizer.make(recipe.optimizer, parameters, recipe.lr)
    common: dict[str, Any] = {
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "kernels": EXACT if recipe.precision == "exact" else FUSED,
    }
    betas = (recipe.beta1, recipe.beta2)
    if recipe.optimizer == "sgd":
        return SGD(parameters, momentum=recipe.momentum, **common)
    if recipe.optimizer == "muon":
        ratio = recipe.adam_lr / recipe.lr
        on_cpu = world is not None and world.size > 1 and all(peer.device == "cpu" for peer in world.peers)
        map_matrices = SharedWork(world) if world is not None and on_cpu else map_here
        return Muon(
            parameters, momentum=recipe.momentum, adam_ratio=ratio, betas=betas, map_matrices=map_matrices,
            **common,
        )  # fmt: skip
    return Adam(parameters, betas=betas, decoupled=recipe.optimizer == "adamw", **common)


def make_schedule(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, `0 .. recipe.total_steps(steps_per_epoch) - 1`.

    A rate has the same bits on every machine: Python's `math.cos` and `**` do not.

    - constant: `lr`.
    - step: `lr * decay_factor ** (epoch // decay_every)`, the rule of the original script.
    - cosine: a linear rise over the fraction `warmup` of the steps, then half a cosine down to zero
      (Loshchilov and Hutter, "SGDR", 2017).
    - one-cycle: a linear rise from `lr / 10` over the fraction `warmup` of the steps, then a linear fall to
      `lr / final_div` (after Smith, "A disciplined approach to neural network hyper-parameters", 2018). The
      rate stays there for the steps whose weights are averaged.
    """
    total_steps = recipe.total_steps(steps_per_epoch)
    warmup_steps = recipe.warmup * total_steps
    final_rate_start = total_steps - max(1, recipe.averaged_steps(total_steps))

    def constant(step: int) -> float:
        return recipe.lr

    def stepwise(step: int) -> float:
        decays = step // steps_per_epoch // recipe.decay_every
        return recipe.lr * math.prod([recipe.decay_factor] * decays)

    def cosine(step: int) -> float:
        if step < warmup_steps:
            return recipe.lr * (step + 1) / (warmup_steps + 1)
        falling_steps = max(total_steps - warmup_steps, 1)
        angle = math.pi * (step - warmup_steps) / falling_steps
        cosine = sin_and_cos(torch.tensor(angle, dtype=torch.float64))[1].item()
        return recipe.lr * (1 + cosine) / 2

    def one_cycle(step: int) -> float:
        first_rate, final_rate = recipe.lr / 10, recipe.lr / recipe.final_div
        if step < warmup_steps:
            return first_rate + (recipe.lr - first_rate) * step / warmup_steps
        falling_steps = final_rate_start - warmup_steps
        if falling_steps <= 0:  # so few steps that the rate is at its peak until the end
            return recipe.lr
        steps_since_peak = min(step - warmup_steps, falling_steps)
        return recipe.lr + (final_rate - recipe.lr) * steps_since_peak / falling_steps

    schedules = {"constant": constant, "step": stepwise, "cosine": cosine, "one-cycle": one_cycle}
    return schedules[recipe.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups; for groups of a user's own, times their ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1)
