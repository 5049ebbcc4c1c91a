"""Sums along one dimension of a tensor in a fixed order, the softmax made of them, and the first maximum.

torch's `sum` adds in an order that depends on the processor, on strides and on the other dimensions. Here
the second half of the terms is added to the first, element by element, until one term is left. The order
depends on the number of terms alone, so a sample's result does not depend on the other samples. This is
for sums within a sample; sums over the samples of a batch are sums of integers, see `products`.
"""

import torch
from torch import Tensor

from .elementary import exp, log


def sum_over(terms: Tensor, dim: int) -> Tensor:
    """Add floating-point terms along a dimension, which the result does not have.

    There must be at least one term. The rounding error grows with the logarithm of their number.
    """
    return sum_over_(terms.clone(), dim)


def sum_over_(terms: Tensor, dim: int) -> Tensor:
    """Do what `sum_over` does in the memory of the terms. The result is a view of them."""
    size = terms.shape[dim]
    while size > 1:
        half = size // 2
        terms.narrow(dim, 0, half).add_(terms.narrow(dim, size - half, half))
        size -= half
    return terms.select(dim, 0)


def softmax(logits: Tensor, dim: int) -> Tensor:
    """Return probabilities, float64, from float64 logits. They add up to 1 along the dimension."""
    weights = exp(logits - logits.amax(dim, keepdim=True))
    return weights.div_(sum_over(weights, dim).unsqueeze(dim))


def log_softmax(logits: Tensor, dim: int) -> Tensor:
    """Return the logarithms of `softmax`, float64, from float64 logits."""
    shifted = logits - logits.amax(dim, keepdim=True)
    return shifted.sub_(log(sum_over(exp(shifted), dim)).unsqueeze(dim))


def first_largest(values: Tensor, dim: int) -> Tensor:
    """Return the first place of the largest value along a dimension, int64; the last place if one is NaN.

    torch's `argmax` may return another place of equal values.
    """
    shape = [1] * values.ndim
    shape[dim] = -1
    places = torch.arange(values.shape[dim], device=values.device).view(shape)
    is_largest = values == values.amax(dim, keepdim=True)
    return torch.where(is_largest, places, values.shape[dim] - 1).amin(dim)
