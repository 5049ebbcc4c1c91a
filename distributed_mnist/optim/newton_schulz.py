"""Muon's step with torch's fast products: matrices are made orthogonal by Newton-Schulz iteration.

Source: Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

import math

import torch
from torch import Tensor

from .fused import Number
from .shared_work import MapMatrices, map_here

# The coefficients of a quintic `A x + B x^3 + C x^5` that maps singular values between 0 and 1 to about
# one, from the source above. There it is applied five times. The small networks here learn as well with
# three, see docs/explanation/performance.md.
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 3


def muon_(
    parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor],
    *, lr: Number, momentum: float, map_matrices: MapMatrices = map_here,
) -> None:  # fmt: skip
    """Take one step in place. `buffers` are the running means of the gradients."""
    torch._foreach_lerp_(buffers, gradients, 1 - momentum)
    directions = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov's momentum
    norms = torch.stack(torch._foreach_norm(parameters))
    for p, step in zip(parameters, map_matrices(orthogonalise, directions), strict=True):
        rate = lr * math.sqrt(max(1, len(p) / p[0].numel()))
        if isinstance(rate, Tensor):
            p.sub_(step * rate)
        else:
            p.add_(step, alpha=-rate)
    scales = norms / torch.stack(torch._foreach_norm(parameters))
    scales = torch.where(norms > 0, scales, 1)  # a weight that is all zeros may become nonzero
    torch._foreach_mul_(parameters, list(scales.unbind()))


def orthogonalise(direction: Tensor) -> Tensor:
    """Return a float32 tensor with the same singular vectors and all singular values about one.

    A tensor counts as the matrix `(first dimension, all others)`. A zero matrix stays zero.
    """
    matrix = direction.flatten(1)
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.T if tall else x).reshape(direction.shape)
