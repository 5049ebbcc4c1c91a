"""Make a matrix orthogonal by Newton-Schulz iteration, which needs only products of matrices.

Source: Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

import torch
from torch import Tensor

from ..exact.elementary import sqrt

# The coefficients of a quintic `A x + B x^3 + C x^5` that maps singular values between 0 and 1 to about
# one, from the source above. There it is applied five times. The small networks here learn as well with
# three, see docs/explanation/performance.md.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 3


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return float32 `(rows, columns)` with the same singular vectors and all singular values about one.

    A zero matrix stays zero.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x


# The quintic as `(C (x^2 + _SHIFT)^2 + _REST) x`, which needs fewer operations.
_SHIFT = _B / (2 * _C)
_REST = _A - _C * _SHIFT * _SHIFT
_ROUND = 1.5 * 2.0**27
"""To add and subtract it rounds a float64 below 2^26 to a multiple of 2^-25: near it are no others."""
_LARGEST = 2**24
"""The most values of a tensor whose norm `norm` takes."""


def orthogonalise_exactly(matrix: Tensor) -> Tensor:
    """Return what `orthogonalise` does, to the same bits on every machine.

    All values are float64 multiples of 2^-25, and no product of matrices rounds: it adds multiples of
    2^-50, and each of its partial sums is below 8, so it has at most 53 bits. The bound does not depend on
    the matrix's size. By the Cauchy-Schwarz inequality a partial sum is at most the length of a row times
    that of a column, and no row or column is longer than the largest singular value. Those are

    - of `x` at most 1.25: at first 1.05, and the quintic maps numbers from 0 to 1.25 to at most 1.21;
    - of `x @ x.T` plus _SHIFT then at most 1.18, so of its square at most 1.4;
    - of the polynomial's first factor at most 3.45, and 3.45 * 1.25 < 4.4.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).double()
    x = _round_(x / (_norm(x) + 1e-7))
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        gram.diagonal().add_(_SHIFT)
        _round_(gram)
        factor = (gram @ gram).mul_(_C)
        factor.diagonal().add_(_REST)
        x = _round_(_round_(factor) @ x)
    x = x.float()
    return x.T if tall else x


def norms_exactly(tensors: list[Tensor]) -> list[Tensor]:
    """Return the Frobenius norms of float32 tensors as float32 scalars, the same bits on every machine."""
    return [_norm(tensor.double()).float() for tensor in tensors]


def _norm(values: Tensor) -> Tensor:
    """Return the Frobenius norm of float32 values, which are given as float64 of any shape, as a scalar.

    The squares of float32 numbers are exact in float64. They are rounded to multiples of one unit, which is
    that of the float64 number `1.5 * n * largest`, so the sum of all n is below 2^53 units and does not
    round. Its relative error is at most `1.5 * n^2 * 2^-52`. Raises `ValueError` if that is above a tenth,
    for more than 2^24 values; it is less than 1e-6 up to 50,000 values.
    """
    count = values.numel()
    if count > _LARGEST:
        raise ValueError(
            f"a tensor of {count:,} values is too large for its exact norm: at most {_LARGEST:,}"
        )
    squares = values * values
    unit = squares.amax() * (1.5 * count)
    return sqrt(squares.add_(unit).sub_(unit).sum())


def _round_(values: Tensor) -> Tensor:
    """Round float64 values below 2^26, in place, to the nearest multiples of 2^-25."""
    return values.add_(_ROUND).sub_(_ROUND)
