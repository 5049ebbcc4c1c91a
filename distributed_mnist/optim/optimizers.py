"""Adam, AdamW and SGD by torch's fused kernels, in the state format of torch's own optimizers.

torch's own import its compiler when they are made, to tell it to keep away: a second or more of every
start (docs/explanation/performance.md). These three steps are short enough to be written here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def _plain(method: Any) -> Any:
    """A method of torch's base class without the wrapper that imports the compiler."""
    return getattr(method, "__wrapped__", method)


class Optimizer(torch.optim.Optimizer):
    """torch's base class, whose parameter groups and state are the format of checkpoints."""

    add_param_group = _plain(torch.optim.Optimizer.add_param_group)
    state_dict = _plain(torch.optim.Optimizer.state_dict)
    load_state_dict = _plain(torch.optim.Optimizer.load_state_dict)
    zero_grad = _plain(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step along every parameter's `grad`; `closure` is not used."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self.move(parameters, [p.grad for p in parameters], group)

    # Else torch would wrap it, for a profiler's mark and for step hooks, which are not called here: 20 µs.
    step.hooked = True  # type: ignore[attr-defined]

    def move(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """A step of one group's parameters."""
        raise NotImplementedError


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015), or with `decoupled` AdamW (Loshchilov and Hutter, 2019)."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        decoupled: bool = False,
    ) -> None:
        same = {"eps": 1e-8, "amsgrad": False, "maximize": False}
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **same})
        self._kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def move(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """See `Optimizer`."""
        adam_step(self._kernel, self.state, parameters, gradients, lr=group["lr"], group=group)


def adam_step(
    kernel: Callable[..., object],
    state: dict[Tensor, dict[str, Any]],
    parameters: list[Tensor],
    gradients: list[Tensor],
    *,
    lr: float,
    group: dict[str, Any],
) -> None:
    """Adam's step by one of torch's kernels; `group` holds betas and weight decay."""
    for p in parameters:
        if "step" not in state[p]:
            state[p]["step"] = torch.zeros((), device=p.device)
            state[p]["exp_avg"], state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    means, squares, steps = (
        [state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq", "step")
    )
    if steps[0].is_cpu:  # where one call for all of them takes longer
        for step in steps:
            step.add_(1)
    else:
        torch._foreach_add_(steps, 1)
    beta1, beta2 = group["betas"]
    kernel(
        parameters, gradients, means, squares, [], steps, lr=lr, beta1=beta1, beta2=beta2, eps=1e-8,
        weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
    )  # fmt: skip


class SGD(Optimizer):
    """Stochastic gradient descent with Nesterov's momentum (Sutskever and others, 2013)."""

    def __init__(
        self, parameters: Iterable[Tensor], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def move(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """See `Optimizer`."""
        first = "momentum_buffer" not in self.state[parameters[0]]
        if first and group["momentum"]:
            for p in parameters:
                self.state[p]["momentum_buffer"] = torch.empty_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters] if group["momentum"] else []
        torch._fused_sgd_(
            parameters, gradients, buffers, weight_decay=group["weight_decay"], momentum=group["momentum"],
            lr=group["lr"], dampening=0.0, nesterov=group["momentum"] > 0, maximize=False,
            is_first_step=first,
        )  # fmt: skip
