"""Average the weights of a run's last steps: the mean does better than the weights of any single step.

If the learning rate does not end at zero, the weights keep moving around a point and do not converge. Their
mean is closer to that point. Sources: Polyak and Juditsky, "Acceleration of stochastic approximation by
averaging", 1992; for networks Izmailov and others, "Averaging weights leads to wider optima and better
generalization", 2018.
"""

import torch
from torch import Tensor

from ..errors import CheckpointError
from .optimizers import Optimizer

_STATE_KEY = "average"  # in the optimizer's state of a parameter, and so in a checkpoint


@torch.no_grad()
def update(optimizer: Optimizer, count: int) -> None:
    """Add the current weights to the running mean, which is over `count` earlier steps."""
    weights = _weights(optimizer)
    if count == 0:
        for p in weights:
            optimizer.state[p][_STATE_KEY] = p.detach().clone()
    else:
        means = [optimizer.state[p][_STATE_KEY] for p in weights]
        torch._foreach_lerp_(means, weights, 1 / (count + 1))


@torch.no_grad()
def apply_mean(optimizer: Optimizer) -> None:
    """Replace the weights with their running mean, and delete the mean."""
    for p in _weights(optimizer):
        p.copy_(optimizer.state[p].pop(_STATE_KEY))


def require_mean(optimizer: Optimizer) -> None:
    """Raise `CheckpointError` if the optimizer's state, which is from a checkpoint, lacks the mean."""
    if any(optimizer.state[p].get(_STATE_KEY) is None for p in _weights(optimizer)):
        raise CheckpointError(
            "the checkpoint lacks the running mean of its weights, so it cannot be resumed"
        )


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
