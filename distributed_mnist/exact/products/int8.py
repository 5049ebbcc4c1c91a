"""Products of int8 slices with int32 sums, for which many processors have instructions.

Each operand has two slices of 8 bits, `256 * high + low`. A sum of `K` products of slices is exact if
`2 * K * 2**14 < 2**31`. Longer sums are cut into parts, whose results are added in float64.
"""

import torch
from torch import Tensor

from .interface import BLOCK, DROPPED_BITS, MOST_TERMS_IN_INT32, Prepared, Rows, require_exact

_MOST_TERMS = 2**16 - 1
"""The most terms of a sum of products of slices: two of at most `2**14` for each, below `2**31`."""
_LEAST_TERMS_APART = 128
"""With so many terms, there is a tensor for each slice of rows."""
_MOST_ROWS_IN_INT32 = 514
"""The most terms of a sum of products of operands and slices: `M * LIMIT * 2**7 < 2**31`."""


class Int8Products:
    """Products of int8 slices with int32 sums.

    A packed integer has the byte of its low slice (-128 to 127) and that of its high slice. So a packed row
    is, without a copy, a row of int8 of twice the length. Rows with many terms have a tensor for each
    slice instead.
    """

    def pack(self, q: Tensor) -> Tensor:
        """Return int16 whose two bytes are the slices of `q`; zero stays zero."""
        return q.add_(128).bitwise_xor_(128)

    def slices(self, packed: Tensor, terms: int) -> Rows:
        """Return the tensor itself, or for many terms the low slices and the high ones, int8."""
        if terms < _LEAST_TERMS_APART:
            return (packed,)
        return packed.to(torch.int8), packed.bitwise_right_shift(8).to(torch.int8)

    def prepare(self, matrix: Tensor) -> Prepared:
        """Return three matrices int8 `(2 * K, N)` for packed rows, or one `(K, 2 * N)` for slices.

        The three give the sums of products of high slices, of mixed ones and of low ones; a third of their
        elements is zero. The one has the high slices beside the low ones.
        """
        terms, columns = matrix.shape
        require_exact(terms)
        low = matrix.to(torch.int8)  # keeps the lowest 8 bits
        high = (matrix.to(torch.int32) + 128).bitwise_right_shift(8).to(torch.int8)
        if terms >= _LEAST_TERMS_APART:
            return (torch.cat((high, low), 1),)
        prepared = torch.zeros((3, terms, 2, columns), dtype=torch.int8, device=matrix.device)
        prepared[0, :, 1] = prepared[1, :, 0] = high
        prepared[1, :, 1] = prepared[2, :, 0] = low
        return prepared.view(3, 2 * terms, columns).unbind()

    def multiply(self, rows: Rows, prepared: Prepared, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `floor(rows @ matrix / 2**DROPPED_BITS)`; see `Products`."""
        apart = len(rows) == 2
        count, terms = rows[0].shape
        columns = prepared[0].shape[1] // (2 if apart else 1)
        result = rows[0].new_empty((count, columns), dtype=dtype)
        height = max(64, BLOCK // max((2 if apart else 3) * columns, terms))
        blocks = zip(*(each.split(height) for each in rows), strict=True)
        for block, out in zip(blocks, result.split(height), strict=True):
            high, mixed, low = (_sums_of_slices if apart else _sums_of_packed)(block, prepared)
            # The quotient of the low sums, rounded down, is all that they contribute: the rest is whole.
            if low.dtype == torch.int32:
                low.bitwise_right_shift_(DROPPED_BITS)
            else:
                low.mul_(2.0**-DROPPED_BITS).floor_()
            out.copy_(mixed.add_(high, alpha=2**8).add_(low))
        return result

    def transposed_times(self, left: Tensor, right: Rows) -> Tensor:
        """Return `left.T @ right`; see `Products`."""
        require_exact(len(left))
        parts = zip(*(each.split(_MOST_TERMS) for each in (left, *right)), strict=True)
        total, *others = (self._transposed_times(*part) for part in parts)
        for other in others:
            total += other
        return total

    def sum_of(self, packed: Tensor) -> Tensor:
        """Return the sum; see `Products`."""
        slices = _as_bytes(packed)
        ones = slices.new_ones((1, len(slices)))  # a product with ones is many times as fast as a sum
        parts = zip(ones.split(_MOST_TERMS, 1), slices.split(_MOST_TERMS), strict=True)
        total = sum(torch._int_mm(*part).to(torch.int64) for part in parts)
        assert isinstance(total, Tensor)
        low, high = total.view(-1, 2).unbind(1)
        return (256 * high + low).to(torch.float64)

    @staticmethod
    def _transposed_times(left: Tensor, *right: Tensor) -> Tensor:
        slices = _as_bytes(left).t()
        sums: list[Tensor] = []
        for each in right:
            product = torch._int_mm(slices, _as_bytes(each))
            if len(left) > _MOST_ROWS_IN_INT32:
                product = product.to(torch.float64)
            low, high = product.view(left.shape[1], 2, -1).unbind(1)
            sums.append(low.add_(high, alpha=2**8))
        low, high = sums if len(sums) == 2 else sums[0].view(left.shape[1], -1, 2).unbind(2)
        return low.to(torch.float64).add_(high.to(torch.float64), alpha=2**8)


def _as_bytes(x: Tensor) -> Tensor:
    """Return packed rows `(M, K)` as int8 `(M, 2 * K)`, and int8 as it is."""
    if x.dtype == torch.int8:
        return x
    x = x.contiguous()  # may keep any stride where there is one column only
    return x.as_strided(x.shape, (x.shape[1], 1)).view(torch.int8)


def _sums_of_packed(rows: Rows, prepared: Prepared) -> tuple[Tensor, ...]:
    """Return the sums of the products of high slices, of mixed ones and of low ones: int32 `(M, N)`
    each."""
    slices = _as_bytes(rows[0])
    return tuple(torch._int_mm(slices, matrix) for matrix in prepared)


def _sums_of_slices(rows: Rows, prepared: Prepared) -> tuple[Tensor, ...]:
    """Return what `_sums_of_packed` does, from low slices and high ones; float64 if int32 is too small."""
    (matrices,) = prepared
    total: tuple[Tensor, ...] = ()
    parts = (each.split(_MOST_TERMS, 1) for each in rows)
    for low_part, high_part, matrix in zip(*parts, matrices.split(_MOST_TERMS), strict=True):
        high, mixed = torch._int_mm(high_part, matrix).chunk(2, 1)
        other, low = torch._int_mm(low_part, matrix).chunk(2, 1)
        sums = high, mixed.add_(other), low
        if len(matrices) > MOST_TERMS_IN_INT32:
            sums = tuple(each.to(torch.float64) for each in sums)
        total = tuple(a.add_(b) for a, b in zip(total, sums, strict=True)) if total else sums
    return total
