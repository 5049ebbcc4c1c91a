"""What the layers of a pass in evaluation need."""

import torch
from torch import Tensor

from ..fixed_point import quantise
from ..products.choice import products_for
from ..refusal import Refused
from ..scales import sample_exponents
from .interface import Arrange, Draw, Fixed, Weight
from .weights import prepare_weight


class EvaluationPass:
    """A pass without gradients. Each sample, which is a row of every tensor, has scales of its own."""

    def __init__(self, device: torch.device) -> None:
        self.products = products_for(device)
        self.samples = 0

    def number(self) -> int:
        """Return 0: nothing is kept for the tensors of an evaluation."""
        return 0

    def quantise(self, x: Tensor, number: int) -> Fixed:
        """Return a tensor as packed integers, with an exponent for each sample."""
        fixed = self.integers(x, number)
        return fixed._replace(integers=self.products.pack(fixed.integers))

    def integers(self, x: Tensor, number: int) -> Fixed:
        """Return a tensor as integers, with an exponent for each sample."""
        exponents = sample_exponents(x)
        return Fixed(quantise(x, exponents), exponents)

    def weight(self, weight: Tensor, use: str, arrange: Arrange) -> Weight:
        """Return a weight as prepared matrices."""
        return prepare_weight(self.products, weight, arrange)

    def sum_over_samples(self, parameter: Tensor | None, *factors: int) -> int | None:
        """Return None: there is no gradient."""
        return None

    def add(self, number: int, integers: Tensor, products: int = 0) -> None:
        """Never called."""
        raise AssertionError

    def view_of(self, x: Tensor) -> None:
        """Return None: there is no gradient."""

    def next_draw(self) -> Draw:
        """Refuse: an evaluation has no step."""
        raise Refused("drawing random numbers in evaluation has no exact form")
