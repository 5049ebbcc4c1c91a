"""The scales of the tensors that a step rounds to integers.

A scale must not depend on which rank holds which samples. So in training it comes from the largest
magnitude that the tensor had in the step before, over the whole global batch ("delayed scaling", as in
training with 8-bit floats). It leaves two bits of headroom; what is larger saturates. A tensor that has had
no magnitude but zero yet gets its first one from the first samples of the batch, which every rank puts
through the model.

In evaluation there is no sum over samples, so each sample has a scale of its own.
"""

import torch
from torch import Tensor

from .fixed_point import HEADROOM, OPERAND_BITS, Exponent, known, largest_magnitude, scale_exponent


class Scales:
    """The largest magnitudes of a model's tensors, by number, in the order in which a pass first meets
    them.

    Each is the same on all ranks. The vectors have one float32 for each tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self.before = torch.zeros(0, device=device)
        """The largest magnitudes in the latest step in which they were not zero. They decide the scales."""
        self.now = torch.zeros(0, device=device)
        """The largest magnitudes so far in the present step, on this rank."""
        self._complete = False
        self._started: set[int] = set()
        """Tensors of passes that found scales. Others are gradients of what the logits do not depend on."""
        self.exponents: list[Exponent] = []
        """Scalars `k`: tensor `i` becomes integers `round(x * 2**k)` in the present step."""

    def __len__(self) -> int:
        return len(self.before)

    def extend(self, count: int) -> None:
        """Make room for `count` tensors."""
        more = self.before.new_zeros(count - len(self))
        self.before, self.now = torch.cat((self.before, more)), torch.cat((self.now, more))

    def begin_step(self) -> None:
        """Compute the exponents of a step."""
        self.now.zero_()
        self.exponents = known(scale_exponent(self.before, OPERAND_BITS - HEADROOM))

    def observe(self, index: int, x: Tensor) -> Tensor:
        """Take the magnitude of a tensor into account for the next step, and return it."""
        so_far, largest = self.now[index], largest_magnitude(x)
        torch.maximum(so_far, largest, out=so_far)
        return largest

    def start(self, index: int, x: Tensor) -> None:
        """Give a tensor that has no scale yet the one that fits `x`."""
        self._started.add(index)
        if not self.before[index]:
            self.before[index] = largest_magnitude(x)
            exponents = scale_exponent(self.before[index : index + 1], OPERAND_BITS - HEADROOM)
            (self.exponents[index],) = known(exponents)

    def end_step(self) -> None:
        """Make the magnitudes of this step, which all ranks have combined, decide the next step's
        scales."""
        torch.where(self.now > 0, self.now, self.before, out=self.before)

    def restore(self, before: Tensor) -> None:
        """Take the scales of a checkpoint, float32 `(tensors,)`."""
        self.before = before.to(self.before.device, copy=True)
        self.now, self._complete = torch.zeros_like(self.before), False

    def complete(self) -> bool:
        """Return whether every tensor that needs one has a scale. It is then never zero again."""
        if not self._complete:  # a GPU waits only until then
            missing = {index for index, largest in enumerate(self.before.tolist()) if not largest}
            self._complete = not (missing & self._started if self._started else missing)
        return self._complete


def sample_exponents(x: Tensor) -> Tensor:
    """Return int64 `(n, 1, ...)`: for each of the `n` samples of `x`, the exponent that fits it."""
    if not x.numel():
        return torch.zeros((len(x), *(1,) * (x.ndim - 1)), dtype=torch.int64, device=x.device)
    rows = x.flatten(1)
    low, high = rows.amin(1), rows.amax(1)  # many times as fast as `aminmax` of rows
    return scale_exponent(torch.maximum(high, -low), OPERAND_BITS).view(-1, *(1,) * (x.ndim - 1))
