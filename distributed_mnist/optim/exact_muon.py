"""Muon's step to the same bits on every machine: exact sums, and single operations in float64.

See `muon` for what it computes, and `newton_schulz` for the same in float32.
"""

import functools
import math

import torch
from torch import Tensor

from ..exact.elementary import sqrt
from .fused import Number
from .newton_schulz import ITERATIONS, A, B, C
from .shared_work import MapMatrices, map_here
from .single_operations import flat_copy, lerp_, shared

# With `y = x * C**(1/4)`, the quintic `(A + B x^2 + C x^4) x` is `((y^2 + _SHIFT)^2 + _REST) y`, which
# needs fewer operations. Both numbers are multiples of 2^-25.
_SCALE = math.sqrt(math.sqrt(C))
_SHIFT = round(B / (2 * math.sqrt(C)) * 2**25) / 2**25
_REST = round((A - _SHIFT * _SHIFT) * 2**25) / 2**25
_ROUND = 1.5 * 2.0**27
"""To add and subtract it rounds a float64 below 2^26 to a multiple of 2^-25: near it are no others."""


def muon_(
    parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor],
    *, lr: Number, momentum: float, map_matrices: MapMatrices = map_here,
) -> None:  # fmt: skip
    """Take one step, with the arguments of `newton_schulz.muon_`."""
    buffer, gradient = shared(buffers), flat_copy(gradients)
    lerp_(buffer, gradient, 1 - momentum)
    lerp_(gradient, buffer, momentum)
    sizes = [p.numel() for p in parameters]
    directions = gradient.double().split(sizes)
    weights = flat_copy(parameters).double().split(sizes)
    lengths, norms = frobenius_norms(directions), frobenius_norms(weights)
    matrices = [direction.view(len(p), -1) for p, direction in zip(parameters, directions, strict=True)]
    for weight, step in zip(weights, map_matrices(orthogonalise, matrices, lengths), strict=True):
        rows, columns = step.shape
        weight.sub_(step.mul_(lr * math.sqrt(max(1, rows / columns))).flatten())
    for p, weight, before, after in zip(parameters, weights, norms, frobenius_norms(weights), strict=True):
        scale = torch.where(before > 0, before / after, 1)  # a weight of zeros may become nonzero
        p.copy_(weight.mul_(scale).view(p.shape))


def orthogonalise(matrix: Tensor, norm: Tensor) -> Tensor:
    """Return float64 `(rows, columns)` with the same singular vectors and all singular values about one.

    `matrix` is float64 with this Frobenius norm, whose error may be a twentieth. A zero matrix stays zero.

    All values are multiples of 2^-25, and no product of matrices rounds: it adds multiples of 2^-50, and
    each of its partial sums is below 8, so it has at most 53 bits. The bound does not depend on the
    matrix's size. By the Cauchy-Schwarz inequality a partial sum is at most the length of a row times that
    of a column, and no row or column is longer than the largest singular value. Those are

    - of `x` at most 1.25: at first 1.06, and the quintic maps numbers from 0 to 1.25 to at most 1.21;
    - of `y` at most 1.25 * C**(1/4) < 1.5, so of `y @ y.T` at most 2.25;
    - of `y @ y.T` plus _SHIFT at most 1.68, so of its square at most 2.83;
    - of the polynomial's first factor at most 3.45, and 3.45 * 1.5 < 5.2.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    y = matrix.T if tall else matrix
    shift, rest = _offsets(len(y), y.device)
    y = (y / (norm + 1e-7)).mul_(_SCALE).add_(_ROUND).sub_(_ROUND)
    for _ in range(ITERATIONS):
        gram = (y @ y.T).add_(shift).sub_(_ROUND)
        factor = (gram @ gram).add_(rest).sub_(_ROUND)
        y = (factor @ y).add_(_ROUND).sub_(_ROUND)
    x = y.mul_(1 / _SCALE)
    return x.T if tall else x


@functools.lru_cache(maxsize=64)
def _offsets(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `_ROUND` as matrices that also add a number to the diagonal."""
    matrices = [torch.full((rows, rows), _ROUND, dtype=torch.float64, device=device) for _ in range(2)]
    for matrix, number in zip(matrices, (_SHIFT, _REST), strict=True):
        matrix.diagonal().add_(number)
    return matrices[0], matrices[1]


def frobenius_norms(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the norms of float64 tensors as scalars. Their relative error is less than a twentieth.

    The squares are rounded to multiples of one unit, which is that of the float64 number `1.5 * n *
    largest`. The sum of all n is below 2^53 units, so it does not round. Its relative error is at most
    `1.5 * n^2 * 2^-52`, less than 1e-6 up to 50,000 values. Raises `ValueError` for more than 2^24.
    """
    sums: list[Tensor] = []
    for tensor in tensors:
        count = tensor.numel()
        if count > 2**24:
            raise ValueError(f"an exact norm is one of at most {2**24:,} values, not of {count:,}")
        squares = tensor * tensor
        unit = squares.amax().mul_(1.5 * count)
        sums.append(squares.add_(unit).sub_(unit).sum())
    return list(sqrt(torch.stack(sums)).unbind())
