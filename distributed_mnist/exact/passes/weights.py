"""Weights as integers, and the factors of products."""

import torch
from torch import Tensor

from ..fixed_point import (
    OPERAND_BITS,
    Exponent,
    known,
    largest_magnitude,
    power_of_two,
    quantise,
    scale_exponent,
)
from ..products.interface import DROPPED_BITS, Products
from .interface import Arrange, Weight


def product_factor(first: Exponent, second: Exponent) -> Tensor | float:
    """Return what a result of `Products.multiply` is multiplied by, a normal number of float32.

    It is `2**DROPPED_BITS / 2**(first + second)`, where `first` and `second` are the operands' exponents.
    """
    return power_of_two(DROPPED_BITS - first - second, torch.float32)


def prepare_weight(products: Products, weight: Tensor, arrange: Arrange) -> Weight:
    """Return a weight as integers with a scale from its own largest magnitude, arranged and prepared."""
    (exponent,) = known(scale_exponent(largest_magnitude(weight).view(1), OPERAND_BITS))
    integers = quantise(weight, exponent, 2**OPERAND_BITS)
    return Weight([products.prepare(matrix) for matrix in arrange(integers)], exponent)
