"""The fixed job of `dmnist verify`, run as anybody runs it: `dmnist train` in a fresh process."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

from ..config import Recipe, Run, load_recipe
from ..errors import CheckpointError
from .compare import Answer, read_answer, read_events

T = TypeVar("T")

RECIPE_FILE = Path(__file__).with_name("verify.toml")
# Neither divides the batch or the sizes: the last batch is short, and every rank scores another number.
DATA = {"dataset": "generated", "train_size": 4_000, "test_size": 999, "data_seed": 0}
PATIENCE = 120.0
"""Seconds without any sign of life, after which something hangs."""
_GLANCE = 0.02  # seconds between two looks at what a run does


class RunFailedError(Exception):
    """A run that did not do what it should; the text says what."""


def recipe() -> Recipe:
    """The job's recipe."""
    return load_recipe(str(RECIPE_FILE))


def options(**more: Any) -> Run:
    """The job's data, and `more` fields of a run."""
    return Run(**DATA, **more)


class TrainCommand:
    """A `dmnist train` under way, with all its processes in a session of their own; leaving the `with`
    block ends whatever is left of them."""

    def __init__(self, folder: Path, nproc: int, device: str, *more: str) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        words = ["train", "--recipe", str(RECIPE_FILE), "--nproc", str(nproc), "--device", device]
        words += [
            word for name, value in DATA.items() for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        words += ["--out", str(folder), *more]
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "distributed_mnist", *words],
                cwd=Path(__file__).parents[2],  # where `-m` looks first: this package and no other
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.began = time.time()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill what is left, and wait until it is gone."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(PATIENCE)
        self.await_(lambda: not self.family(), "its processes did not go")

    def family(self) -> list[psutil.Process]:
        """All living processes of the run, launcher included: its session tells them from all others."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """The ranks, in no order: children of the server that they are forked from."""
        found: list[psutil.Process] = []
        for child in self._children(self.process):
            with contextlib.suppress(psutil.Error):
                if any("multiprocessing.forkserver" in word for word in child.cmdline()):
                    found += self._children(child)
        return found

    @staticmethod
    def _children(process: psutil.Process) -> list[psutil.Process]:
        try:
            return [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
        except psutil.Error:
            return []

    def running(self) -> bool:
        """Whether the command itself has not ended."""
        return self.process.poll() is None

    def events(self) -> list[dict[str, Any]]:
        """What it has recorded since it was started."""
        return [event for event in read_events(self.folder) if event["time"] >= self.began]

    def finish(self) -> int:
        """Its exit code, when it and all its processes have ended. Raises `RunFailedError` if it hangs."""
        seen, deadline = 0.0, time.monotonic() + PATIENCE
        while self.running():
            with contextlib.suppress(OSError):
                if (written := (self.folder / "metrics.jsonl").stat().st_mtime) != seen:
                    seen, deadline = written, time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise RunFailedError(f"no sign of life for {PATIENCE:.0f} s")
            time.sleep(_GLANCE)
        self.await_(lambda: not self.family(), "it left processes behind")
        return self.process.wait()

    def await_(self, condition: Callable[[], T], complaint: str, glance: float = _GLANCE) -> T:
        """Poll until `condition()` is true, and return it. Raises `RunFailedError` when patience ends."""
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise RunFailedError(f"{complaint} within {PATIENCE:.0f} s")
            time.sleep(glance)
        return value

    def last_words(self) -> str:
        """The last line of what it printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def undisturbed(folder: Path, nproc: int, device: str, *more: str) -> Answer:
    """The job's answer when nothing is done to it. Raises `RunFailedError` if it does not end well."""
    with TrainCommand(folder, nproc, device, *more) as trial:
        return answer_of(trial)


def answer_of(trial: TrainCommand) -> Answer:
    """What a run came to, when it has ended. Raises `RunFailedError` if it does not end well."""
    if code := trial.finish():
        raise RunFailedError(f"dmnist train ended with code {code}: {trial.last_words()}")
    try:
        return read_answer(trial.folder)
    except (CheckpointError, OSError, ValueError, LookupError) as error:
        raise RunFailedError(f"{trial.folder} has no answer: {error}") from error
