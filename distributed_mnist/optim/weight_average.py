"""Average the weights: the mean of a run's last steps, or an exponential moving average of all steps.

If the learning rate does not end at zero, the weights keep moving around a point and do not converge. Their
mean is closer to that point. Sources: Polyak and Juditsky, "Acceleration of stochastic approximation by
averaging", 1992; for networks Izmailov and others, "Averaging weights leads to wider optima and better
generalization", 2018; for the moving average Tarvainen and Valpola, "Mean teachers are better role models",
2017.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import CheckpointError
from .kernels import FUSED
from .optimizers import Optimizer

# In the optimizer's state of a parameter, and so in a checkpoint.
_MEAN = "average"
_EMA = "weights_ema"
"""The moving average. In a checkpoint it is exchanged with the weights, see `moving_average_in_place`."""
KEYS = (_MEAN, _EMA)
"""No optimizer may use them: `exchange` takes every tensor of this name for an average of the weights."""


@torch.no_grad()
def update(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Add the current weights to the running mean, which is over `count` earlier steps."""
    _move(optimizer, _MEAN, 1 / (count + 1), first=count == 0)


@torch.no_grad()
def apply_mean(optimizer: torch.optim.Optimizer) -> None:
    """Replace the weights with their running mean, and delete the mean."""
    for p in _weights(optimizer):
        p.copy_(optimizer.state[p].pop(_MEAN))


@torch.no_grad()
def update_moving_average(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Move the moving average to the weights after step `step`: all of the way in step 0, and then by
    `1 - decay` of it."""
    _move(optimizer, _EMA, 1 - decay, first=step == 0)


@torch.no_grad()
def exchange(optimizer: torch.optim.Optimizer) -> None:
    """Exchange the weights with their moving average; do nothing if there is none."""
    for p in _weights(optimizer):
        if (average := optimizer.state.get(p, {}).get(_EMA)) is not None:
            weights = p.clone()
            p.copy_(average)
            average.copy_(weights)


@contextlib.contextmanager
def moving_average_in_place(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside this context the model has the moving average, if there is one, in place of its weights.

    It is evaluated and saved so. In every checkpoint the model is what the evaluation says it is, and the
    state of the optimizer has the weights with which training continues.
    """
    exchange(optimizer)
    try:
        yield
    finally:
        exchange(optimizer)


def require_mean(optimizer: torch.optim.Optimizer, *, moving: bool = False) -> None:
    """Raise `CheckpointError` if the optimizer's state, which is from a checkpoint, lacks the mean.

    With `moving`, the moving average.
    """
    key = _EMA if moving else _MEAN
    if any(optimizer.state.get(p, {}).get(key) is None for p in _weights(optimizer)):
        mean = "moving average" if moving else "running mean"
        raise CheckpointError(f"the checkpoint lacks the {mean} of its weights, so it cannot be resumed")


def _move(optimizer: torch.optim.Optimizer, key: str, share: float, *, first: bool) -> None:
    """Move the average by a share of its way to the weights; at `first` it becomes a copy of them."""
    weights = _weights(optimizer)
    if first:
        for p in weights:
            optimizer.state[p][key] = p.detach().clone()
    else:
        kernels = optimizer.kernels if isinstance(optimizer, Optimizer) else FUSED
        kernels.lerp_([optimizer.state[p][key] for p in weights], weights, share)


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
