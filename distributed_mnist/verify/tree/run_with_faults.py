"""One run of the job of `dmnist verify` under faults, from its first process to its last."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Self, TypeVar

import psutil

from ...runs.layout import checkpoints_in
from .compare import Answer
from .training_job import TrainCommand, wait_for_answer

T = TypeVar("T")

LONGER_JOB = ("--epochs", "12")
_FLAGS = (
    *LONGER_JOB,
    *("--resume", "auto"),
    *("--checkpoint-every", "0.5 seconds"),
    *("--hang-after", "3"),
    *("--max-restarts", "10"),  # faults may come faster than checkpoints
)


class RunEndedError(Exception):
    """The run has ended."""


class FaultyRun:
    """A run under faults.

    Attributes: `command` (the running command), `sizes` (its world size at each start), `rng` (decides
    everything random), `fault_time` (when the latest fault was injected, in seconds since the epoch).
    """

    def __init__(self, folder: Path, max_nproc: int, device: str, rng: Random) -> None:
        self.folder, self._max_nproc, self._device, self.rng = folder, max_nproc, device, rng
        self.sizes: list[int] = []
        self.fault_time = 0.0
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.command.kill()

    def start(self) -> None:
        """Start the command, if possible at a different size than before. The old one must have ended."""
        others = [size for size in range(1, self._max_nproc + 1) if self.sizes[-1:] != [size]]
        size = self.rng.choice(others or [1])
        self.sizes.append(size)
        self.command = TrainCommand(self.folder, size, self._device, *_FLAGS)

    def wait_for(self, condition: Callable[[], T], complaint: str, poll_seconds: float = 0.02) -> T:
        """Poll until `condition()` is true, and return its value.

        Raises `RunEndedError` if the run succeeds before that, and `RunFailedError` if it fails or the
        wait times out.
        """

        def met_or_ended() -> T | bool:
            running = self.command.running()
            return condition() or not running

        self.command.wait_for(met_or_ended, complaint, poll_seconds)
        if value := condition():
            return value
        wait_for_answer(self.command)  # raises if the run failed
        raise RunEndedError

    def wait_for_random_moment(self) -> None:
        """Wait until some later step and a little longer, so that faults occur at any point of a step."""
        steps = self.wait_for(lambda: self._events("steps"), "no first step")
        total = self._events("start")[-1]["steps"]
        target = steps[-1]["step"] + self.rng.randint(0, total // 6)
        self.wait_for(
            lambda: self._events("steps")[-1]["step"] >= target, f"it did not reach step {target}"
        )
        time.sleep(self.rng.uniform(0, 0.3))
        if self._events("end"):
            raise RunEndedError

    def has_trained(self) -> bool:
        """Return whether the current processes have finished a step."""
        starts = self._events("start")
        return bool(starts and self._first_steps_after(starts[-1]["time"]))

    def mark_fault(self) -> None:
        """Record that the fault is injected now."""
        self.fault_time = time.time()

    def recovery_seconds(self) -> float | None:
        """Return the seconds from the fault to the first new steps; None if no steps were left.

        Raises `RunEndedError` if the run ended before it noticed the fault.
        """
        restarts = lambda: [e for e in self._events("start") if e["time"] > self.fault_time]  # noqa: E731
        restarted = self.wait_for(restarts, "it did not restart")[0]["time"]
        with contextlib.suppress(RunEndedError):
            self.wait_for(lambda: self._first_steps_after(restarted), "it trained no further")
            return self._first_steps_after(restarted) - self.fault_time
        return None

    def answer(self) -> Answer:
        """Wait until the run ends and return its answer. Raises `RunFailedError`."""
        return wait_for_answer(self.command)

    def rank_zero(self) -> psutil.Process:
        """Return the process of rank 0. Raises `RunEndedError` if it has ended."""
        try:
            return psutil.Process(self._events("start")[-1]["ranks"][0]["pid"])
        except (IndexError, psutil.Error):
            raise RunEndedError from None

    def checkpoints(self) -> list[Path]:
        """Return the run's checkpoints, oldest first."""
        return checkpoints_in(self.folder / "checkpoints")

    def notices(self) -> Sequence[str]:
        """Return the notices of the run since its last start."""
        return [event["text"] for event in self._events("notice")]

    def _events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.command.events() if event["event"] == name]

    def _first_steps_after(self, moment: float) -> float:
        """Return when the first steps after this moment were recorded; 0 if none were."""
        return next((event["time"] for event in self._events("steps") if event["time"] > moment), 0.0)
