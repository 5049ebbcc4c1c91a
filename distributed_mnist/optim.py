"""The optimizer, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable

import torch
from torch import nn

from .config import Recipe
from .muon import Muon


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """torch's own optimizer for this recipe, in its fused form where the device has one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters) or None
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
            fused=fused,
        )
    if recipe.optimizer == "muon":
        return Muon(
            parameters,
            lr=recipe.lr,
            momentum=recipe.momentum,
            adam_ratio=recipe.adam_lr / recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            weight_decay=recipe.weight_decay,
        )
    adam = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return adam(
        parameters,
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


def make_schedule(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """`lr_at(step)` for steps `0 .. recipe.total_steps(steps_per_epoch) - 1`.

    - constant: `lr`.
    - step: `lr * decay_factor ** (epoch // decay_every)`, the original script's rule.
    - cosine: a linear rise over the first `warmup` of the steps, then half a cosine down to zero
      (Loshchilov and Hutter, "SGDR", 2017).
    - one-cycle: a linear rise from `lr / 10`, then a linear fall to `lr / 1000`
      (after Smith, "A disciplined approach to neural network hyper-parameters", 2018).
    """
    total = recipe.total_steps(steps_per_epoch)
    rising = recipe.warmup * total

    def constant(step: int) -> float:
        return recipe.lr

    def stepwise(step: int) -> float:
        return recipe.lr * recipe.decay_factor ** (step // steps_per_epoch // recipe.decay_every)

    def cosine(step: int) -> float:
        if step < rising:
            return recipe.lr * (step + 1) / (rising + 1)
        return recipe.lr * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1))) / 2

    def one_cycle(step: int) -> float:
        low, end = recipe.lr / 10, recipe.lr / 1000
        if step < rising:
            return low + (recipe.lr - low) * step / rising
        falling = total - 1 - rising  # zero where the peak is the last step
        return recipe.lr + ((end - recipe.lr) * (step - rising) / falling if falling > 0 else 0)

    return {"constant": constant, "step": stepwise, "cosine": cosine, "one-cycle": one_cycle}[
        recipe.schedule
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
