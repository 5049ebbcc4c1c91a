"""`in_python.train` in several processes: what our launcher tells them, and what comes back."""

import dataclasses
import importlib
import json
import pickle
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..common.placement import Placement
from ..config import Recipe, Run
from ..data import prefetch
from ..data.datasets import Dataset
from ..data.prefetch import PrefetchedData
from ..distributed.world import World
from ..errors import DmnistError, UsageError, WorkerLost, described, write_line
from ..launcher import spawn
from ..launcher.rank_process import run_in_group
from ..launcher.signals import StopSignals
from ..reporting.console import make_console
from ..runs import layout
from ..training import run as job


@dataclass(frozen=True)
class WorkerTask:
    """What the launcher tells its workers."""

    recipe: Recipe
    run: Run
    title: str
    verbose: bool
    told: Path
    """Folder for what goes wrong: a file a rank."""


def work(
    placement: Placement,
    listener: socket.socket | None,
    order: WorkerTask,
    handed: PrefetchedData | None = None,
) -> int:
    """One rank of a `train` with several processes; its exit code. Rank 0 is handed the data."""

    def body(world: World, signals: StopSignals) -> None:
        read = handed.receive if handed else _nobody_reads
        console = console_for(order.verbose)
        job.run(
            world, order.recipe, order.run, title=order.title, console=console, signals=signals, read=read
        )

    def tell(error: BaseException, placement: Placement, *, debug: bool) -> int:
        failure = error if isinstance(error, Exception) else DmnistError(type(error).__name__)
        kind, text = described(failure)
        (order.told / str(placement.rank)).write_bytes(pickle.dumps((kind, text)))
        return kind.exit_code

    return run_in_group(
        placement,
        listener,
        body,
        device=order.run.device,
        exact=order.recipe.sync == "tree",
        hang_after=order.run.hang_after,
        report_error=tell,
    )


def _nobody_reads() -> Dataset:
    raise AssertionError("rank 0 is handed the data")


def in_processes(
    nproc: int,
    recipe: Recipe,
    run: Run,
    title: str,
    verbose: bool,
    factory: Callable[[int], Any] | None,
    read: Callable[[Callable[[], bool]], Dataset],
) -> dict[str, Any]:
    """Train in `nproc` processes of our own launcher; what `result.json` says. Raises what they raised."""
    if factory is not None:
        _require_importable(recipe.model, factory)
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("nproc above 1 can only be asked for in the main thread, which is sent signals")
    recipe.check_size(nproc)
    out = run.out or layout.new_folder(title)
    run = dataclasses.replace(run, out=out)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if verbose:
            write_line(text)

    with tempfile.TemporaryDirectory() as told, prefetch.Prefetcher(read) as data:
        order = WorkerTask(recipe, run, title, verbose, Path(told))
        restarts = spawn.Restarts(
            run.max_restarts, partial(layout.newest_step, out), layout.resume_flags(out)
        )
        code = spawn.spawn(
            nproc, [spawn.Task(f"{__name__}:work", order, restarts, data.for_rank_zero, say)]
        )
        if code:
            raise _failure(code, said, Path(told))
    return json.loads((out / "result.json").read_text())


def _failure(code: int, said: list[str], told: Path) -> BaseException:
    """The error of a group that ended with `code`: a rank's own, or what the launcher said of it."""
    if code == 130:  # by a second Ctrl-C
        return KeyboardInterrupt()
    errors = [pickle.loads(path.read_bytes()) for path in sorted(told.iterdir())]
    own = next((kind(text) for kind, text in errors if kind.exit_code == code), None)
    if own is not None and not (said and isinstance(own, WorkerLost)):
        return own
    return WorkerLost(said[-1] if said else f"the processes ended with code {code}")


def _require_importable(name: str, factory: Callable[[int], Any]) -> None:
    """Raise `UsageError` for a function that other processes would not find."""
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute, None) if module != "__main__" else None
    if found is not factory:
        raise UsageError(
            f"the processes of nproc cannot import {name}: put it at the top level of a module of its own, "
            "not of the script or notebook, or leave nproc at 1"
        )


def console_for(verbose: bool) -> Console:
    """Where a run is told of: standard output, or nowhere."""
    return make_console() if verbose else Console(quiet=True, force_terminal=False)
