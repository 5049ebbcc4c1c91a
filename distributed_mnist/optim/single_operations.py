"""Steps of optimizers in single operations on whole tensors: the same bits on every machine.

IEEE 754 fixes the result of one addition, subtraction, multiplication, division or square root. Fused
kernels round some of these and not others, as the processor likes. Here every call is one such operation on
float32 tensors, or one by a Python number, which is rounded to float32 first. Two things are avoided:

- Division by a Python number: a GPU multiplies by its reciprocal.
- `alpha=`, `addcmul`, `addcdiv` and `lerp`: some processors round once, others twice.

`adam`, `adamw` and `sgd` have the arguments of `torch._fused_adam_` and so on, those that are used here.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..exact.elementary import sqrt

Tensors = list[Tensor]


def adam(
    parameters: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, _: Tensors, steps: Tensors,
    *, weight_decay: float, **settings: Any,
) -> None:  # fmt: skip
    """Take Adam's step; weight decay is added to the gradient."""
    _adam(parameters, _with_decay(parameters, gradients, weight_decay), means, squares, steps, **settings)


def adamw(
    parameters: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, _: Tensors, steps: Tensors,
    *, lr: float, weight_decay: float, **settings: Any,
) -> None:  # fmt: skip
    """Take AdamW's step; weight decay shrinks the parameters."""
    if weight_decay:
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    _adam(parameters, gradients, means, squares, steps, lr=lr, **settings)


def _adam(
    parameters: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, steps: Tensors,
    *, lr: float, beta1: float, beta2: float, eps: float, **_: Any,
) -> None:  # fmt: skip
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, torch._foreach_mul(gradients, 1 - beta1))
    torch._foreach_mul_(squares, beta2)
    new = torch._foreach_mul(gradients, gradients)
    torch._foreach_mul_(new, 1 - beta2)
    torch._foreach_add_(squares, new)

    # Both corrections of the bias are moved out of the fraction mean / (sqrt(square) + eps).
    counts = [int(step) for step in steps]
    roots = [math.sqrt(1 - power(beta2, count)) for count in counts]
    rates = [lr * root / (1 - power(beta1, count)) for root, count in zip(roots, counts, strict=True)]
    divisors = [sqrt(square) for square in squares]
    torch._foreach_add_(divisors, [eps * root for root in roots])
    changes = torch._foreach_div(means, divisors)
    torch._foreach_mul_(changes, rates)
    torch._foreach_sub_(parameters, changes)


def sgd(
    parameters: Tensors, gradients: Tensors, buffers: Tensors,
    *, lr: float, momentum: float, weight_decay: float, is_first_step: bool, **_: Any,
) -> None:  # fmt: skip
    """Take a step of gradient descent, with Nesterov's momentum if there is any."""
    gradients = _with_decay(parameters, gradients, weight_decay)
    if momentum:
        if is_first_step:
            torch._foreach_copy_(buffers, gradients)
        else:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
        ahead = torch._foreach_mul(buffers, momentum)
        torch._foreach_add_(ahead, gradients)
        gradients = list(ahead)
    torch._foreach_sub_(parameters, torch._foreach_mul(gradients, lr))


def lerp(starts: Tensors, ends: Tensors, share: float) -> Tensors:
    """Return `start + share * (end - start)` of each pair."""
    ways = torch._foreach_sub(ends, starts)
    torch._foreach_mul_(ways, share)
    torch._foreach_add_(ways, starts)
    return list(ways)


def lerp_(starts: Tensors, ends: Tensors, share: float) -> None:
    """Do `lerp` in place."""
    torch._foreach_copy_(starts, lerp(starts, ends, share))


def add_scaled_(values: Tensor, change: Tensor, factor: float) -> None:
    """Add `factor * change`. Both have the same shape."""
    values.add_(change * factor)


@functools.lru_cache(maxsize=64)
def power(base: float, exponent: int) -> float:
    """Return `base ** exponent` by repeated multiplication. Python's `**` calls the system's library."""
    result = 1.0
    while exponent:
        if exponent % 2:
            result *= base
        base *= base
        exponent //= 2
    return result


def _with_decay(parameters: Tensors, gradients: Tensors, weight_decay: float) -> Tensors:
    if not weight_decay:
        return gradients
    decayed = torch._foreach_mul(parameters, weight_decay)
    torch._foreach_add_(decayed, gradients)
    return list(decayed)
