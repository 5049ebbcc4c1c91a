"""Steps of Adam, AdamW and SGD by torch's fused kernels, the fastest on this machine.

They have the arguments of the functions in `single_operations`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = list[Tensor]
Number = float | Tensor
"""A Python number, or a scalar tensor on the device of the parameters."""
# torch would convert a Python number again in each call. On the CPU: a caller may set another default.
_ONE = torch.ones((), dtype=torch.float32, device="cpu")
EPSILON = 1e-8
"""Added to the root of Adam's mean square."""


def adam_numbers(
    *, lr: float, steps: Tensors, betas: tuple[float, float], weight_decay: float
) -> list[float]:
    """Return the numbers for a step of Adam or AdamW: the learning rate. The kernels count the steps."""
    return [lr]


def adam_(
    parameters: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, steps: Tensors,
    numbers: Sequence[Number], *, betas: tuple[float, float], weight_decay: float,
) -> None:  # fmt: skip
    """Take Adam's step; weight decay is added to the gradient."""
    _step(torch._fused_adam_, parameters, gradients, means, squares, steps, numbers, betas, weight_decay)


def adamw_(
    parameters: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, steps: Tensors,
    numbers: Sequence[Number], *, betas: tuple[float, float], weight_decay: float,
) -> None:  # fmt: skip
    """Take AdamW's step; weight decay shrinks the parameters."""
    _step(torch._fused_adamw_, parameters, gradients, means, squares, steps, numbers, betas, weight_decay)


def _step(
    kernel: Callable[..., object],
    parameters: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, steps: Tensors,
    numbers: Sequence[Number], betas: tuple[float, float], weight_decay: float,
) -> None:  # fmt: skip
    if steps[0].is_cpu:  # on CPU one call for all of them takes longer
        for step in steps:
            step.add_(_ONE)
    else:
        torch._foreach_add_(steps, 1)
    (lr,), (beta1, beta2) = numbers, betas
    kernel(
        parameters, gradients, means, squares, [], steps, lr=lr, beta1=beta1, beta2=beta2, eps=EPSILON,
        weight_decay=weight_decay, amsgrad=False, maximize=False,
    )  # fmt: skip


def sgd_(
    parameters: Tensors, gradients: Tensors, buffers: Tensors,
    *, lr: Number, momentum: float, weight_decay: float, is_first_step: bool,
) -> None:  # fmt: skip
    """Take a step of gradient descent, with Nesterov's momentum if there is any."""
    torch._fused_sgd_(
        parameters, gradients, buffers, weight_decay=weight_decay, momentum=momentum, lr=lr, dampening=0.0,
        nesterov=momentum > 0, maximize=False, is_first_step=is_first_step,
    )  # fmt: skip
