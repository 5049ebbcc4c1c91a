"""Clip the gradient of a whole batch by its global norm.

Source: Pascanu and others, "On the difficulty of training recurrent neural networks", 2013.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..exact.elementary import sqrt


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], largest: float, *, exact: bool = False) -> Tensor:
    """Scale the gradients down, in place, so that their global norm is at most `largest`.

    The global norm is that of all gradients as one vector. Returns the norm before, a float32 scalar. If it
    is not finite, the gradients become NaN or zero, as with `torch.nn.utils.clip_grad_norm_`. With `exact`
    all bits are the same on every machine; otherwise those of torch's square root are not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.cat([gradient.flatten() for gradient in gradients]).square_()
    norm = (sqrt if exact else torch.sqrt)(_sum_in_fixed_order(squares))
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _sum_in_fixed_order(values: Tensor) -> Tensor:
    """Return the sum of float `(n,)`, which is overwritten.

    It adds halves, element by element. In torch's own sum the order depends on the processor and on the
    number of threads.
    """
    while len(values) > 1:
        half = (len(values) + 1) // 2
        values[: len(values) - half] += values[half:]
        values = values[:half]
    return values[0]
