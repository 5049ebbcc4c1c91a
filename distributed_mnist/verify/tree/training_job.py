"""Run the job of `dmnist verify --sync tree` the way a user would: as `dmnist train` in a fresh process."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

from ...config import Recipe, Run, flag, load_recipe
from ...errors import CheckpointError
from .compare import Answer, read_answer, read_events

T = TypeVar("T")

RECIPE_FILE = Path(__file__).with_name("job.toml")
# The batch size divides neither of the sizes, so the last batch is short, and shares of ranks differ.
DATA = {"dataset": "generated", "train_size": 4_000, "test_size": 999, "data_seed": 0}
TIMEOUT_SECONDS = 120.0
"""A run that makes no visible progress for this long hangs."""
_POLL_SECONDS = 0.02
_PACKAGE_PARENT = Path(__file__).parents[3]
"""`python -m` looks in the current folder first, so from here it runs this package and no other."""


class RunFailedError(Exception):
    """A run did not behave as expected. The text says what happened."""


def recipe() -> Recipe:
    """Return the job's recipe."""
    return load_recipe(str(RECIPE_FILE))


def options(**more: Any) -> Run:
    """Return the job's run options: its data, and the fields in `more`."""
    return Run(**DATA, **more)


class TrainCommand:
    """A running `dmnist train`. All its processes share one session, which is how they are found.

    Leaving the `with` block kills every process that is left.
    """

    def __init__(self, folder: Path, nproc: int, device: str, *flags: str) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        arguments = ["train", "--recipe", str(RECIPE_FILE), "--nproc", str(nproc), "--device", device]
        for name, value in DATA.items():
            arguments += [flag(name), str(value)]
        arguments += ["--out", str(folder), *flags]
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "distributed_mnist", *arguments],
                cwd=_PACKAGE_PARENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.began = time.time()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill the processes that are left, and wait until they are gone."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(TIMEOUT_SECONDS)
        self.wait_for(lambda: not self.processes(), "its processes did not end")

    def processes(self) -> list[psutil.Process]:
        """Return all living processes of the run, the launcher included: those of its session."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """Return the ranks' processes, in no order: the children of the fork server."""
        found: list[psutil.Process] = []
        for child in self._children(self.process):
            with contextlib.suppress(psutil.Error):
                if any("multiprocessing.forkserver" in argument for argument in child.cmdline()):
                    found += self._children(child)
        return found

    @staticmethod
    def _children(process: psutil.Process) -> list[psutil.Process]:
        try:
            return [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
        except psutil.Error:
            return []

    def running(self) -> bool:
        """Return whether the command itself still runs."""
        return self.process.poll() is None

    def events(self) -> list[dict[str, Any]]:
        """Return the events that the run has recorded since this command started."""
        return [event for event in read_events(self.folder) if event["time"] >= self.began]

    def finish(self) -> int:
        """Wait until the command and all its processes have ended; return its exit code.

        Raises `RunFailedError` if it hangs or leaves processes behind.
        """
        last_write, deadline = 0.0, time.monotonic() + TIMEOUT_SECONDS
        while self.running():
            with contextlib.suppress(OSError):
                if (written := (self.folder / "metrics.jsonl").stat().st_mtime) != last_write:
                    last_write, deadline = written, time.monotonic() + TIMEOUT_SECONDS
            if time.monotonic() > deadline:
                raise RunFailedError(f"no new event for {TIMEOUT_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
        self.wait_for(lambda: not self.processes(), "it left processes behind")
        return self.process.wait()

    def wait_for(
        self, condition: Callable[[], T], complaint: str, poll_seconds: float = _POLL_SECONDS
    ) -> T:
        """Poll until `condition()` is true, and return its value.

        Raises `RunFailedError` with `complaint` after `TIMEOUT_SECONDS`.
        """
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise RunFailedError(f"{complaint} within {TIMEOUT_SECONDS:.0f} s")
            time.sleep(poll_seconds)
        return value

    def last_line(self) -> str:
        """Return the last line that the command printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


def run_without_faults(folder: Path, nproc: int, device: str, *flags: str) -> Answer:
    """Run the job without injecting faults, and return its answer. Raises `RunFailedError` if it fails."""
    with TrainCommand(folder, nproc, device, *flags) as command:
        return wait_for_answer(command)


def wait_for_answer(command: TrainCommand) -> Answer:
    """Wait until a run has ended and return its answer. Raises `RunFailedError` if it fails."""
    if code := command.finish():
        raise RunFailedError(f"dmnist train ended with code {code}: {command.last_line()}")
    try:
        return read_answer(command.folder)
    except (CheckpointError, OSError, ValueError, LookupError) as error:
        raise RunFailedError(f"{command.folder} has no answer: {error}") from error
