"""Random values for weights, as functions of a key, with the same bits on every machine.

All are float64 tensors on the CPU. The bits come from `random_keys`, everything else from `elementary`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import random_keys
from .elementary import log, sin_and_cos, sqrt
from .ordered_sums import sum_over, sum_over_


def uniform(shape: Sequence[int], *key: int | str) -> Tensor:
    """Return uniform values in [0, 1)."""
    bits = random_keys.random_bits(math.prod(shape), *key)
    return torch.from_numpy(random_keys.uniform(bits)).view(tuple(shape))


def normal(shape: Sequence[int], *key: int | str) -> Tensor:
    """Return values of the standard normal distribution (Box and Muller, 1958)."""
    count = math.prod(shape)
    first, second = uniform((2, -(-count // 2)), *key)
    radius = sqrt(log(1 - first).mul_(-2))  # 1 - first is exact, and above 0
    sine, cosine = sin_and_cos(second.mul_(2 * math.pi))
    return torch.cat([cosine.mul_(radius), sine.mul_(radius)])[:count].view(tuple(shape))


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a float64 `(m, n)` of full rank into `Q` `(m, k)` and `R` `(k, n)` for `k = min(m, n)`.

    `Q` has orthonormal columns, and `R` is upper triangular with a positive diagonal. This is the modified
    Gram-Schmidt method, with sums in a fixed order. Raises `ValueError` if the rank is not full.
    """
    rest = matrix.t().clone(memory_format=torch.contiguous_format)  # its rows are the matrix's columns
    products = torch.empty_like(rest)  # memory used again and again
    count = min(matrix.shape)
    q, r = rest.new_empty(count, len(matrix)), rest.new_zeros(count, len(rest))
    for k in range(count):
        length = sqrt(sum_over(rest[k] * rest[k], 0))
        if length == 0:
            raise ValueError("the matrix has not full rank")
        torch.div(rest[k], length, out=q[k])
        later, work = rest[k + 1 :], products[k + 1 :]
        parts = sum_over_(torch.mul(later, q[k], out=work), 1).clone()
        later -= torch.mul(parts.unsqueeze(1), q[k], out=work)
        r[k, k], r[k, k + 1 :] = length, parts
    return q.t(), r
