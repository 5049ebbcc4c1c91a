"""How often the ranks stop to agree: often enough to obey a signal, seldom enough to cost nothing.

A sync point is where ledgers are added up, the display moves and a request to stop is heard. The ranks
must come to it at the same step, so the distance to the next is agreed at each, from the slowest rank's
time per step.
"""

import time
from typing import Self

import torch

from ..distributed.world import World


class PhaseTimer:
    """What the parts of steps take on this rank. On a device that works by itself, what asking for them
    takes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._seconds: dict[str, float] = {}
        self._parts: list[str] = []
        """Those we are in, the innermost last: it is the one whose time runs."""
        self._next = ""
        self._since = 0.0

    def lap(self, part: str) -> Self:
        """`with laps.lap(part):` times this part, less the exchange in it and the laps inside of it."""
        self._next = part
        return self

    def __enter__(self) -> None:
        self._charge()
        self._parts.append(self._next)

    def __exit__(self, *_: object) -> None:
        self._charge()
        self._parts.pop()

    def _charge(self) -> None:
        """The time since the last call goes to the innermost part."""
        now = time.perf_counter() - self._world.communication_seconds
        if self._parts:
            part = self._parts[-1]
            self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now

    def close(self, steps: int) -> dict[str, float]:
        """Seconds a step for each part since the last call."""
        mean = {part: seconds / max(steps, 1) for part, seconds in self._seconds.items()}
        self._seconds = {}
        return mean


class SyncPoints:
    """The next sync point, about every `SECONDS`, and the time spent in steps since `start`."""

    SECONDS = 0.25

    def __init__(self, world: World, step: int, most_steps: int) -> None:
        self._world, self._most_steps = world, most_steps
        self._last, self._next = step, step + 1
        self._started, self._spoken = 0.0, 0.0
        self.seconds = 0.0
        """Length of the stretch that the latest sync point ended."""
        self.steps = 0
        """Steps in it."""
        self.exchange_seconds = 0.0
        """Time in it that was spent in collectives, by the rank that waited least for others."""
        self.busy: list[float] = []
        """Seconds a step in it, by rank, that a rank computed; on a GPU with the exchange in it."""
        self.communicating: list[float] = []
        """Seconds a step in it, by rank, that a rank spent in collectives, waiting for slower ones too."""

    def start(self) -> None:
        """The clock starts: steps begin, or begin again after an evaluation."""
        self._started, self._spoken = time.perf_counter(), self._world.communication_seconds

    def due(self, step: int) -> bool:
        """Whether the ranks meet after this many steps."""
        return step >= self._next

    def sync(self, step: int, *, stop: bool, save: bool) -> tuple[bool, bool]:
        """Meet the other ranks after `step` steps: was any asked to stop; does any find it time to save?"""
        if self._world.device.type != "cpu":
            with self._world.communicating("a step", only=False):  # the exchange in it cannot be told apart
                torch.accelerator.synchronize()
        self.seconds, self.steps = time.perf_counter() - self._started, step - self._last
        spoken = self._world.communication_seconds - self._spoken
        per_step = self.seconds / max(self.steps, 1)
        mine = torch.tensor([float(stop), float(save), per_step, spoken], device=self._world.device)
        stops, saves, steps, spoke = self._world.all_gather(mine).T.tolist()
        slowest, self.exchange_seconds = max(steps), min(spoke)
        self.communicating = [each / max(self.steps, 1) for each in spoke]
        self.busy = [step - each for step, each in zip(steps, self.communicating, strict=True)]
        # At most four times the last stretch: a first step is slow for reasons that do not last.
        stretch = min(int(self.SECONDS / max(slowest, 1e-9)), 4 * self.steps, self._most_steps)
        self._last, self._next = step, step + max(stretch, 1)
        return max(stops) > 0, max(saves) > 0


def advice(size: int, step_seconds: float, exchange_seconds: float) -> str | None:
    """A line for who would be served better by fewer processes; None where that is not certain.

    Of a step at `size` processes, `exchange_seconds` went into the exchange. At half as many the rest would
    take twice as long at most; if that alone is no more than a step takes now, they would not be slower.
    """
    rest = step_seconds - exchange_seconds
    fewer = size
    while fewer > 1 and rest * size / (fewer // 2) <= step_seconds:
        fewer //= 2
    if fewer == size:
        return None
    share = exchange_seconds / step_seconds
    return (
        f"{share:.0%} of a step ({1e3 * exchange_seconds:.2g} of {1e3 * step_seconds:.2g} ms) is exchange: "
        f"{fewer} process{'es' if fewer > 1 else ''} would not be slower"
    )
