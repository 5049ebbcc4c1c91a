"""Test fixed-point numbers against Python's integers and fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_mnist.exact.fixed_point import (
    HEADROOM,
    LIMIT,
    OPERAND_BITS,
    exponent_above,
    largest_magnitude,
    power_of_two,
    quantise,
    scale_exponent,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
BITS = st.sampled_from([OPERAND_BITS, OPERAND_BITS - HEADROOM])
LARGEST_EXPONENT = 59


def as_tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def rounded(x: float, exponent: int) -> int:
    """`round` of a fraction rounds halves to even, as IEEE 754 does."""
    return max(-LIMIT, min(LIMIT, round(Fraction(x) * Fraction(2) ** exponent)))


@pytest.mark.parametrize(("dtype", "normal"), [(torch.float64, 1022), (torch.float32, 126)])
def test_a_power_of_two_is_exact(dtype: torch.dtype, normal: int) -> None:
    exponents = range(-normal, normal + 2)
    powers = power_of_two(torch.tensor(exponents), dtype)
    assert powers.dtype == dtype
    assert powers.tolist() == [math.ldexp(1.0, e) for e in exponents]


@settings(max_examples=100, deadline=None)
@given(FLOATS)
def test_the_exponent_above_is_the_smallest(x: float) -> None:
    e = int(exponent_above(as_tensor(abs(x))))
    assert abs(Fraction(x)) < Fraction(2) ** e
    assert e == -126 or Fraction(2) ** (e - 1) <= abs(Fraction(x))


@settings(max_examples=100, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=8), st.integers(-LARGEST_EXPONENT, LARGEST_EXPONENT))
def test_quantise_rounds_as_fractions_do(values: list[float], exponent: int) -> None:
    for known in (torch.tensor(exponent), exponent):
        found = quantise(as_tensor(*values), known)
        assert found.dtype == torch.int16
        assert found.tolist() == [rounded(x, exponent) for x in values]


def test_halves_are_rounded_to_even_and_large_values_saturate() -> None:
    values = as_tensor(0.5, 1.5, 2.5, -0.5, -1.5, LIMIT + 0.5, 1e30, -1e30, math.inf, -math.inf)
    expected = [0, 2, 2, 0, -2, LIMIT, LIMIT, -LIMIT, LIMIT, -LIMIT]
    for exponent in (torch.tensor(0), 0):
        assert quantise(values, exponent).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=8), BITS)
def test_a_scale_from_the_largest_magnitude_fits(values: list[float], bits: int) -> None:
    """No value saturates, and the largest one has all bits, unless the exponent is at its limit."""
    x = as_tensor(*values)
    largest = max(map(abs, values))
    assert float(largest_magnitude(x)) == largest
    k = int(scale_exponent(largest_magnitude(x), bits))
    assert abs(k) <= LARGEST_EXPONENT
    integers = [abs(q) for q in quantise(x, k).tolist()]
    if k > -LARGEST_EXPONENT:
        assert quantise(x, k, saturates=False).abs().tolist() == integers
        assert max(integers) <= 2**bits
    if abs(k) < LARGEST_EXPONENT:
        assert max(integers) >= 2 ** (bits - 1)


def test_the_factor_of_a_product_is_a_normal_float() -> None:
    """A subnormal one might be flushed to zero on some machines."""
    extremes = scale_exponent(as_tensor(0.0, 2.0**-126, 3e38), OPERAND_BITS)
    assert extremes.tolist() == [LARGEST_EXPONENT, LARGEST_EXPONENT, -LARGEST_EXPONENT]
    for sum_ in (2 * LARGEST_EXPONENT, -2 * LARGEST_EXPONENT):
        for dropped in (0, 8):
            assert -126 <= dropped - sum_ <= 127


def test_magnitudes_of_odd_tensors() -> None:
    assert float(largest_magnitude(torch.zeros(0, 3))) == 0
    assert float(largest_magnitude(as_tensor(1, -math.inf))) == math.inf
    assert math.isnan(float(largest_magnitude(as_tensor(1, math.nan, 3))))
