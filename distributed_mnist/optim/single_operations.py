"""Steps of optimizers in single operations on whole tensors: the same bits on every machine.

IEEE 754 fixes the result of one addition, subtraction, multiplication, division or square root. Fused
kernels round some of these and not others, as the processor likes. Here every call is one such operation on
float32 tensors, or one by a number, which is rounded to float32 first. Two things are avoided:

- Division by a Python number: a GPU multiplies by its reciprocal.
- `alpha=`, `addcmul`, `addcdiv` and `lerp`: some processors round once, others twice.

All tensors of a list are one vector in memory, so one call is enough for all. The arguments are those of
the functions in `fused`.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ..exact.elementary import sqrt
from .fused import EPSILON, Number, Tensors


def adam_numbers(
    *, lr: float, steps: Tensors, betas: tuple[float, float], weight_decay: float
) -> list[float]:
    """Count a step of Adam or AdamW, in `steps`, and return the numbers for it.

    `steps` are on the CPU, and equal. The numbers are what AdamW multiplies the parameters by, and those by
    which the bias of the two means is corrected. Both corrections are moved out of the fraction
    `mean / (sqrt(square) + EPSILON)`.
    """
    for step in steps:
        step.add_(1)
    count, (beta1, beta2) = int(steps[0]), betas
    root = math.sqrt(1 - power(beta2, count))
    return [1 - lr * weight_decay, EPSILON * root, lr * root / (1 - power(beta1, count))]


def adam_(
    parameters: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, _: Tensors,
    numbers: Sequence[Number], *, betas: tuple[float, float], weight_decay: float,
) -> None:  # fmt: skip
    """Take Adam's step; weight decay is added to the gradient."""
    gradient = _with_decay(parameters, gradients, weight_decay)
    _adam_(parameters, gradient, means, squares, numbers, betas)


def adamw_(
    parameters: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, _: Tensors,
    numbers: Sequence[Number], *, betas: tuple[float, float], weight_decay: float,
) -> None:  # fmt: skip
    """Take AdamW's step; weight decay shrinks the parameters."""
    if weight_decay:
        for p in parameters:
            p.mul_(numbers[0])
    _adam_(parameters, flat_copy(gradients), means, squares, numbers, betas)


def _adam_(
    parameters: Tensors, gradient: Tensor, means: Tensors, squares: Tensors, numbers: Sequence[Number],
    betas: tuple[float, float],
) -> None:  # fmt: skip
    mean, square = shared(means), shared(squares)
    mean.mul_(betas[0]).add_(gradient * (1 - betas[0]))
    square.mul_(betas[1]).add_(gradient.mul_(gradient).mul_(1 - betas[1]))
    change = sqrt(square).add_(numbers[1])
    torch.div(mean, change, out=change).mul_(numbers[2])
    torch._foreach_sub_(parameters, _unflatten_dense_tensors(change, parameters))


def sgd_(
    parameters: Tensors, gradients: Tensors, buffers: Tensors,
    *, lr: Number, momentum: float, weight_decay: float, is_first_step: bool,
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


def _with_decay(parameters: Tensors, gradients: Tensors, weight_decay: float) -> Tensor:
    gradient = flat_copy(gradients)
    if weight_decay:
        gradient.add_(flat_copy(parameters).mul_(weight_decay))
    return gradient
