"""Steps of optimizers in single operations on whole tensors: the same bits on every machine.

IEEE 754 fixes the result of one addition, subtraction, multiplication, division or square root. Fused
kernels round some of these and not others, as the processor likes. Here every call is one such operation on
float32 tensors, or one by a Python number, which is rounded to float32 first. Two things are avoided:

- Division by a Python number: a GPU multiplies by its reciprocal.
- `alpha=`, `addcmul`, `addcdiv` and `lerp`: some processors round once, others twice.

All tensors of a list are one vector in memory, so one call is enough for all. `adam_`, `adamw_` and `sgd_`
have the arguments of `torch._fused_adam_` and so on, those that are used here.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ..exact.elementary import sqrt

Tensors = list[Tensor]


def adam_(
    parameters: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, _: Tensors, steps: Tensors,
    *, weight_decay: float, **settings: Any,
) -> None:  # fmt: skip
    """Take Adam's step; weight decay is added to the gradient."""
    gradient = _with_decay(parameters, gradients, weight_decay)
    _adam_(parameters, gradient, means, squares, steps, **settings)


def adamw_(
    parameters: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, _: Tensors, steps: Tensors,
    *, lr: float, weight_decay: float, **settings: Any,
) -> None:  # fmt: skip
    """Take AdamW's step; weight decay shrinks the parameters."""
    if weight_decay:
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    _adam_(parameters, flat_copy(gradients), means, squares, steps, lr=lr, **settings)


def _adam_(
    parameters: Tensors, gradient: Tensor, means: Tensors, squares: Tensors, steps: Tensors,
    *, lr: float, beta1: float, beta2: float, eps: float, **_: Any,
) -> None:  # fmt: skip
    mean, square = shared(means), shared(squares)
    mean.mul_(beta1).add_(gradient * (1 - beta1))
    square.mul_(beta2).add_(gradient.mul_(gradient).mul_(1 - beta2))

    # Both corrections of the bias are moved out of the fraction mean / (sqrt(square) + eps).
    counts = [int(step) for step in steps]
    roots = [math.sqrt(1 - power(beta2, count)) for count in counts]
    rates = [lr * root / (1 - power(beta1, count)) for root, count in zip(roots, counts, strict=True)]
    change = sqrt(square).add_(_of_each(parameters, [eps * root for root in roots]))
    torch.div(mean, change, out=change).mul_(_of_each(parameters, rates))
    torch._foreach_sub_(parameters, _unflatten_dense_tensors(change, parameters))


def sgd_(
    parameters: Tensors, gradients: Tensors, buffers: Tensors,
    *, lr: float, momentum: float, weight_decay: float, is_first_step: bool, **_: Any,
) -> None:  # fmt: skip
    """Take a step of gradient descent, with Nesterov's momentum if there is any."""
    gradient = _with_decay(parameters, gradients, weight_decay)
    if momentum:
        buffer = shared(buffers)
        if is_first_step:
            buffer.copy_(gradient)
        else:
            buffer.mul_(momentum).add_(gradient)
        gradient.add_(buffer * momentum)
    torch._foreach_sub_(parameters, _unflatten_dense_tensors(gradient.mul_(lr), parameters))


def lerp_(start: Tensor, end: Tensor, share: float) -> None:
    """Move `start` by a share of its way to `end`."""
    start.add_((end - start).mul_(share))


def move_(averages: Tensors, tensors: Tensors, share: float) -> None:
    """Move averages by a share of their way, with the arguments of `torch._foreach_lerp_`."""
    lerp_(shared(averages), flat_copy(tensors), share)


def flat_copy(tensors: Tensors) -> Tensor:
    """Return a vector of all values, whatever the tensors' layouts in memory."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def shared(tensors: Tensors) -> Tensor:
    """Return a vector of all values that shares their memory. If they are not adjacent, move them first."""
    first, address = tensors[0], tensors[0].data_ptr()
    memory = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != address or tensor.untyped_storage().data_ptr() != memory:
            break
        if not tensor.is_contiguous():
            break
        address += tensor.numel() * tensor.element_size()
    else:
        return first.as_strided((sum(tensor.numel() for tensor in tensors),), (1,))
    vector = flat_copy(tensors)
    for tensor, part in zip(tensors, _unflatten_dense_tensors(vector, tensors), strict=True):
        tensor.data = part
    return vector


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


def _of_each(tensors: Tensors, numbers: list[float]) -> float | Tensor:
    """Return the number of each tensor, for each of its values, or only one if all are the same."""
    if len(set(numbers)) == 1:
        return numbers[0]
    pairs = zip(tensors, numbers, strict=True)
    return torch.cat([torch.full_like(tensor, number).flatten() for tensor, number in pairs])


def _with_decay(parameters: Tensors, gradients: Tensors, weight_decay: float) -> Tensor:
    gradient = flat_copy(gradients)
    if weight_decay:
        gradient.add_(flat_copy(parameters).mul_(weight_decay))
    return gradient
