"""Exponential, logarithm, sine, cosine, square root and others, with the same bits on every machine.

A library's `exp` differs between processors and versions in its last bit. These functions consist of single
additions, subtractions, multiplications and divisions of whole tensors, each correctly rounded everywhere.
Two are never fused, because each is a call of its own.

All but `sqrt` take and return float64 tensors of any shape and device, and leave their argument
unchanged. Each reduces its argument to a small interval and evaluates a polynomial there (Muller,
"Elementary Functions", 2016). The constants are split in two (Cody and Waite): the first part has so few
bits that its products are exact. The stated errors were measured in units in the last place (ulp) on a
million random arguments; `tests/exact/test_elementary.py` repeats the measurement with fewer.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

# Adding it to a float64 of magnitude below 2^51 rounds to an integer, which is then in the lowest bits.
_ROUND = 1.5 * 2.0**52
_LOG2_E = float.fromhex("0x1.71547652b82fep+0")  # 1 / ln 2
_LN2 = (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"))  # 32 bits, and the rest
_HALF_PI = (float.fromhex("0x1.921fb544p+0"), float.fromhex("0x1.0b4611a626331p-34"))  # 33 bits, the rest
_TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)
LARGEST_ANGLE = 2.0**20
"""Sine and cosine are not a number for angles of larger magnitude."""

_BLOCK = 2**15  # elements

# Taylor series; Python divides integers correctly rounded. The first term left out is below 2^-57.
_TWICE_EXP = [2 / math.factorial(k) for k in range(14)]
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]  # in the square, over the argument
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(9)]  # in the square
_LOG = [2 / (2 * k + 3) for k in range(10)]  # atanh(s) = s + s^3 / 3 + s^5 / 5 + ..., twice, without s

# For x from 0 to 6 and t = 2 / (2 + x): log(erfc(x) / t) + x^2, as a polynomial in (16 / (2 + x) - 5) / 3,
# which runs from -1 to 1. It interpolates at Chebyshev's 23 points, computed with 60 digits; its error is
# about 1e-17.
# fmt: off
_ERF = [float.fromhex(each) for each in (
    "-0x1.00bc5085b08f7p-1", "0x1.07d71083f0cc8p-1", "0x1.6d15e07eeec86p-8", "-0x1.60a4b31ec12dep-6",
    "0x1.02c0b4cbc2267p-11", "0x1.09ea067bf6a59p-9", "-0x1.5a42c1636b8b6p-12", "-0x1.98d49fd164e74p-13",
    "0x1.55b5e1d7339ddp-14", "0x1.2ec6cc265774ap-17", "-0x1.c8613e2849cbep-17", "0x1.1c1ed4df92834p-19",
    "0x1.7a3f359e56129p-20", "-0x1.73f8faab4d791p-21", "-0x1.1b7ea3a20b1bdp-27",
    "0x1.b6e72fecb0918p-24", "-0x1.eef21a63a1989p-26", "-0x1.a2bacf4488e68p-28",
    "0x1.887cf45179fe2p-28", "-0x1.568694e3671e8p-31", "-0x1.1f1ad7e939a47p-31",
    "0x1.0ffbb59af56abp-33", "0x1.1172d03cbdc68p-36",
)]
# fmt: on


def _in_blocks(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Compute large tensors block by block on a CPU: in its cache, three times as fast."""

    @functools.wraps(function)
    def of_blocks(x: Tensor) -> Tensor:
        size = _BLOCK * torch.get_num_threads()
        if x.numel() <= size or x.device.type != "cpu":
            return function(x)
        result = torch.empty(x.shape, dtype=x.dtype)
        for part, whole in zip(result.view(-1).split(size), x.flatten().split(size), strict=True):
            part.copy_(function(whole))
        return result

    return of_blocks


@_in_blocks
def exp(x: Tensor) -> Tensor:
    """Return e to the power of `x`. The error is at most 1.2 ulp.

    The result is 0 below -708.05, where it would be less than 2^-1021.5, so no result is subnormal. It is
    infinite above 709.78.
    """
    rest = x.clamp(-708.3, 710.3)  # the whole powers of two are then between -1022 and 1025
    shifted = (rest * _LOG2_E).add_(_ROUND)
    whole = shifted - _ROUND
    rest -= whole * _LN2[0]
    rest -= whole.mul_(_LN2[1])
    # Twice the power of the rest, times half the power of two: so -1022 gives zero, and 1025 infinity.
    half_power = shifted.view(torch.int64).add_(1022).bitwise_left_shift_(52).view(torch.float64)
    return _polynomial(_TWICE_EXP, rest).mul_(half_power)


@_in_blocks
def log(x: Tensor) -> Tensor:
    """Return the natural logarithm. The error is at most 1.0 ulp.

    It is minus infinity for 0 and for subnormal numbers, and not a number below 0.
    """
    bits = x.view(torch.int64)
    exponent = (bits - _SQRT_HALF_BITS).bitwise_right_shift_(52)
    mantissa = (bits - (exponent << 52)).view(torch.float64)  # from sqrt(1/2) to sqrt(2)
    exponent = exponent.to(torch.float64)
    f = mantissa.sub_(1)
    s = f / (f + 2)  # log(1 + f) = 2 atanh(s) = f - s (f - series)
    square = s * s
    series = _polynomial(_LOG, square).mul_(square)
    low = (f - series).mul_(s).sub_(exponent * _LN2[1])
    result = (exponent * _LN2[0]).add_(f - low)
    result = torch.where(x < 2.0**-1022, -math.inf, result)
    return torch.where((x < 0) | ~(x < math.inf), x * math.inf * (x >= 0), result)


def sin_and_cos(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return sine and cosine of angles in radians. The absolute error is at most 1.6e-16.

    Both are not a number for angles beyond `LARGEST_ANGLE`.
    """
    rest = torch.where(x.abs() <= LARGEST_ANGLE, x, math.nan)
    shifted = (rest * _TWO_OVER_PI).add_(_ROUND)
    whole = shifted - _ROUND
    rest -= whole * _HALF_PI[0]  # exact: 33 and 20 bits
    rest -= whole.mul_(_HALF_PI[1])
    square = rest * rest
    sine = _polynomial(_SIN[1:], square).mul_(square).mul_(rest).add_(rest)
    cosine = _polynomial(_COS, square)
    quarter = shifted.view(torch.int64)
    odd = (quarter & 1) != 0
    sign = 1 - (quarter & 2).to(torch.float64)
    other_sign = 1 - ((quarter + 1) & 2).to(torch.float64)
    return torch.where(odd, cosine, sine).mul_(sign), torch.where(odd, sine, cosine).mul_(other_sign)


@_in_blocks
def sigmoid(x: Tensor) -> Tensor:
    """Return `1 / (1 + exp(-x))`. The error is at most 2 ulp."""
    return exp(-x).add_(1).reciprocal_()


@_in_blocks
def tanh(x: Tensor) -> Tensor:
    """Return the hyperbolic tangent. The absolute error is at most 4e-16."""
    return exp(x + x).add_(1).reciprocal_().mul_(-2).add_(1)


@_in_blocks
def erf(x: Tensor) -> Tensor:
    """Return the error function. The absolute error is at most 5e-16."""
    size = x.abs().clamp_(max=6.0)  # the result is then 1 in float64
    t = (size + 2).reciprocal_()
    place = (t * (16 / 3)).sub_(5 / 3)
    complement = exp(_polynomial(_ERF, place).sub_(size * size)).mul_(t).mul_(2)
    return complement.neg_().add_(1).copysign_(x)


def sqrt(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the square root of float32 or float64 numbers, correctly rounded, in `out` if it is given.

    On a CPU, `torch.sqrt` may call Intel's MKL, which rounds one float32 in ten the wrong way. NumPy uses
    the processor's own instruction, which IEEE 754 defines to the last bit, as CUDA does.
    """
    if x.device.type != "cpu":
        return torch.sqrt(x, out=out)
    out = torch.empty_like(x) if out is None else out
    with np.errstate(invalid="ignore"):
        np.sqrt(x.detach().numpy(), out=out.detach().numpy())
    return out


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Return the sum of `coefficients[k] * x**k`, by Horner's rule."""
    *lower, second, highest = coefficients
    total = (x * highest).add_(second)
    for coefficient in reversed(lower):
        total.mul_(x).add_(coefficient)
    return total
