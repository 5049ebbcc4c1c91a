"""Programs that `dmnist bench` times: each a fresh process, as a user would start it."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DmnistError, Hang, Interrupted

PATIENCE = 1800.0
"""Seconds after which a program that should have ended hangs."""


@dataclass
class Sample:
    """The same thing measured several times."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """One more time."""
        self.values.append(value)

    @property
    def median(self) -> float:
        """The one in the middle."""
        return statistics.median(self.values)

    @property
    def deviation(self) -> float:
        """The standard deviation of a single value; 0 where there is only one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def over(self, other: "Sample") -> "Sample":
        """Ratios of values measured one after the other."""
        return Sample([a / b for a, b in zip(self.values, other.values, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "n": len(self.values),
            "median": self.median,
            "mean": statistics.fmean(self.values),
            "deviation": self.deviation,
            "min": min(self.values),
            "max": max(self.values),
        }


@dataclass(frozen=True)
class Trained:
    """What a `dmnist train` came to, and when."""

    result: dict[str, Any]
    events: list[dict[str, Any]]
    began: float
    """When the command was given, in seconds since the epoch."""
    wall_seconds: float
    """Of the whole command."""

    @property
    def first_step_seconds(self) -> float:
        """From the command to the moment before the first step."""
        return next(event["time"] for event in self.events if event["event"] == "start") - self.began

    @property
    def all_steps_seconds(self) -> float:
        """From the moment before the first step to the last weight, whatever happened between."""
        steps = [event["time"] for event in self.events if event["event"] == "steps"]
        return steps[-1] - self.began - self.first_step_seconds

    @property
    def parts(self) -> dict[str, float]:
        """Seconds a step, by part, of the longest stretch between two sync points."""
        pages = [event for event in self.events if event["event"] == "steps"]
        longest = max(pages, key=lambda page: len(page["losses"]))
        return longest["seconds"]


def train(folder: Path, *words: str, cores: int | None = None) -> Trained:
    """`dmnist train` into this folder. `cores` keeps it, and what it starts, to so many of them."""
    command = [sys.executable, "-m", "distributed_mnist", "train", "--out", str(folder), "--json", *words]
    began, clock = time.time(), time.perf_counter()
    result = json.loads(output(command, cores=cores))
    seconds = time.perf_counter() - clock
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return Trained(result, [json.loads(line) for line in lines], began, seconds)


def seconds_of(command: Sequence[str]) -> float:
    """How long a command takes."""
    began = time.perf_counter()
    output(command)
    return time.perf_counter() - began


def output(command: Sequence[str], cores: int | None = None) -> str:
    """What a command prints. Raises `DmnistError` with its last line if it fails."""
    with _kept_to(cores):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Hang(f"{' '.join(command[2:5])}: not done after {PATIENCE / 60:.0f} minutes") from None
    if done.returncode == 0:
        return done.stdout
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    kind = Interrupted if done.returncode == Interrupted.exit_code else DmnistError
    raise kind(f"{' '.join(command[2:5])}: {lines[-1].removeprefix('dmnist: ')}")


@contextmanager
def _kept_to(cores: int | None) -> Iterator[None]:
    """What is started meanwhile stays on so many cores, where the system can be told."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
