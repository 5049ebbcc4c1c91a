"""Passes that record what they compute, layer by layer, so that the first wrong tensor has a name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..common.digest import digest
from ..exact.passes.interface import Fixed
from ..exact.passes.training_pass import TrainingPass
from ..exact.scales import Scales

DIGITS = 8
"""Of digests that only have to name a place."""

Trace = dict[str, str]
"""What was computed, in this order, and a short digest of each."""


def short(tensor: Tensor) -> str:
    """Return a short digest. Zero has no sign in it: products in another order may give -0."""
    return digest(tensor + 0)[:DIGITS]


class TracedPass(TrainingPass):
    """A `TrainingPass` that adds up the bits of each tensor that becomes integers.

    Such checksums of parts of a batch add up to that of the batch. `flip`, if it is set, is called once
    with an input of a layer in the next pass, which it may change.
    """

    def __init__(self, model: nn.Module, scales: Scales) -> None:
        super().__init__(model, scales)
        self.checksums = torch.zeros(0, dtype=torch.int64, device=self.sums.flat.device)
        """For each tensor, by number, the sum over the step of its elements' bits, read as int32."""
        self.flip: Callable[[Tensor], object] | None = None
        self.flip_at = 0.0
        """Where: from 0, the input of the first layer, up to 1, behind that of the last one."""
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._layer, self._backward = "", False
        self._labels: dict[int, str] = {}
        self._inputs: list[int] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(name, module))
        model.register_forward_hook(self._forward_ends)

    def begin_step(self) -> None:
        """Forget the step before, but for the scales."""
        super().begin_step()
        self.checksums.zero_()

    def begin_pass(self, *, starting: bool = False) -> None:
        """Begin a pass of the step."""
        super().begin_pass(starting=starting)
        self._backward = False

    def end_first_pass(self) -> None:
        """Make room for the sums and checksums that the first pass has found."""
        super().end_first_pass()
        self.checksums = self.checksums.new_zeros(len(self._labels))

    def number(self) -> int:
        """Return the number of the next tensor."""
        number = super().number()
        self._labels[number] = self._layer
        return number

    def integers(self, x: Tensor, number: int) -> Fixed:
        """Return a tensor as integers, and add its bits to its checksum."""
        if not self._backward and number not in self._inputs:
            self._inputs.append(number)
        if not self.starting:
            if self.flip is not None and not self._backward:
                chosen = self._inputs[min(int(self.flip_at * len(self._inputs)), len(self._inputs) - 1)]
                if number == chosen:
                    flip, self.flip = self.flip, None
                    flip(x)
            bits = (x.detach() + 0).view(torch.int32)  # of zero without its sign, see `short`
            self.checksums[number] += bits.sum(dtype=torch.int64)
        return super().integers(x, number)

    def trace(self) -> Trace:
        """Return what was computed in this step, of the samples whose sums `sums` and `checksums` hold."""
        inputs = set(self._inputs)
        order = [*self._inputs, *sorted(self._labels.keys() - inputs, reverse=True)]
        checksums = self.checksums.tolist()
        layers = {
            f"{'the input' if number in inputs else 'the gradient at the output'} of layer "
            f"{self._labels[number]}": f"{checksums[number] % 2**32:0{DIGITS}x}"
            for number in order
        }
        sums = {
            f"the gradient of {self._names[parameter]}": short(integers)
            for parameter, integers in self.sums.by_parameter()
        }
        return {**layers, **sums, "the largest magnitudes": short(self.scales.now)}

    def _enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        label = f"{name} ({type(module).__name__})" if name else "the model"

        def enter(*_: object) -> None:
            self._layer = label

        return enter

    def _forward_ends(self, *_: object) -> None:
        self._backward = True
