"""What layers need of a pass: integers from tensors, prepared weights, and a place for sums over
samples."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from ..fixed_point import Exponent
from ..parameter_views import View
from ..products.interface import Prepared, Products


class Fixed(NamedTuple):
    """A tensor `x` as integers: `x` is about `integers * 2**-exponent`."""

    integers: Tensor
    """int16 in the shape of `x`; from `Pass.quantise` packed for the products of its device
    (`Products.pack`)."""
    exponent: Exponent
    """A scalar or one for each sample, `(n, 1, ...)`."""


class Weight(NamedTuple):
    """A weight as integers, arranged and prepared for products."""

    prepared: list[Prepared]
    """One matrix for each arrangement and group."""
    exponent: Exponent
    """A scalar."""


class Draw(NamedTuple):
    """What random numbers depend on: a key, and the place of the pass's first sample in the batch."""

    key: tuple[int | str, ...]
    first: int


Arrange = Callable[[Tensor], list[Tensor]]
"""Returns the matrices, `(K, N)` each, by which rows are multiplied, from the integers of a weight."""


class Pass(Protocol):
    """A pass of samples through a model, in training or in evaluation."""

    products: Products
    samples: int
    """How many samples are in this pass."""

    def number(self) -> int:
        """Return the number of the next tensor that becomes integers. Layers call it in the forward
        pass."""
        ...

    def quantise(self, x: Tensor, number: int) -> Fixed:
        """Return a float32 tensor as integers. `number` is from `number()`."""
        ...

    def integers(self, x: Tensor, number: int) -> Fixed:
        """Do what `quantise` does, but do not pack the integers."""
        ...

    def weight(self, weight: Tensor, use: str, arrange: Arrange) -> Weight:
        """Return a weight, float32, as prepared matrices. `use` names what they are for, and so
        `arrange`."""
        ...

    def sum_over_samples(self, parameter: Tensor | None, *factors: int) -> int | None:
        """Return the number of the next sum over samples. Layers call it in the forward pass.

        The sum is a part of the gradient of `parameter`. Its terms are products of tensors, whose numbers
        are `factors`. Returns None if there is nothing to compute: for no parameter, for a frozen one, and
        in evaluation. Raises `Refused` if `parameter` needs a gradient and is not a parameter of the model.
        """
        ...

    def add(self, number: int, integers: Tensor, products: int = 0) -> None:
        """Add integers, float64 in the shape of the parameter or view, to a sum over samples.

        Each is a sum of so many products of two operands. A whole batch may have `MOST_TERMS` of them. Sums
        of operands, not of products, need no such number: they are exact up to 2**38 terms.
        """
        ...

    def view_of(self, x: Tensor) -> View | None:
        """Return what `x` is a view of, if it is one of a parameter that needs a gradient."""
        ...

    def next_draw(self) -> Draw:
        """Return the key of the next random numbers. Raises `Refused` in evaluation."""
        ...
