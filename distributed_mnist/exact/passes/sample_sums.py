"""The sums over samples of a step, of which the parameters' gradients are made."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..fixed_point import Exponent, power_of_two
from ..parameter_views import View, gathered, most_copies
from ..refusal import OtherLayers


class _Sum(NamedTuple):
    """A part of the gradient of one parameter, from one of its uses in a pass."""

    parameter: int
    factors: tuple[int, ...]
    """The numbers of the tensors whose products are its terms."""
    integers: Tensor
    """float64, a view of `SampleSums.flat`; empty until the first pass has ended."""


class SampleSums:
    """A sum of integers for each use of a parameter, in the order in which a pass has them.

    The first pass finds out which sums there are. All later ones must have the same.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._index = {id(p): i for i, p in enumerate(parameters)}
        self.flat = torch.zeros(0, dtype=torch.float64, device=parameters[0].device)
        """All sums of the step so far, on this rank, float64 in one vector."""
        self._sums: list[_Sum] = []
        self._views: list[View] = []
        """For each sum of the pass so far, the parameter or view that needs it."""
        self._complete = False
        self.most_products = 0
        """The most products that a sum had in a pass that counted them."""

    def begin_step(self) -> None:
        """Begin with zeros."""
        self.flat.zero_()

    def begin_pass(self) -> None:
        """Begin with the first sum."""
        self._views.clear()

    def count(self) -> int:
        """Return how many sums the pass has so far."""
        return len(self._views)

    def allocate(self) -> None:
        """Make room for the sums that the first pass has found."""
        shapes = [self._parameters[part.parameter].shape for part in self._sums]
        sizes = [shape.numel() for shape in shapes]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float64, device=self.flat.device)
        self._sums = [
            part._replace(integers=view.view(shape))
            for part, view, shape in zip(self._sums, self.flat.split(sizes), shapes, strict=True)
        ]
        self._complete = True

    def next_number(self, view: View, factors: tuple[int, ...]) -> int:
        """Return the number of the pass's next sum, for this parameter or view.

        `factors` are the numbers of the tensors whose products are its terms. Raises `Refused` if the first
        pass had another sum here.
        """
        number, index = len(self._views), self._index[id(view.parameter)]
        self._views.append(view)
        if not self._complete and number == len(self._sums):
            self._sums.append(_Sum(index, factors, self.flat))
        if number >= len(self._sums) or self._sums[number][:2] != (index, factors):
            raise OtherLayers
        return number

    def add(self, number: int, integers: Tensor) -> None:
        """Add integers, float64 in the shape of the parameter or view."""
        if self._complete:
            self._sums[number].integers.add_(gathered(self._views[number], integers))

    def note_products(self, number: int, products: int) -> None:
        """Note that each of the integers of a sum is one of so many products."""
        self.most_products = max(self.most_products, products * most_copies(self._views[number]))

    def by_parameter(self) -> list[tuple[int, Tensor]]:
        """Return each sum, with the number of its parameter."""
        return [(part.parameter, part.integers) for part in self._sums]

    def gradients(self, exponents: list[Exponent]) -> list[Tensor]:
        """Return the gradient of each parameter, float32, from the sums, which all ranks have added.

        `exponents` are those of all tensors.
        """
        totals: dict[int, Tensor] = {}
        for part in self._sums:
            first, *others = (exponents[i] for i in part.factors)
            share = part.integers * power_of_two(-sum(others, first))
            totals[part.parameter] = totals[part.parameter] + share if part.parameter in totals else share
        return [
            totals[i].to(torch.float32) if i in totals else torch.zeros_like(p)
            for i, p in enumerate(self._parameters)
        ]
