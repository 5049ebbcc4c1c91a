"""What a way to multiply matrices of integers offers, and the limits within which it is exact."""

from typing import Protocol

import torch
from torch import Tensor

from ..refusal import Refused

MOST_TERMS = 2**23
"""The most terms of a sum of products of two operands: `2**23 * LIMIT**2 < 2**53`."""
DROPPED_BITS = 8
"""The bits of a product that `Products.multiply` drops: those of the sums of low slices alone."""
MOST_TERMS_IN_INT32 = 1028
"""The most terms of `Products.multiply` in int32: `K * LIMIT * 2**OPERAND_BITS / 2**8 < 2**31`."""
BLOCK = 2**19
"""Elements that are computed at once: few enough to fit the caches."""

Rows = tuple[Tensor, ...]
"""Packed rows `(M, K)`: one tensor, or one for each slice; see `Products.slices`."""
Prepared = tuple[Tensor, ...]
"""A matrix `(K, N)` that is prepared for products; see `Products.prepare`."""


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

    def prepare(self, matrix: Tensor) -> Prepared:
        """Return a matrix `(K, N)` in the form in which this class multiplies by it.

        It is int16, not packed, of at most `2**OPERAND_BITS`, as weights are (`prepare_weight`).
        Raises `Refused` if `K` is more than `MOST_TERMS`.
        """
        ...

    def multiply(self, rows: Rows, prepared: Prepared, dtype: torch.dtype = torch.float32) -> Tensor:
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


def require_exact(terms: int) -> None:
    """Raise `Refused` if a sum of this many products of two operands need not be exact in float64."""
    if terms > MOST_TERMS:
        raise Refused(f"a sum of {terms:,} products may round; the most are {MOST_TERMS:,}")
