"""How often the ranks stop to agree: often enough to obey a signal, seldom enough to cost nothing.

A sync point is where ledgers are added up, the display moves and a request to stop is heard. The ranks
must come to it at the same step, so the distance to the next is agreed at each, from the slowest rank's
time per step.
"""

import time

import torch

from .world import World


class Pace:
    """The next sync point, about every `SECONDS`, and the time spent in steps since `start`."""

    SECONDS = 0.25

    def __init__(self, world: World, step: int, most_steps: int) -> None:
        self._world, self._most_steps = world, most_steps
        self._last, self._next = step, step + 1
        self._started = 0.0
        self.seconds = 0.0
        """Length of the stretch that the latest sync point ended."""

    def start(self) -> None:
        """The clock starts: steps begin, or begin again after an evaluation."""
        self._started = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether the ranks meet after this many steps."""
        return step >= self._next

    def sync(self, step: int, *, stop: bool, save: bool) -> tuple[bool, bool]:
        """Meet the other ranks after `step` steps: was any asked to stop; does any find it time to save?"""
        if self._world.device.type != "cpu":
            with self._world.speaking("step"):
                torch.accelerator.synchronize()
        self.seconds = time.perf_counter() - self._started
        per_step = self.seconds / max(step - self._last, 1)
        mine = torch.tensor([float(stop), float(save), per_step], device=self._world.device)
        stopping, saving, slowest = self._world.max_(mine).tolist()
        # At most four times the last stretch: a first step is slow for reasons that do not last.
        stretch = min(int(self.SECONDS / max(slowest, 1e-9)), 4 * (step - self._last), self._most_steps)
        self._last, self._next = step, step + max(stretch, 1)
        return stopping > 0, saving > 0
