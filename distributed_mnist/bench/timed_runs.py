"""Time the programs that `dmnist bench` compares, each in a fresh process, as a user would start it."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DmnistError, Hang, Interrupted
from ..runs.record import Record, read

TIMEOUT_SECONDS = 1800.0
"""A program that runs longer than this hangs."""


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return the statistics of repeated measurements as plain values, for `--json`."""
    return {
        "n": len(values),
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the ratios pair by pair. The values of a pair were measured in sequence."""
    return [a / b for a, b in zip(values, others, strict=True)]


def median_and_range(row: dict[str, Any], form: str) -> str:
    """Format a `summary` with the format `form`: the median, and of several values the range."""
    median = f"{row['median']:{form}}"
    if row["n"] == 1:
        return median
    return f"{median} ({row['min']:{form}} to {row['max']:{form}})"


@dataclass(frozen=True)
class TimedTraining:
    """The result and the times of a `dmnist train`."""

    result: dict[str, Any]
    record: Record
    began: float
    """When the command was started, in seconds since the epoch."""
    wall_seconds: float
    """Duration of the whole command."""

    @property
    def first_step_seconds(self) -> float:
        """Seconds from the command to the moment before the first step."""
        return self.record.starts[0]["time"] - self.began

    @property
    def all_steps_seconds(self) -> float:
        """Seconds from just before the first step to the final weights, including everything in between."""
        return self.record.steps[-1]["time"] - self.began - self.first_step_seconds

    @property
    def images_per_second(self) -> float:
        """Images per second after the first sync point, if there is another: the first step is slow."""
        intervals = self.record.steps[1:] or self.record.steps
        seconds = [len(interval["losses"]) * interval["seconds"]["step"] for interval in intervals]
        images = [rate["images_per_second"] * took for rate, took in zip(intervals, seconds, strict=True)]
        return sum(images) / sum(seconds)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds per step of each part of a step, from the longest interval between two sync points."""
        longest = max(self.record.steps, key=lambda event: len(event["losses"]))
        return longest["seconds"]


def train(folder: Path, *flags: str, cores: int | None = None) -> TimedTraining:
    """Run `dmnist train` into this folder. `cores` limits its processes to that many cores."""
    command = [sys.executable, "-m", "distributed_mnist", "train", "--out", str(folder), "--json", *flags]
    began, clock = time.time(), time.perf_counter()
    result = json.loads(output(command, cores=cores))
    seconds = time.perf_counter() - clock
    return TimedTraining(result, read(folder), began, seconds)


def seconds_of(command: Sequence[str]) -> float:
    """Return how many seconds a command takes."""
    began = time.perf_counter()
    output(command)
    return time.perf_counter() - began


def output(command: Sequence[str], cores: int | None = None) -> str:
    """Run a command and return what it prints.

    Raises `DmnistError` with the last line of its standard error if it fails, `Interrupted` if it was asked
    to stop, and `Hang` after `TIMEOUT_SECONDS`.
    """
    with _limited_to(cores):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            minutes = TIMEOUT_SECONDS / 60
            raise Hang(f"{' '.join(command[2:5])}: not done after {minutes:.0f} minutes") from None
    if done.returncode == 0:
        return done.stdout
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    kind = Interrupted if done.returncode == Interrupted.exit_code else DmnistError
    raise kind(f"{' '.join(command[2:5])}: {lines[-1].removeprefix('dmnist: ')}")


@contextmanager
def _limited_to(cores: int | None) -> Iterator[None]:
    """Limit processes started in the block to the first `cores` cores, where the system supports that."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
