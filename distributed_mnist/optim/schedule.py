"""The optimizer, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable

from torch import nn

from ..config import Recipe
from .muon import Muon
from .optimizers import SGD, Adam, Optimizer


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """The recipe's optimizer for this model."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lr, betas, decay = recipe.lr, (recipe.beta1, recipe.beta2), recipe.weight_decay
    if recipe.optimizer == "sgd":
        return SGD(parameters, lr=lr, momentum=recipe.momentum, weight_decay=decay)
    if recipe.optimizer == "muon":
        ratio = recipe.adam_lr / lr
        return Muon(
            parameters, lr=lr, momentum=recipe.momentum, adam_ratio=ratio, betas=betas, weight_decay=decay
        )
    return Adam(parameters, lr=lr, betas=betas, weight_decay=decay, decoupled=recipe.optimizer == "adamw")


def make_schedule(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """`lr_at(step)` for steps `0 .. recipe.total_steps(steps_per_epoch) - 1`.

    - constant: `lr`.
    - step: `lr * decay_factor ** (epoch // decay_every)`, the original script's rule.
    - cosine: a linear rise over the first `warmup` of the steps, then half a cosine down to zero
      (Loshchilov and Hutter, "SGDR", 2017).
    - one-cycle: a linear rise from `lr / 10`, then a linear fall to `lr / final_div`
      (after Smith, "A disciplined approach to neural network hyper-parameters", 2018), where it stays for
      the steps that are averaged.
    """
    total = recipe.total_steps(steps_per_epoch)
    rising = recipe.warmup * total
    fallen = total - max(1, recipe.averaged_steps(total))  # the first step at the last rate

    def constant(step: int) -> float:
        return recipe.lr

    def stepwise(step: int) -> float:
        return recipe.lr * recipe.decay_factor ** (step // steps_per_epoch // recipe.decay_every)

    def cosine(step: int) -> float:
        if step < rising:
            return recipe.lr * (step + 1) / (rising + 1)
        return recipe.lr * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1))) / 2

    def one_cycle(step: int) -> float:
        low, end = recipe.lr / 10, recipe.lr / recipe.final_div
        if step < rising:
            return low + (recipe.lr - low) * step / rising
        falling = fallen - rising
        if falling <= 0:  # so few steps that the peak is among the last
            return recipe.lr
        return recipe.lr + (end - recipe.lr) * min(step - rising, falling) / falling

    return {"constant": constant, "step": stepwise, "cosine": cosine, "one-cycle": one_cycle}[
        recipe.schedule
    ]


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Use this rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
