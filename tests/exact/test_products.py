"""Test exact products against Python's integers, with the magnitudes that come closest to the limits."""

import time
from collections.abc import Sequence
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distributed_mnist.exact.fixed_point import LIMIT, OPERAND_BITS
from distributed_mnist.exact.products import choice
from distributed_mnist.exact.products.choice import products_for
from distributed_mnist.exact.products.float64 import Float64Products
from distributed_mnist.exact.products.int8 import Int8Products
from distributed_mnist.exact.products.interface import (
    DROPPED_BITS,
    MOST_TERMS,
    MOST_TERMS_IN_INT32,
    Prepared,
    Products,
    Rows,
    require_exact,
)
from distributed_mnist.exact.refusal import Refused

CPU = torch.device("cpu")
WAYS: list[Products] = [Float64Products()]
if choice._is_exact(Int8Products(), CPU):
    WAYS.append(Int8Products())
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: type(way).__name__)
# At the limits of an operand, of its low slice, and of its high slice.
EDGES = (LIMIT, -LIMIT, 127, -127, 128, -128, 129, -129, 32_512, -32_512, 32_511, 255, -256, 1, -1, 0)
OPERANDS = st.one_of(st.sampled_from(EDGES), st.integers(-LIMIT, LIMIT))
Matrix = list[list[int]]


@st.composite
def factors(draw: st.DrawFn) -> tuple[Matrix, Matrix]:
    """Two matrices `(M, K)` and `(K, N)`."""
    m, k, n = (draw(st.integers(1, size)) for size in (4, 20, 4))
    a = draw(st.lists(st.lists(OPERANDS, min_size=k, max_size=k), min_size=m, max_size=m))
    b = draw(st.lists(st.lists(OPERANDS, min_size=n, max_size=n), min_size=k, max_size=k))
    return a, b


def int16(matrix: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(matrix, dtype=torch.int16)


def columns(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def product(a: Matrix, b: Matrix) -> Matrix:
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns(b)] for row in a]


def rows_of(way: Products, q: Tensor) -> Rows:
    return way.slices(way.pack(q.clone()), q.shape[1])


def multiplied(way: Products, a: Tensor, b: Tensor) -> Tensor:
    return way.multiply(rows_of(way, a), way.prepare(b), torch.float64)


@ways
@settings(max_examples=40, deadline=None)
@given(matrices=factors())
def test_products_are_those_of_integers(way: Products, matrices: tuple[Matrix, Matrix]) -> None:
    a, b = matrices
    expected = product(a, b)
    quotients = [[value >> DROPPED_BITS for value in row] for row in expected]  # rounded down
    assert multiplied(way, int16(a), int16(b)).tolist() == quotients
    left = way.pack(int16(columns(a)))
    assert way.transposed_times(left, rows_of(way, int16(b))).tolist() == expected
    assert way.sum_of(way.pack(int16(a))).tolist() == [sum(column) for column in columns(a)]


@ways
@pytest.mark.parametrize("terms", [127, 128, 514, 515, 1028, 1029, 65_535, 65_536, 70_001])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_the_largest_operands_at_the_limits_of_int32(
    way: Products, terms: int, signs: tuple[int, int]
) -> None:
    first, second = signs[0] * LIMIT, signs[1] * 2**OPERAND_BITS
    a = torch.full((1, terms), first, dtype=torch.int16)
    weight = torch.full((terms, 1), second, dtype=torch.int16)
    expected = terms * first * second >> DROPPED_BITS
    assert multiplied(way, a, weight).item() == expected
    if terms <= MOST_TERMS_IN_INT32:
        assert way.multiply(rows_of(way, a), way.prepare(weight), torch.int32).item() == expected
    column = a.t().contiguous()
    left, right = way.pack(column.clone()), rows_of(way, column.mul(signs[1]))
    assert way.transposed_times(left, right).item() == terms * signs[1] * LIMIT * LIMIT
    assert way.sum_of(left).item() == terms * first


@ways
def test_low_slices_of_minus_128(way: Products) -> None:
    """The low slices alone then have the largest products, and a sum that is divided with a rest."""
    terms = 509
    for value in (-128, 128, 384, -384):
        a = torch.full((1, terms), value, dtype=torch.int16)
        assert multiplied(way, a, a.t().clone()).item() == terms * value * value >> DROPPED_BITS


def random_matrices(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randint(-LIMIT, LIMIT + 1, (rows, n), generator=generator) for n in (5, 7))
    return a.to(torch.int16), b.to(torch.int16)


@pytest.mark.parametrize("rows", [3, 1000])
def test_sums_over_rows_have_no_order(rows: int) -> None:
    """However the rows are permuted and cut, and in whichever way each part is multiplied."""
    a, b = random_matrices(rows)
    whole = a.double().t() @ b.double()
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    for pieces in (1, 2, 3, 7, rows):
        total, column_sums = torch.zeros_like(whole), torch.zeros(5, dtype=torch.float64)
        parts = list(zip(a[order].tensor_split(pieces), b[order].tensor_split(pieces), strict=True))
        for number, (left, right) in enumerate(reversed(parts)):
            if len(left):
                way = WAYS[number % len(WAYS)]
                packed = way.pack(left.clone())
                total += way.transposed_times(packed, rows_of(way, right))
                column_sums += way.sum_of(packed)
        assert torch.equal(total, whole)
        assert torch.equal(column_sums, a.double().sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_has_the_same_product_in_any_company(dtype: torch.dtype) -> None:
    a, b = random_matrices(300)
    matrix = b[:5].clone()
    found = [way.multiply(rows_of(way, a), way.prepare(matrix), dtype) for way in WAYS]
    alone = [WAYS[0].multiply(rows_of(WAYS[0], row), WAYS[0].prepare(matrix), dtype) for row in a.split(1)]
    for each in found:
        assert torch.equal(each, torch.cat(alone))


@ways
def test_too_many_terms_are_refused(way: Products) -> None:
    """A matrix of so many rows that takes no memory."""
    require_exact(MOST_TERMS)
    assert MOST_TERMS * LIMIT**2 < 2**53 <= 2 * MOST_TERMS * LIMIT**2
    long = torch.zeros((), dtype=torch.int16).expand(MOST_TERMS + 1, 1)
    with pytest.raises(Refused, match=r"8,388,609 products may round; the most are 8,388,608"):
        way.prepare(long)
    with pytest.raises(Refused, match="may round"):
        way.transposed_times(long, (long,))


class Saturating(Int8Products):
    """What `vpmaddubsw` does, for processors without VNNI: one operand becomes unsigned by adding 128, and
    the sum of two products stops at 16 bits. Afterwards 128 times the other operand is subtracted."""

    def multiply(self, rows: Rows, prepared: Prepared, dtype: torch.dtype = torch.float32) -> Tensor:
        left = rows[0].contiguous().view(torch.int8).to(torch.int32) + 128

        def product(matrix: Tensor) -> Tensor:
            right = matrix.to(torch.int32)
            terms = left.unsqueeze(2) * right
            pairs = (terms[:, ::2] + terms[:, 1::2]).clamp(-(2**15), 2**15 - 1)
            return pairs.sum(1) - 128 * right.sum(0)

        high, mixed, low = map(product, prepared)
        return (mixed + 2**8 * high + (low >> DROPPED_BITS)).to(dtype)


class Lacking(Int8Products):
    """A build of torch without the operation."""

    def multiply(self, rows: Rows, prepared: Prepared, dtype: torch.dtype = torch.float32) -> Tensor:
        raise RuntimeError("_int_mm is not implemented")


class WrongSums(Float64Products):
    """Right but in one function."""

    def sum_of(self, packed: Tensor) -> Tensor:
        return super().sum_of(packed) + 1


@pytest.mark.parametrize("wrong", [Saturating, Lacking, WrongSums])
def test_a_way_that_is_not_exact_is_not_used(
    wrong: type[Products], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choice._is_exact(Float64Products(), CPU)
    assert not choice._is_exact(cast(Products, wrong()), CPU)
    monkeypatch.setattr(choice, "Int8Products", wrong)
    assert isinstance(products_for.__wrapped__(CPU), Float64Products)


class Slow(Int8Products):
    """A build of torch without oneDNN, as on Macs: int8 are multiplied in a plain loop."""

    def multiply(self, rows: Rows, prepared: Prepared, dtype: torch.dtype = torch.float32) -> Tensor:
        until = time.thread_time() + 0.01
        while time.thread_time() < until:
            pass
        return super().multiply(rows, prepared, dtype)


def test_a_slow_way_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_is_exact", lambda *_: True)
    monkeypatch.setattr(choice, "Int8Products", Slow)
    assert isinstance(products_for.__wrapped__(CPU), Float64Products)
