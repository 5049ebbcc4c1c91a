"""What the layers of a pass in training need."""

from torch import Tensor, nn

from ..fixed_point import LIMIT, power_of_two, quantise
from ..parameter_views import View, attached_view
from ..products.choice import products_for
from ..refusal import OtherLayers, Refused
from ..scales import Scales
from .interface import Arrange, Draw, Fixed, Weight
from .sample_sums import SampleSums
from .weights import prepare_weight


class TrainingPass:
    """The passes of a step. Every step uses the same object, and calls `begin_step` and `end_step`.

    The first pass finds out which tensors become integers, and which sums there are. All later ones must be
    like it.
    """

    def __init__(self, model: nn.Module, scales: Scales) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.products, self.scales = products_for(device), scales
        self.sums = SampleSums(self.parameters)
        self._ids = {id(p) for p in self.parameters}
        self.starting = False
        self.samples = self.tensors = 0
        """How many tensors have become integers in the present pass."""
        self.elements = 0
        """How many numbers have become integers in the present pass."""
        self._draws = self._first = 0
        self._key: tuple[int | str, ...] = ()
        self._counts: tuple[int, int] | None = None
        """How many tensors and sums there are, once the first pass has ended."""
        self._weights: dict[tuple[int, str], Weight] = {}

    def begin_step(self) -> None:
        """Forget the step before, but for the scales."""
        self.scales.begin_step()
        self.sums.begin_step()
        self._weights.clear()

    def begin_pass(self, *, starting: bool = False) -> None:
        """Begin a pass of the step. If `starting`, tensors that have no scale get one from this pass."""
        self.starting = starting
        self.tensors = self._draws = self.elements = 0
        self.sums.begin_pass()

    def key_draws(self, *key: int | str, first: int) -> None:
        """Let random numbers depend on this key. The pass begins with sample number `first` of the
        batch."""
        self._key, self._first = key, first

    def end_pass(self) -> None:
        """End a pass. Raises `Refused` if it used other layers than the first one."""
        if self._counts not in (None, (self.tensors, self.sums.count())):
            raise OtherLayers

    def end_first_pass(self) -> None:
        """Make room for the sums that the first pass has found."""
        self._counts = self.tensors, self.sums.count()
        self.sums.allocate()

    def number(self) -> int:
        """Return the number of the next tensor; see `Pass`."""
        self.tensors += 1
        if self.tensors > len(self.scales):
            if self._counts is not None:
                raise OtherLayers
            self.scales.extend(self.tensors)
            self.scales.exponents.append(0)
        return self.tensors - 1

    def quantise(self, x: Tensor, number: int) -> Fixed:
        """Return a tensor as packed integers, with the exponent of the whole global batch."""
        fixed = self.integers(x, number)
        return fixed._replace(integers=self.products.pack(fixed.integers))

    def integers(self, x: Tensor, number: int) -> Fixed:
        """Return a tensor as integers, with the exponent of the whole global batch."""
        if self.starting:
            self.scales.start(number, x)
        largest = self.scales.observe(number, x)
        self.elements += x.numel()
        exponent = self.scales.exponents[number]
        # A GPU is not asked, because the CPU would wait for it.
        fits = isinstance(exponent, int) and float(largest) * power_of_two(exponent) <= LIMIT
        return Fixed(quantise(x, exponent, saturates=not fits), exponent)

    def weight(self, weight: Tensor, use: str, arrange: Arrange) -> Weight:
        """Return a weight as prepared matrices; those of a parameter are made once in a step."""
        if not isinstance(weight, nn.Parameter):  # a view does not outlive its pass
            return prepare_weight(self.products, weight, arrange)
        key = id(weight), use
        if key not in self._weights:
            self._weights[key] = prepare_weight(self.products, weight, arrange)
        return self._weights[key]

    def sum_over_samples(self, parameter: Tensor | None, *factors: int) -> int | None:
        """Return the number of the next sum; see `Pass`."""
        if parameter is None or not parameter.requires_grad:
            return None
        view = self.view_of(parameter)
        if view is None:
            raise Refused("a weight that is computed from parameters has no exact gradient")
        return self.sums.next_number(view, factors)

    def add(self, number: int, integers: Tensor, products: int = 0) -> None:
        """Add integers to a sum; see `Pass`."""
        if self.starting:
            self.sums.note_products(number, products)
        self.sums.add(number, integers)

    def view_of(self, x: Tensor) -> View | None:
        """Return what a tensor is a view of; see `Pass`."""
        return View(x) if id(x) in self._ids else attached_view(x)

    def next_draw(self) -> Draw:
        """Return the key of the next random numbers."""
        self._draws += 1
        return Draw((*self._key, self._draws), self._first)

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each parameter, float32, from the sums, which all ranks have added.

        It is not a number if a tensor of the step had a value that is not finite: integers cannot say so.
        """
        undefined = self.scales.now.amax() * 0  # zero, or not a number
        return [each.add_(undefined) for each in self.sums.gradients(self.scales.exponents)]
