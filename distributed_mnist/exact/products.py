"""Exact products of matrices of integers, in whichever way a machine does them fastest.

The operands are int16 of at most `fixed_point.LIMIT`, and the results are exact, so the way changes
nothing:

- `Float64Products` converts the operands to float64. A product of `K` terms is exact if
  `K * LIMIT**2 < 2**53`, which holds for `K` up to `MOST_TERMS`.
- `Int8Products` cuts each operand into two slices of 8 bits, `256 * high + low`, and multiplies these with
  int32 sums, for which many processors have instructions. It is exact if `2 * K * 2**14 < 2**31`.
  Longer sums are cut into parts, whose results are added in float64.

Some libraries and processors saturate sums of products of int8 at 16 bits. Therefore a machine uses
`Int8Products` only if a test with the largest operands shows that it is exact there.
"""

import functools
from typing import Protocol

import torch
from torch import Tensor

from .fixed_point import LIMIT, OPERAND_BITS
from .refusal import Refused

MOST_TERMS = 2**23
"""The most terms of a sum of products of two operands: `2**23 * LIMIT**2 < 2**53`."""
_MOST_INT8_TERMS = 2**16 - 1
"""The most terms of a sum of int8 products: two of at most `2**14` for each, below `2**31`."""
DROPPED_BITS = 8
"""The bits of a product that `Products.multiply` drops: those of the sums of low slices alone."""
MOST_TERMS_IN_INT32 = 1028
"""The most terms of `Products.multiply` in int32: `K * LIMIT * 2**OPERAND_BITS / 2**8 < 2**31`."""
_LEAST_TERMS_APART = 128
"""With so many terms, `Int8Products` has a tensor for each slice of rows."""
_BLOCK = 2**19
"""Elements of a result that are computed at once: few enough to fit the caches."""


Rows = tuple[Tensor, ...]
"""Packed rows `(M, K)`: one tensor, or one for each slice; see `Products.slices`."""


class Products(Protocol):
    """A way to multiply. Operands are first packed; packing, copying and padding with zeros commute."""

    def pack(self, q: Tensor) -> Tensor:
        """Return int16 integers in the form in which this class takes rows. It may overwrite `q`."""
        ...

    def slices(self, packed: Tensor, terms: int) -> Rows:
        """Return a packed tensor for rows of `K = terms` integers, which may be copies of its parts.

        It is one tensor or several, each in its shape. What is done to one is done to all.
        """
        ...

    def prepare(self, matrix: Tensor) -> Tensor:
        """Return a matrix `(K, N)` in the form in which this class multiplies by it.

        It is int16, not packed, of at most `2**OPERAND_BITS`, as weights are (`prepare_weight`).
        Raises `Refused` if `K` is more than `MOST_TERMS`.
        """
        ...

    def multiply(self, rows: Rows, prepared: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return rows `(M, K)` times a prepared matrix `(K, N)`, over `2**DROPPED_BITS`: `(M, N)`.

        The exact quotient is rounded down to an integer. In float32 it is then rounded once more. It may be
        int32 if `K` is at most `MOST_TERMS_IN_INT32`.
        """
        ...

    def transposed_times(self, left: Tensor, right: Rows) -> Tensor:
        """Return the sum over rows, `left.T @ right`, of packed `(M, N)` and rows `(M, K)`: float64 `(N,
        K)`.

        Raises `Refused` if `M` is more than `MOST_TERMS`.
        """
        ...

    def sum_of(self, packed: Tensor) -> Tensor:
        """Return the sum over the first dimension of packed `(M, N)`: float64 `(N,)`."""
        ...


class Float64Products:
    """Products in float64, on any device that has it."""

    def pack(self, q: Tensor) -> Tensor:
        """Return `q` itself."""
        return q

    def slices(self, packed: Tensor, terms: int) -> Rows:
        """Return the tensor itself."""
        return (packed,)

    def prepare(self, matrix: Tensor) -> Tensor:
        """Return the transpose: some libraries are several times as fast with few rows on the left."""
        require_exact(matrix.shape[0])
        return matrix.t().to(torch.float64).contiguous()

    def multiply(self, rows: Rows, prepared: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `floor(rows @ matrix / 2**DROPPED_BITS)`; see `Products`."""
        (integers,) = rows
        result = integers.new_empty((len(integers), len(prepared)), dtype=dtype)
        height = self._rows_at_once(integers, len(prepared))
        for block, out in zip(integers.split(height), result.split(height), strict=True):
            product = prepared @ block.to(torch.float64).t()
            out.copy_(product.mul_(2.0**-DROPPED_BITS).floor_().t())
        return result

    def transposed_times(self, left: Tensor, right: Rows) -> Tensor:
        """Return `left.T @ right`; see `Products`."""
        (integers,) = right
        require_exact(left.shape[0])
        height = self._rows_at_once(integers, left.shape[1])
        total = torch.zeros((left.shape[1], integers.shape[1]), dtype=torch.float64, device=left.device)
        for some, others in zip(left.split(height), integers.split(height), strict=True):
            total += some.to(torch.float64).t() @ others.to(torch.float64)
        return total

    def sum_of(self, packed: Tensor) -> Tensor:
        """Return the sum; see `Products`."""
        return packed.sum(0).to(torch.float64)

    @staticmethod
    def _rows_at_once(rows: Tensor, columns: int) -> int:
        """Return how many rows to convert at once: on a CPU as many as fit the caches, on a GPU all."""
        wide = max(rows.shape[1], columns)
        return max(64, _BLOCK // 4 // wide) if rows.device.type == "cpu" else max(1, len(rows))


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

    def prepare(self, matrix: Tensor) -> Tensor:
        """Return int8 `(2 * K, 3 * N)`, a matrix for packed rows, or `(K, 2 * N)` for slices.

        The first one has the high slices, both slices, and the low slices: one product gives all sums, but
        a third of it is zeros. The second one has the high slices beside the low ones.
        """
        terms, columns = matrix.shape
        require_exact(terms)
        low = matrix.to(torch.int8)  # keeps the lowest 8 bits
        high = (matrix.to(torch.int32) + 128).bitwise_right_shift(8).to(torch.int8)
        if terms >= _LEAST_TERMS_APART:
            return torch.cat((high, low), 1)
        prepared = torch.zeros((terms, 2, 3, columns), dtype=torch.int8, device=matrix.device)
        prepared[:, 1, 0] = prepared[:, 0, 1] = high
        prepared[:, 1, 1] = prepared[:, 0, 2] = low
        return prepared.view(2 * terms, 3 * columns)

    def multiply(self, rows: Rows, prepared: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `floor(rows @ matrix / 2**DROPPED_BITS)`; see `Products`."""
        apart = len(rows) == 2
        count, terms = rows[0].shape
        result = rows[0].new_empty((count, prepared.shape[1] // (2 if apart else 3)), dtype=dtype)
        height = max(64, _BLOCK // max(prepared.shape[1], terms))
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
        parts = zip(*(each.split(_MOST_INT8_TERMS) for each in (left, *right)), strict=True)
        total, *others = (self._transposed_times(*part) for part in parts)
        for other in others:
            total += other
        return total

    def sum_of(self, packed: Tensor) -> Tensor:
        """Return the sum; see `Products`."""
        slices = _as_bytes(packed)
        ones = slices.new_ones((1, len(slices)))  # a product with ones is many times as fast as a sum
        parts = zip(ones.split(_MOST_INT8_TERMS, 1), slices.split(_MOST_INT8_TERMS), strict=True)
        total = sum(torch._int_mm(*part).to(torch.int64) for part in parts)
        assert isinstance(total, Tensor)
        low, high = total.view(-1, 2).unbind(1)
        return (256 * high + low).to(torch.float64)

    @staticmethod
    def _transposed_times(left: Tensor, *right: Tensor) -> Tensor:
        slices = _as_bytes(left).t()
        products = [torch._int_mm(slices, _as_bytes(each)).to(torch.float64) for each in right]
        sums: list[Tensor] = []
        for product in products:  # float64 holds all values here, and the factors are powers of two
            low, high = product.view(left.shape[1], 2, -1).unbind(1)
            sums.append(low.add_(high, alpha=2.0**8))
        low, high = sums if len(sums) == 2 else sums[0].view(left.shape[1], -1, 2).unbind(2)
        return low.add(high, alpha=2.0**8)


def _as_bytes(x: Tensor) -> Tensor:
    """Return packed rows `(M, K)` as int8 `(M, 2 * K)`, and int8 as it is."""
    if x.dtype == torch.int8:
        return x
    x = x.contiguous()  # may keep any stride where there is one column only
    return x.as_strided(x.shape, (x.shape[1], 1)).view(torch.int8)


def _sums_of_packed(rows: Rows, prepared: Tensor) -> tuple[Tensor, ...]:
    """Return the sums of the products of high slices, of mixed ones and of low ones: int32 `(M, N)`
    each."""
    return torch._int_mm(_as_bytes(rows[0]), prepared).chunk(3, 1)


def _sums_of_slices(rows: Rows, prepared: Tensor) -> tuple[Tensor, ...]:
    """Return what `_sums_of_packed` does, from low slices and high ones; float64 if int32 is too small."""
    terms = len(prepared)
    total: tuple[Tensor, ...] = ()
    parts = (each.split(_MOST_INT8_TERMS, 1) for each in rows)
    for low_part, high_part, matrix in zip(*parts, prepared.split(_MOST_INT8_TERMS), strict=True):
        high, mixed = torch._int_mm(high_part, matrix).chunk(2, 1)
        other, low = torch._int_mm(low_part, matrix).chunk(2, 1)
        sums = high, mixed.add_(other), low
        if terms > MOST_TERMS_IN_INT32:
            sums = tuple(each.to(torch.float64) for each in sums)
        total = tuple(a.add_(b) for a, b in zip(total, sums, strict=True)) if total else sums
    return total


@functools.cache
def products_for(device: torch.device) -> Products:
    """Return the fastest exact way to multiply on a device."""
    int8 = Int8Products()
    return int8 if device.type == "cpu" and _is_exact(int8, device) else Float64Products()


def _is_exact(products: Products, device: torch.device) -> bool:
    """Return whether products with the largest operands of every sign are right, compared with float64."""
    values = torch.tensor(
        [LIMIT, -LIMIT, LIMIT - 127, 127 - LIMIT, 128, -128, 127, -127], dtype=torch.int16
    )
    generator = torch.Generator().manual_seed(0)
    try:
        for terms, rows, columns in ((8, 33, 8), (75, 70, 17), (640, 40, 64), (1100, 200, 48)):
            rows_, matrix, left = (
                values[torch.randint(len(values), shape, generator=generator)].to(device)
                for shape in ((rows, terms), (terms, columns), (rows, columns))
            )
            matrix = matrix.div(2, rounding_mode="trunc")
            rows_[0], matrix[:, 0] = LIMIT, -(2**OPERAND_BITS)
            expected = (
                (rows_.double() @ matrix.double()).mul_(2.0**-DROPPED_BITS).floor_(),
                left.double().t() @ rows_.double(),
                rows_.double().sum(0),
            )
            packed = products.pack(rows_.clone())
            slices = products.slices(packed, terms)
            found = (
                products.multiply(slices, products.prepare(matrix), torch.float64),
                products.transposed_times(products.pack(left.clone()), slices),
                products.sum_of(packed),
            )
            if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                return False
    except RuntimeError:  # this build of torch lacks the operation
        return False
    return True


def require_exact(terms: int) -> None:
    """Raise `Refused` if a sum of this many products of two operands need not be exact in float64."""
    if terms > MOST_TERMS:
        raise Refused(f"a sum of {terms:,} products may round; the most are {MOST_TERMS:,}")
