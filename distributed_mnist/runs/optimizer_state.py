"""Restore the state of an optimizer from a checkpoint."""

import math
from typing import Any

import torch

from ..errors import CheckpointError
from ..optim.muon import Muon
from ..optim.optimizers import Adam, Optimizer

_ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}  # Adam's state for one parameter


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], name: str, *, steps: int = 0
) -> None:
    """Load saved state into an optimizer of the same type; keep the recipe's learning rate and options.

    Raises `CheckpointError` if the state does not fit the optimizer's parameters, or if it lacks that of a
    trained one although `steps` steps have been taken.
    """
    current = optimizer.state_dict()
    try:
        if not isinstance(optimizer, Optimizer):  # a user's own, which knows its state
            optimizer.load_state_dict(saved)
            return
        count = sum(len(group["params"]) for group in saved["param_groups"])
        if count != sum(len(group["params"]) for group in current["param_groups"]):
            raise ValueError("it has a different number of parameters")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        required = [
            _required_state(optimizer, group) for group in optimizer.param_groups for _ in group["params"]
        ]
        trained = {i for i, p in enumerate(parameters) if p.requires_grad and steps > 0}
        for i in saved["state"].keys() | trained:
            parameter_state = saved["state"].get(i, {})
            if lacking := {key for key in required[i] if parameter_state.get(key) is None}:
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        state = {
            i: {key: _restored(optimizer, parameters[i], key, value) for key, value in its_state.items()}
            for i, its_state in saved["state"].items()
        }
        counts = {float(its_state["step"]) for its_state in saved["state"].values() if "step" in its_state}
        if len(counts) > 1:
            raise ValueError("its parameters have taken different numbers of steps")
        optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{name}: its optimizer state does not fit: {error}") from error


def _required_state(optimizer: Optimizer, group: dict[str, Any]) -> set[str]:
    """Return the state keys that `optimizer.step()` expects for the parameters in this group."""
    if isinstance(optimizer, Muon):
        return {"momentum_buffer"} if group["matrices"] else _ADAM_STATE
    if isinstance(optimizer, Adam):
        return _ADAM_STATE
    return {"momentum_buffer"} if group["momentum"] else set()


def _restored(optimizer: Optimizer, parameter: torch.Tensor, key: str, value: Any) -> Any:
    """Return a state value where and as its parameter is in memory. Kernels assume it without a check."""
    if key == "step":
        step = torch.as_tensor(value, dtype=torch.float32).reshape(())
        if not 0 <= step < math.inf:  # also for NaN
            raise ValueError("step is not a number of steps")
        return optimizer.new_count(parameter).copy_(step)
    if value is None:
        return value
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        raise ValueError(f"{key} does not have the shape of its parameter")
    return torch.empty_like(parameter).detach().copy_(value)
