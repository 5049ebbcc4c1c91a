"""What the layers of a pass need: integers from tensors, prepared weights, and a place for sums over
samples."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .fixed_point import OPERAND_BITS, largest_magnitude, power_of_two, quantise, scale_exponent
from .parameter_views import View, attached_view, gathered, most_copies
from .products import DROPPED_BITS, Products, products_for
from .refusal import Refused
from .scales import Scales


class Fixed(NamedTuple):
    """A tensor `x` as integers: `x` is about `integers * 2**-exponent`."""

    integers: Tensor
    """int16 in the shape of `x`, packed for the products of its device (`Products.pack`)."""
    exponent: Tensor
    """int64, a scalar or one for each sample, `(n, 1, ...)`."""


class Weight(NamedTuple):
    """A weight as integers, arranged and prepared for products."""

    prepared: list[Tensor]
    """One matrix for each arrangement and group."""
    exponent: Tensor
    """int64 scalar."""


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

    def product_factor(self, first: Tensor, second: Tensor) -> Tensor:
        """Return what a result of `Products.multiply` is multiplied by, float32.

        `first` and `second` are the exponents of the two operands.
        """
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


class _Sum(NamedTuple):
    """A sum over samples: a part of the gradient of one parameter, from one of its uses in a pass."""

    parameter: int
    factors: tuple[int, ...]
    """The numbers of the tensors whose products are its terms."""
    integers: Tensor
    """float64, a view of `TrainingPass.sums`; empty until the first pass has ended."""


class TrainingPass:
    """The passes of a step. Every step uses the same object, and calls `begin_step` and `end_step`.

    The first pass finds out which tensors become integers, and which sums there are. All later ones must be
    like it.
    """

    def __init__(self, model: nn.Module, scales: Scales) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.products, self.scales = products_for(device), scales
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)
        """All sums over samples of the step so far, on this rank: integers in one flat vector."""
        self._sums: list[_Sum] = []
        self._index = {id(p): i for i, p in enumerate(self.parameters)}
        self.starting = False
        self.samples = self.tensors = 0
        """How many tensors have become integers in the present pass."""
        self.elements = 0
        """How many numbers have become integers in the present pass."""
        self._draws = self._first = 0
        self._key: tuple[int | str, ...] = ()
        self._views: list[View] = []
        """For each sum of the pass so far, the parameter or view that needs it."""
        self._counts: tuple[int, int] | None = None
        """How many tensors and sums there are, once the first pass has ended."""
        self._weights: dict[tuple[int, str], Weight] = {}
        self._factors: dict[tuple[int, int], Tensor] = {}
        self.most_products = 0
        """The most products that a sum has had in a pass that found scales."""

    def begin_step(self) -> None:
        """Forget the step before, but for the scales."""
        self.scales.begin_step()
        self.sums.zero_()
        self._weights.clear()
        self._factors.clear()

    def begin_pass(self, *, starting: bool = False) -> None:
        """Begin a pass of the step. If `starting`, tensors that have no scale get one from this pass."""
        self.starting = starting
        self.tensors = self._draws = self.elements = 0
        self._views.clear()

    def key_draws(self, *key: int | str, first: int) -> None:
        """Let random numbers depend on this key. The pass begins with sample number `first` of the
        batch."""
        self._key, self._first = key, first

    def end_pass(self) -> None:
        """End a pass. Raises `Refused` if it used other layers than the first one."""
        if self._counts not in (None, (self.tensors, len(self._views))):
            raise _OTHER_LAYERS

    def end_first_pass(self) -> None:
        """Make room for the sums that the first pass has found."""
        self._counts = self.tensors, len(self._views)
        shapes = [self.parameters[part.parameter].shape for part in self._sums]
        sizes = [shape.numel() for shape in shapes]
        self.sums = torch.zeros(sum(sizes), dtype=torch.float64, device=self.sums.device)
        views = self.sums.split(sizes)
        self._sums = [
            part._replace(integers=view.view(shape))
            for part, view, shape in zip(self._sums, views, shapes, strict=True)
        ]

    def number(self) -> int:
        """Return the number of the next tensor; see `Pass`."""
        self.tensors += 1
        if self.tensors > len(self.scales):
            if self._counts is not None:
                raise _OTHER_LAYERS
            self.scales.extend(self.tensors)
            self.scales.exponents.append(self.scales.exponents[0] if self.scales.exponents else _ZERO)
        return self.tensors - 1

    def quantise(self, x: Tensor, number: int) -> Fixed:
        """Return a tensor as packed integers, with the exponent of the whole global batch."""
        fixed = self.integers(x, number)
        return fixed._replace(integers=self.products.pack(fixed.integers))

    def integers(self, x: Tensor, number: int) -> Fixed:
        """Return a tensor as integers, with the exponent of the whole global batch."""
        if self.starting:
            self.scales.start(number, x)
        self.scales.observe(number, x)
        self.elements += x.numel()
        exponent = self.scales.exponents[number]
        return Fixed(quantise(x, exponent), exponent)

    def weight(self, weight: Tensor, use: str, arrange: Arrange) -> Weight:
        """Return a weight as prepared matrices; those of a parameter are made once in a step."""
        # A view does not outlive its pass. What is made of it must outlive `_factors`, whose keys are ids.
        key = (id(weight), use) if isinstance(weight, nn.Parameter) else (len(self._weights), "view")
        if key not in self._weights:
            self._weights[key] = prepare_weight(self.products, weight, arrange)
        return self._weights[key]

    def product_factor(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the factor of a product, computed once in a step; see `Pass`."""
        key = id(first), id(second)
        if self.starting or key not in self._factors:
            self._factors[key] = product_factor(first, second)
        return self._factors[key]

    def sum_over_samples(self, parameter: Tensor | None, *factors: int) -> int | None:
        """Return the number of the next sum; see `Pass`."""
        if parameter is None or not parameter.requires_grad:
            return None
        view = self.view_of(parameter)
        if view is None:
            raise Refused("a weight that is computed from parameters has no exact gradient")
        number, index = len(self._views), self._index[id(view.parameter)]
        self._views.append(view)
        if self._counts is None and number == len(self._sums):
            self._sums.append(_Sum(index, factors, self.sums))
        if number >= len(self._sums) or self._sums[number][:2] != (index, factors):
            raise _OTHER_LAYERS
        return number

    def add(self, number: int, integers: Tensor, products: int = 0) -> None:
        """Add integers to a sum; see `Pass`."""
        if self.starting:
            self.most_products = max(self.most_products, products * most_copies(self._views[number]))
        if self._sums[number].integers.numel():
            self._sums[number].integers.add_(gathered(self._views[number], integers))

    def view_of(self, x: Tensor) -> View | None:
        """Return what a tensor is a view of; see `Pass`."""
        return View(self.parameters[self._index[id(x)]]) if id(x) in self._index else attached_view(x)

    def next_draw(self) -> Draw:
        """Return the key of the next random numbers."""
        self._draws += 1
        return Draw((*self._key, self._draws), self._first)

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each parameter, float32, from the sums, which all ranks have added.

        It is not a number if a tensor of the step had a value that is not finite: integers cannot say so.
        """
        undefined = self.scales.now.amax() * 0  # zero, or not a number
        totals: dict[int, Tensor] = {}
        for part in self._sums:
            exponents = [self.scales.exponents[i] for i in part.factors]
            share = part.integers * power_of_two(-sum(exponents[1:], exponents[0]))
            totals[part.parameter] = totals[part.parameter] + share if part.parameter in totals else share
        return [
            totals[i].to(torch.float32).add_(undefined) if i in totals else torch.zeros_like(p)
            for i, p in enumerate(self.parameters)
        ]


_OTHER_LAYERS = Refused("layers that differ between images have no exact form")
_ZERO = torch.zeros((), dtype=torch.int64)


def product_factor(first: Tensor, second: Tensor) -> Tensor:
    """Return `2**DROPPED_BITS / 2**(first + second)`, float32, which is a normal number."""
    return power_of_two(DROPPED_BITS - first - second, torch.float32)


def prepare_weight(products: Products, weight: Tensor, arrange: Arrange) -> Weight:
    """Return a weight as integers with a scale from its own largest magnitude, arranged and prepared."""
    exponent = scale_exponent(largest_magnitude(weight), OPERAND_BITS)
    integers = quantise(weight, exponent, 2**OPERAND_BITS)
    return Weight([products.prepare(matrix) for matrix in arrange(integers)], exponent)
