"""Adam, AdamW and SGD, in the state format of torch's own optimizers.

torch's own optimizers import torch's compiler when they are made, only to exclude themselves from it. This
takes a second or more of every start (docs/explanation/performance.md). The three steps are short enough to
be written here.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .fused import Number
from .kernels import FUSED, Kernels

Group = dict[str, Any]
"""A group of parameters with their hyperparameters."""


def _unwrapped(method: Any) -> Any:
    """Return a method of torch's base class without the wrapper that imports the compiler."""
    return getattr(method, "__wrapped__", method)


class Optimizer(torch.optim.Optimizer):
    """torch's base class, whose parameter groups and state are the format of checkpoints.

    A subclass implements `update`, and `numbers` if it needs others than the learning rate.
    """

    add_param_group = _unwrapped(torch.optim.Optimizer.add_param_group)
    state_dict = _unwrapped(torch.optim.Optimizer.state_dict)
    load_state_dict = _unwrapped(torch.optim.Optimizer.load_state_dict)
    zero_grad = _unwrapped(torch.optim.Optimizer.zero_grad)

    def __init__(self, parameters: Any, defaults: Group, kernels: Kernels) -> None:
        self.kernels = kernels
        super().__init__(parameters, defaults)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter; each must have a `grad`. `closure` is not used."""
        self.apply(self.next_numbers())

    # Without this, torch wraps `step` for profiler marks and step hooks, which are not used here: 20 µs.
    step.hooked = True  # type: ignore[attr-defined]

    def next_numbers(self) -> list[list[float]]:
        """Begin a step: return the numbers of each group that change from step to step.

        All else of a step is in `apply`, which does not look at the CPU's memory, so a GPU can repeat it.
        """
        return [self.numbers(group["params"], group) for group in self.param_groups]

    @torch.no_grad()
    def apply(self, numbers: Sequence[Sequence[Number]]) -> None:
        """Take the step that `next_numbers` has begun. The numbers may be scalar tensors on the device."""
        for group, its_numbers in zip(self.param_groups, numbers, strict=True):
            parameters = group["params"]
            self.update(parameters, [p.grad for p in parameters], group, its_numbers)

    def numbers(self, parameters: list[Tensor], group: Group) -> list[float]:
        """Return the numbers of a group, by default its learning rate."""
        return [group["lr"]]

    def update(
        self, parameters: list[Tensor], gradients: list[Tensor], group: Group, numbers: Sequence[Number]
    ) -> None:
        """Update the parameters of one group, which holds its hyperparameters."""
        raise NotImplementedError

    def new_count(self, parameter: Tensor) -> Tensor:
        """Return zero as the number of a parameter's steps, a float32 where the kernels read it."""
        return torch.zeros((), device="cpu" if self.kernels.counts_on_cpu else parameter.device)

    def adam_numbers(self, parameters: list[Tensor], group: Group) -> list[float]:
        """Return the numbers of a step of Adam. `adam_ratio` multiplies the learning rate."""
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if "step" not in state:
                state["step"] = self.new_count(p)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        steps = [state["step"] for state in states]
        lr = group["lr"] * group.get("adam_ratio", 1)
        return self.kernels.adam_numbers(
            lr=lr, steps=steps, betas=group["betas"], weight_decay=group["weight_decay"]
        )

    def adam_step(
        self,
        kernel: Callable[..., None],
        parameters: list[Tensor],
        gradients: list[Tensor],
        group: Group,
        numbers: Sequence[Number],
    ) -> None:
        """Take Adam's step with one of the kernels."""
        states = [self.state[p] for p in parameters]
        means, squares, steps = (
            [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        kernel(
            parameters, gradients, means, squares, steps, numbers,
            betas=group["betas"], weight_decay=group["weight_decay"],
        )  # fmt: skip


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015), or AdamW (Loshchilov and Hutter, 2019) if `decoupled`."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        decoupled: bool = False,
        kernels: Kernels = FUSED,
    ) -> None:
        fixed = {"eps": 1e-8, "amsgrad": False, "maximize": False}
        super().__init__(
            parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **fixed}, kernels
        )
        self._kernel = kernels.adamw_ if decoupled else kernels.adam_

    def numbers(self, parameters: list[Tensor], group: Group) -> list[float]:
        """Return the numbers of a group; see `Optimizer`."""
        return self.adam_numbers(parameters, group)

    def update(
        self, parameters: list[Tensor], gradients: list[Tensor], group: Group, numbers: Sequence[Number]
    ) -> None:
        """Update the parameters of one group; see `Optimizer`."""
        self.adam_step(self._kernel, parameters, gradients, group, numbers)


class SGD(Optimizer):
    """Stochastic gradient descent with Nesterov momentum (Sutskever and others, 2013)."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        kernels: Kernels = FUSED,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, kernels
        )

    def update(
        self, parameters: list[Tensor], gradients: list[Tensor], group: Group, numbers: Sequence[Number]
    ) -> None:
        """Update the parameters of one group; see `Optimizer`."""
        is_first_step = "momentum_buffer" not in self.state[parameters[0]]
        if is_first_step and group["momentum"]:
            for p in parameters:
                self.state[p]["momentum_buffer"] = torch.empty_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters] if group["momentum"] else []
        self.kernels.sgd_(
            parameters, gradients, buffers, lr=numbers[0], momentum=group["momentum"],
            weight_decay=group["weight_decay"], is_first_step=is_first_step,
        )  # fmt: skip
