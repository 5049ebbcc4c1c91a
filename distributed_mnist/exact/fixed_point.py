"""Fixed-point numbers: integers times a power of two.

A tensor `x` becomes integers `q = round(x * 2**k)`. The product with a power of two is exact, and IEEE 754
defines the rounding, so `q` is the same on every machine. Sums and products of such integers are exact, in
any order, as long as no partial sum reaches `2**53` in float64 or `2**31` in int32.
"""

import math
from typing import overload

import torch
from torch import Tensor

LIMIT = 127 * 256 + 127
"""The largest magnitude of an operand, 32,639: it has two slices of 8 bits, see `products`."""
OPERAND_BITS = 14
"""A tensor whose largest magnitude is known becomes integers of at most `2**OPERAND_BITS`."""
HEADROOM = 1
"""Bits that are given up if only the largest magnitude of the step before is known. What is more than
`LIMIT / 2**(OPERAND_BITS - HEADROOM)` times, about four times, as large as that saturates."""
_LARGEST_EXPONENT = 59  # so that the factor of a product of two tensors is a normal float32
_FLOAT32_BIAS, _FLOAT64_BIAS = 127, 1023
_ROUND = 1.5 * 2.0**23
"""Added to a float32 of magnitude below 2^22, it rounds to an integer, which is then in the lowest bits."""

Exponent = Tensor | int
"""An exponent of two: int64, or an int where the CPU need not wait for it (`known`)."""


def known(exponents: Tensor) -> list[Exponent]:
    """Return the elements of a vector, as ints, which are faster, unless another device computes them."""
    return exponents.tolist() if exponents.device.type == "cpu" else list(exponents.unbind())


@overload
def power_of_two(exponents: int, dtype: torch.dtype = ...) -> float: ...
@overload
def power_of_two(exponents: Tensor, dtype: torch.dtype = ...) -> Tensor: ...
@overload
def power_of_two(exponents: Exponent, dtype: torch.dtype = ...) -> Tensor | float: ...
def power_of_two(exponents: Exponent, dtype: torch.dtype = torch.float64) -> Tensor | float:
    """Return `2**exponents` exactly, made from bits, because `torch.ldexp` and `pow` may round.

    `exponents` is of any shape, with values of normal numbers of `dtype`: float64 or float32. For an int it
    returns a float.
    """
    if isinstance(exponents, int):
        return math.ldexp(1.0, exponents)
    if dtype == torch.float64:
        return (exponents + _FLOAT64_BIAS).bitwise_left_shift(52).view(torch.float64)
    return (exponents + _FLOAT32_BIAS).bitwise_left_shift(23).to(torch.int32).view(torch.float32)


def exponent_above(magnitudes: Tensor) -> Tensor:
    """Return int64 `e` with `magnitudes < 2**e`; the smallest one for normal numbers, -126 for zero.

    `magnitudes` are float32, at least zero and finite.
    """
    return magnitudes.view(torch.int32).bitwise_right_shift(23).to(torch.int64) - (_FLOAT32_BIAS - 1)


def scale_exponent(largest: Tensor, bits: int) -> Tensor:
    """Return int64 `k` such that `x * 2**k <= 2**bits` for every `x` of at most `largest`, float32.

    `k` is between -59 and 59. So values above `2**(bits + 59)` saturate, and a tensor whose values are all
    below `2**(bits - 60)` has fewer bits.
    """
    return (bits - exponent_above(largest)).clamp_(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)


def largest_magnitude(x: Tensor) -> Tensor:
    """Return the largest `|x|` as a scalar tensor; zero for an empty tensor, NaN if there is one."""
    if not x.numel():
        return x.new_zeros(())
    low, high = torch.aminmax(x.detach())
    return torch.maximum(high, -low)


def quantise(x: Tensor, exponent: Exponent, largest: int = LIMIT, *, saturates: bool = True) -> Tensor:
    """Return `round(x * 2**exponent)`, at most `largest` in magnitude, as int16 in the shape of `x`.

    `x` is float32, and `exponent` a scalar or of a shape that broadcasts. `saturates` may be False only if
    no magnitude is larger than `largest`.
    """
    factor, x = power_of_two(exponent, torch.float32), x.detach()
    if isinstance(factor, float):  # fused or not: the product is exact, or it rounds to zero or saturates
        shifted = torch.add(torch.full((), _ROUND), x, alpha=factor)
    else:
        shifted = (x * factor).add_(_ROUND)
    if saturates:
        shifted.clamp_(_ROUND - largest, _ROUND + largest)
    return shifted.view(torch.int32).to(torch.int16)
