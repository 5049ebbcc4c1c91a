"""One step on one global batch, as it is written.

A step has four parts. `begin` is the CPU's: it chooses samples and numbers, and copies them to the device.
`compute_part` and `update` are the device's: nothing in them depends on the number of the step but what
`begin` has copied, so they can be captured (see `captured_step`). `exchange` communicates.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from ...optim import weight_average
from ...optim.clipping import clip_gradients
from ...optim.fused import Number
from ...optim.optimizers import Optimizer
from ..batches import copy_to_device_
from ..forward import make_forward
from ..ledger import Ledger
from ..state import State, TrainingContext
from ..sync_points import PhaseTimer
from .device_graph import graphs_on


class TrainStep:
    """Takes steps: `train_step(step)`. Only communication waits for the device."""

    def __init__(self, state: State, context: TrainingContext, ledger: Ledger, timer: PhaseTimer) -> None:
        self.state, self.context, self.ledger, self.timer = state, context, ledger, timer
        self._numbers: Sequence[Sequence[Number]] = []
        self._on_device = NumbersOnDevice(context.world.device)

    def __call__(self, step: int) -> None:
        """Take step number `step`."""
        self.begin(step)
        self.rest(step)

    def rest(self, step: int) -> None:
        """Take the step that has begun."""
        self.compute_part(step)
        self.exchange()
        self.update(step)

    def begin(self, step: int) -> None:
        """Choose the samples and numbers of a step, and copy them to the device."""
        self.ledger.open(step, self.context.batches.size(step))
        with self.timer.phase("data"):
            self.context.batches.load(step)
        with self.timer.phase("optimizer"):
            if isinstance(self.state.optimizer, Optimizer):
                self._numbers = self._on_device.load(self.state.optimizer)

    def compute_part(self, step: int) -> None:
        """Compute the gradients of this rank's part of the batch."""
        forward_shards = make_forward(self.context, self.timer, step, self.ledger)
        with self.timer.phase("backward"):
            self.context.gradients.compute_part(forward_shards, self.context.batches.shard_sizes(step))

    def exchange(self) -> None:
        """Add the gradients of all ranks."""
        with self.timer.phase("backward"):
            self.context.gradients.exchange()

    def update(self, step: int) -> None:
        """Change the weights."""
        recipe, optimizer = self.context.recipe, self.state.optimizer
        with self.timer.phase("optimizer"):
            self.context.gradients.set_gradients()
            if recipe.clip:
                exact = recipe.precision == "exact"
                clip_gradients(self.state.model.parameters(), recipe.clip, exact=exact)
            if isinstance(optimizer, Optimizer):
                optimizer.apply(self._numbers)
            else:
                optimizer.step()
            if recipe.ema:
                weight_average.update_moving_average(optimizer, recipe.ema, step)


class NumbersOnDevice:
    """The numbers of an optimizer's step, in tensors if the device has graphs.

    A captured step must read them from there. A step as it is written does so too, for equal bits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: Tensor | None = None

    def load(self, optimizer: Optimizer) -> Sequence[Sequence[Number]]:
        """Begin the optimizer's next step and return its numbers, those of each group."""
        numbers = optimizer.next_numbers()
        if graphs_on(self._device) is None:
            return numbers
        flat = torch.tensor(list(chain.from_iterable(numbers)), dtype=optimizer.kernels.numbers_dtype)
        if self._flat is None:
            self._flat = torch.empty_like(flat, device=self._device)
        copy_to_device_(self._flat, flat)
        of_groups = self._flat.split([len(group) for group in numbers])
        return [of_group.unbind() for of_group in of_groups]
