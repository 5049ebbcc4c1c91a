"""Passes that record what they compute, layer by layer, so that the first wrong tensor has a name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...common.digest import digest
from ...exact.fixed_point import exponent_above
from ...exact.passes import Fixed, TrainingPass
from ...exact.scales import Scales

MAGNITUDES = "the largest magnitudes"
_DIGITS = 8  # of digests that only have to name a place

Trace = dict[str, str]
"""What was computed, in this order, and a short digest of each."""


def short(tensor: Tensor) -> str:
    """Return a short digest. Zero has no sign in it: products in another order may give -0."""
    return digest(tensor + 0)[:_DIGITS]


class TracedPass(TrainingPass):
    """A `TrainingPass` that records checksums of the integers of each tensor.

    `flip`, if it is set, is called once with an input of a layer in the next pass, which it may change.
    """

    def __init__(self, model: nn.Module, scales: Scales) -> None:
        super().__init__(model, scales)
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.flip: Callable[[Tensor], object] | None = None
        self.flip_at = 0.0
        """Where: from 0, the input of the first layer, up to 1, behind that of the last one."""
        self._layer, self._backward = "", False
        self._labels: dict[int, str] = {}
        self._inputs: list[int] = []
        self._checksums: dict[int, Tensor] = {}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(name or "the model"))
        model.register_forward_hook(self._forward_ends)

    def begin_step(self) -> None:
        """Forget the step before, but for the scales."""
        super().begin_step()
        self._checksums.clear()

    def begin_pass(self, *, starting: bool = False) -> None:
        """Begin a pass of the step."""
        super().begin_pass(starting=starting)
        self._backward = False

    def number(self) -> int:
        """Return the number of the next tensor."""
        number = super().number()
        self._labels[number] = self._layer
        return number

    def quantise(self, x: Tensor, number: int) -> Fixed:
        """Return a tensor as integers, and add them to its checksum."""
        if not self._backward:
            if number not in self._inputs:
                self._inputs.append(number)
            chosen = self._inputs[min(int(self.flip_at * len(self._inputs)), len(self._inputs) - 1)]
            if self.flip is not None and not self.starting and number == chosen:
                flip, self.flip = self.flip, None
                flip(x)
        fixed = super().quantise(x, number)
        if not self.starting:
            checksum = fixed.integers.sum(dtype=torch.int64)
            self._checksums[number] = self._checksums.get(number, 0) + checksum
        return fixed

    def trace(self) -> Trace:
        """Return what this rank has computed in this step: inputs, gradients at outputs, and sums."""
        inputs = set(self._inputs)
        order = [*self._inputs, *sorted(self._labels.keys() - inputs, reverse=True)]
        tensors = {
            f"{'the input' if number in inputs else 'the gradient at the output'} of layer "
            f"{self._labels[number]}": str(int(self._checksums.get(number, 0)))
            for number in order
        }
        return {**tensors, **self.sums_trace()}

    def sums_trace(self) -> Trace:
        """Return digests of the sums, which are those of the group once they are added, by parameter."""
        sums = {
            f"the gradient of {self.names[part.parameter]}": short(part.integers) for part in self._sums
        }
        return {**sums, MAGNITUDES: short(exponent_above(self.scales.now))}

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._layer = name

        return enter

    def _forward_ends(self, *_: object) -> None:
        self._backward = True
