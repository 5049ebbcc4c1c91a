"""A job that is still training when a test injects a fault, and finishes soon afterwards.

`--model paced:network` pauses in every pass until the file that `PACED_UNTIL` names appears; without
that variable it does not. What it computes is the same at any pace.
"""

import os
import time
from pathlib import Path
from typing import Any

from ranks import Program, events, last_step, train
from torch import Tensor, nn

FOLDER = Path(__file__).parent
STILL = 2.0
"""Seconds without a step, when one takes less than half of one, after which a job stands still."""
EPOCHS = 2
"""Of fifty steps: most of a minute at that pace with two ranks, and a second without."""


class Network(nn.Module):
    """A small network that takes its time."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, classes))
        self.until = os.environ.get("PACED_UNTIL")

    def forward(self, images: Tensor) -> Tensor:
        if self.training and self.until and not Path(self.until).exists():
            time.sleep(0.1)  # a pass is one shard of eight: with two ranks a step takes 0.4 seconds
        return self.layers(images)


def network(classes: int) -> nn.Module:
    """For `--model`."""
    return Network(classes)


class Job:
    """The job in a test's hands: its `words` and `variables`, its folder `out`, and `hurry()`."""

    def __init__(self, folder: Path, out: Path | None = None) -> None:
        self.out = out or folder / "out"
        self._hurry = folder / "hurry"
        self._groups = 0
        self.words = ("train", "--device", "cpu", *flags("data"))  # in the folder where it is started
        self.variables = {"PACED_UNTIL": str(self._hurry), "PYTHONPATH": python_path()}

    def hurry(self) -> None:
        """Let it finish."""
        self._hurry.touch()

    def starts(self) -> list[dict[str, Any]]:
        """The `start` events so far: one for each group of processes that trained."""
        return [event for event in events(self.out) if event["event"] == "start"]

    def pids(self) -> list[int]:
        """The processes of the latest group, by rank."""
        return [rank["pid"] for rank in self.starts()[-1]["ranks"]]

    def under_way(self, program: Program, *, size: int) -> None:
        """Wait until a group of that size, and later than the one waited for before, trains."""

        def trains() -> bool:
            told = events(self.out)
            begun = [place for place, event in enumerate(told) if event["event"] == "start"]
            if len(begun) <= self._groups or len(told[begun[-1]]["ranks"]) != size:
                return False
            return any(event["event"] == "steps" for event in told[begun[-1] :])

        program.wait_for(trains, f"a step of a group of {size} after {self._groups} groups")
        self._groups = len(self.starts())

    def standstill(self, program: Program) -> None:
        """Wait until it makes no more progress."""
        seen, since = -1, time.monotonic()

        def still() -> bool:
            nonlocal seen, since
            if (step := last_step(self.out)) != seen:
                seen, since = step, time.monotonic()
            return time.monotonic() > since + STILL

        program.wait_for(still, "a standstill")


def flags(data: object) -> tuple[object, ...]:
    """What the job is, without where and how it runs."""
    data = ("--dataset", "idx", "--data", data, "--recipe", "classic", "--model", "paced:network")
    return (*data, "--batch-size", 22, "--lr", 0.003, "--epochs", EPOCHS, "--checkpoint-every", 5)


def python_path() -> str:
    """Where this module is found by processes that start in another folder."""
    return os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))


def undisturbed(digits: Path, folder: Path) -> dict[str, Any]:
    """The result of the job in one process, when nothing happens to it."""
    return train(*flags(digits), nproc=1, out=folder / "out")


def assert_same(result: dict[str, Any], expected: dict[str, Any], *, world_size: int) -> None:
    """The promise, and at how many processes it was kept in the end."""
    for name in ("weights_sha256", "samples_sha256", "data_sha256", "test_loss", "test_accuracy", "steps"):
        assert result[name] == expected[name], name
    assert result["world_size"] == world_size
