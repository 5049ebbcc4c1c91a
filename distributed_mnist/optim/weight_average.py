"""The mean of the weights of a run's last steps, which does better than the weights of any of them.

At a rate that does not end at zero, the weights go on moving about a place without coming to rest there;
their mean lies nearer to it. Sources: Polyak and Juditsky, "Acceleration of stochastic approximation by
averaging", 1992; for networks Izmailov and others, "Averaging weights leads to wider optima and better
generalization", 2018.
"""

import torch
from torch import Tensor

from ..errors import CheckpointError
from .optimizers import Optimizer

_NAME = "average"  # in the optimizer's state of a parameter, and so in a checkpoint


@torch.no_grad()
def join(optimizer: Optimizer, before: int) -> None:
    """Take the weights of this moment into the mean of the `before` ones that came earlier."""
    weights = _weights(optimizer)
    if before == 0:
        for p in weights:
            optimizer.state[p][_NAME] = p.detach().clone()
    else:
        means = [optimizer.state[p][_NAME] for p in weights]
        torch._foreach_lerp_(means, weights, 1 / (before + 1))


@torch.no_grad()
def adopt(optimizer: Optimizer) -> None:
    """Let the weights be their mean, and forget it."""
    for p in _weights(optimizer):
        p.copy_(optimizer.state[p].pop(_NAME))


def require(optimizer: Optimizer) -> None:
    """Raise `CheckpointError` if a checkpoint's state was put in and there is no mean to go on with."""
    if any(optimizer.state[p].get(_NAME) is None for p in _weights(optimizer)):
        raise CheckpointError("the checkpoint that was gone on from lacks the mean of its weights")


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
