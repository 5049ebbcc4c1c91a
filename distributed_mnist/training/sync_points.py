"""Choose how often the ranks synchronise, and time the steps in between.

At a sync point the ranks add their ledgers, update the display and act on a request to stop. Sync points
must be frequent enough to react to a signal quickly and rare enough to cost almost nothing. All ranks must
reach a sync point after the same step. So at each sync point they agree on the number of steps to the next
one, from the slowest rank's time per step.
"""

import time
from functools import partial
from typing import Self

import torch

from ..common.process_state import changes, snapshot
from ..distributed.world import World
from ..errors import TrainingError


class PhaseTimer:
    """Measure the time that each phase of a step takes on this rank, without communication.

    A GPU runs asynchronously, so there the measured time is that of launching the work.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._seconds: dict[str, float] = {}
        self._open_phases: list[str] = []
        """The nested phases. Time is counted for the last one, which is the innermost."""
        self._next_phase = ""
        self._since = 0.0

    def phase(self, name: str) -> Self:
        """`with timer.phase(name):` times this phase, excluding communication and nested phases."""
        self._next_phase = name  # a generator as context manager would take several times as long
        return self

    def __enter__(self) -> None:
        self._charge()
        self._open_phases.append(self._next_phase)

    def __exit__(self, *_: object) -> None:
        self._charge()
        self._open_phases.pop()

    def _charge(self) -> None:
        """Add the time since the last call to the innermost phase."""
        now = time.perf_counter() - self._world.communication_seconds
        if self._open_phases:
            name = self._open_phases[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def reset(self, steps: int) -> dict[str, float]:
        """Return each phase's seconds per step over the last `steps` steps, and reset to zero."""
        seconds_per_step = {name: seconds / max(steps, 1) for name, seconds in self._seconds.items()}
        self._seconds = {}
        return seconds_per_step


class SyncPoints:
    """Schedule sync points about `SECONDS` apart, and measure the interval before each of them.

    The time of an interval counts from `start`. `max_steps` is the most steps between two sync points.
    """

    SECONDS = 0.25

    def __init__(self, world: World, step: int, max_steps: int) -> None:
        self._world, self._max_steps, self._settings = world, max_steps, snapshot()
        self._last, self._next = step, step + 1
        self._started, self._communication_before = 0.0, 0.0
        self.seconds = 0.0
        """Duration of the latest interval. The fields below also describe this interval."""
        self.steps = 0
        """Number of steps in the interval."""
        self.exchange_seconds = 0.0
        """Seconds spent in collectives by the rank that waited least for the others."""
        self.compute_per_step: list[float] = []
        """Seconds per step that each rank computed; with `ddp` this includes the gradient exchange."""
        self.exchange_per_step: list[float] = []
        """Seconds per step that each rank spent in collectives, including its waits for slower ranks."""

    def start(self) -> None:
        """Start the clock, at the first step and again after each sync point."""
        self._started = time.perf_counter()
        self._communication_before = self._world.communication_seconds
        self._world.device_clock.start()

    def due(self, step: int) -> bool:
        """Return whether there is a sync point after this many steps."""
        return step >= self._next

    def sync(self, step: int, *, stop: bool, save: bool) -> tuple[bool, bool]:
        """Synchronise with the other ranks after `step` steps.

        `stop` is whether this rank was asked to stop; `save` is whether its checkpoint store is due.
        Returns (stop, save), each True if it is True on any rank. Raises `TrainingError` if torch's
        settings are not as they were when training began.
        """
        changed = changes(self._settings)
        self._world.finish_queued_work()
        self.seconds, self.steps = time.perf_counter() - self._started, step - self._last
        exchange = self._world.device_clock.stop()
        if exchange is None:
            exchange = self._world.communication_seconds - self._communication_before
        per_step = self.seconds / max(self.steps, 1)
        mine = torch.tensor(
            [float(stop), float(save), per_step, exchange, float(bool(changed))], device=self._world.device
        )
        stops, saves, step_seconds, exchanges, changes_made = self._world.all_gather(mine).T.tolist()
        if max(changes_made) > 0:
            self._world.on_every_rank(partial(_require_no_changes, changed))
        slowest, self.exchange_seconds = max(step_seconds), min(exchanges)
        self.exchange_per_step = [seconds / max(self.steps, 1) for seconds in exchanges]
        self.compute_per_step = [
            whole - exchange for whole, exchange in zip(step_seconds, self.exchange_per_step, strict=True)
        ]
        # At most four times the last interval, because the time of a slow first step is not typical.
        interval = min(int(self.SECONDS / max(slowest, 1e-9)), 4 * self.steps, self._max_steps)
        self._last, self._next = step, step + max(interval, 1)
        return max(stops) > 0, max(saves) > 0

    def speed_hint(self) -> str | None:
        """Return a hint if fewer processes would train at least as fast, else None."""
        step_seconds, exchange_seconds = self.seconds / self.steps, self.exchange_seconds / self.steps
        return suggest_fewer_processes(self._world.size, step_seconds, exchange_seconds)


def _require_no_changes(changed: str) -> None:
    if changed:
        raise TrainingError(
            f"torch's {changed}: the model or another thread changed it during training, and the weights "
            "would depend on it"
        )


def suggest_fewer_processes(size: int, step_seconds: float, exchange_seconds: float) -> str | None:
    """Return a hint if fewer processes would certainly train at least as fast, else None.

    With `size` processes a step takes `step_seconds`, of which `exchange_seconds` are communication. With
    half as many processes the computation takes at most twice as long. If even that is not longer than a
    step takes now, fewer processes are not slower.
    """
    compute_seconds = step_seconds - exchange_seconds
    fewer = size
    while fewer > 1 and compute_seconds * size / (fewer // 2) <= step_seconds:
        fewer //= 2
    if fewer == size:
        return None
    share = exchange_seconds / step_seconds
    return (
        f"{share:.0%} of a step ({1e3 * exchange_seconds:.2g} of {1e3 * step_seconds:.2g} ms) is "
        f"communication: {fewer} process{'es' if fewer > 1 else ''} would not be slower"
    )
