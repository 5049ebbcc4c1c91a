"""One run of the job of `dmnist verify`, from its first process to its last, whatever is done to it."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Self, TypeVar

import psutil

from ..runs.layout import checkpoints_in
from .compare import Answer
from .job import TrainCommand, answer_of

T = TypeVar("T")

LONGER = ("--epochs", "12")
_FLAGS = (
    *LONGER,
    *("--resume", "auto"),
    *("--checkpoint-every", "0.5 seconds"),
    *("--hang-after", "3"),
    *("--max-restarts", "10"),  # faults may come faster than checkpoints
)


class RunEndedError(Exception):
    """The run has come to its end."""


class FaultyRun:
    """A run under faults. Attributes: `trial` (the command that is under way), `sizes` (how many processes
    it had in turn), `rng` (for what is left to chance), `struck_at` (when the latest fault struck)."""

    def __init__(self, folder: Path, most: int, device: str, rng: Random) -> None:
        self.folder, self._most, self._device, self.rng = folder, most, device, rng
        self.sizes: list[int] = []
        self.struck_at = 0.0
        self.trial = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.trial.end()

    def start_again(self) -> None:
        """The same command once more, at another size if there is one. The former has ended."""
        self.trial = self._start()

    def _start(self) -> TrainCommand:
        others = [size for size in range(1, self._most + 1) if self.sizes[-1:] != [size]]
        size = self.rng.choice(others or [1])
        self.sizes.append(size)
        return TrainCommand(self.folder, size, self._device, *_FLAGS)

    def await_(self, condition: Callable[[], T], complaint: str, glance: float = 0.02) -> T:
        """Poll until `condition()` is true, and return it. Raises `RunEndedError` if the run ends well
        before, and `RunFailedError` if it ends otherwise or nothing comes of it."""

        def met_or_ended() -> T | bool:
            running = self.trial.running()
            return condition() or not running

        self.trial.await_(met_or_ended, complaint, glance)
        if value := condition():
            return value
        answer_of(self.trial)  # raises if it did not end well
        raise RunEndedError

    def await_moment(self) -> None:
        """Let the run go on until some step, and a little longer: faults come when nobody expects them."""
        steps = self.await_(lambda: self._of("steps"), "no first step")
        total = self._of("start")[-1]["steps"]
        further = steps[-1]["step"] + self.rng.randint(0, total // 6)
        self.await_(lambda: self._of("steps")[-1]["step"] >= further, f"step {further} did not come")
        time.sleep(self.rng.uniform(0, 0.3))
        if self._of("end"):
            raise RunEndedError

    def moving(self) -> bool:
        """Whether the processes that are there now have trained already."""
        starts = self._of("start")
        return bool(starts and self._moves_since(starts[-1]["time"]))

    def mark(self) -> None:
        """The fault strikes now."""
        self.struck_at = time.time()

    def recovery(self) -> float | None:
        """Seconds from the fault to the first new steps; None if none were left to do.

        Raises `RunEndedError` if the run ended before it noticed.
        """
        began_again = lambda: [e for e in self._of("start") if e["time"] > self.struck_at]  # noqa: E731
        first = self.await_(began_again, "it did not start again")[0]["time"]
        with contextlib.suppress(RunEndedError):
            self.await_(lambda: self._moves_since(first), "it did not go on")
            return self._moves_since(first) - self.struck_at
        return None

    def answer(self) -> Answer:
        """What it comes to in the end. Raises `RunFailedError`."""
        return answer_of(self.trial)

    def rank(self, number: int) -> psutil.Process | None:
        """The process of a rank."""
        for event in self._of("start")[-1:]:
            for peer in event["ranks"]:
                if peer["rank"] == number:
                    with contextlib.suppress(psutil.Error):
                        return psutil.Process(peer["pid"])
        return None

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return checkpoints_in(self.folder / "checkpoints")

    def complaints(self) -> Sequence[str]:
        """What the run has noticed since it was started."""
        return [event["text"] for event in self._of("notice")]

    def _of(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.trial.events() if event["event"] == name]

    def _moves_since(self, moment: float) -> float:
        """When the first steps after this moment were recorded; 0 if none were."""
        return next((event["time"] for event in self._of("steps") if event["time"] > moment), 0.0)
