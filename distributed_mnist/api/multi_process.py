"""Train in several processes for `library.train`: start them, and raise their error here if they fail."""

import contextlib
import dataclasses
import json
import multiprocessing
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
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
from ..errors import CheckpointError, DmnistError, UsageError, WorkerLost, described, recreate, write_line
from ..launcher import spawn
from ..launcher.rank_process import run_in_group
from ..launcher.signals import StopSignals
from ..reporting.console import in_notebook, make_console
from ..runs import layout
from ..runs.run_files import read_result
from ..training import run as training
from ..user_code.functions import registered
from ..user_code.shipping import pack, unpack
from .events import EventFollower, OnEvent

STOPPED_AT_ONCE = 130
"""The exit code after a second Ctrl-C."""


@dataclass(frozen=True)
class WorkerTask:
    """What the launcher passes to each worker."""

    recipe: Recipe
    run: Run
    title: str
    verbose: bool
    in_notebook: bool
    """Whether the output of the workers is shown in a notebook."""
    functions: bytes
    """The user's own functions, see `user_code.shipping`."""
    error_folder: Path
    """Each rank that fails writes its error to a file here, named after the rank."""


def work(
    placement: Placement,
    listener: socket.socket | None,
    task: WorkerTask,
    prefetched: PrefetchedData | None = None,
) -> int:
    """Run one rank of a `train` with several processes. Returns its exit code.

    `prefetched` is the data set on rank 0, and None on the other ranks.
    """

    def body(world: World, signals: StopSignals) -> None:
        with registered(world.on_every_rank(lambda: unpack(task.functions))):
            training.run(
                world,
                task.recipe,
                task.run,
                title=task.title,
                console=console_for(task.verbose, task.in_notebook),
                signals=signals,
                read=prefetched.receive if prefetched else _refuse_to_read,
            )

    def save_error(error: BaseException, placement: Placement, *, debug: bool) -> int:
        if isinstance(error, KeyboardInterrupt):
            return STOPPED_AT_ONCE
        failure = error if isinstance(error, Exception) else DmnistError(type(error).__name__)
        description = described(failure)
        (task.error_folder / str(placement.rank)).write_text(json.dumps(description))
        return recreate(*description).exit_code

    return run_in_group(
        placement,
        listener,
        body,
        device=task.run.device,
        exact=task.recipe.sync == "tree",
        hang_after=task.run.hang_after,
        shared=task.run.oversubscribe,
        report_error=save_error,
    )


def _refuse_to_read() -> Dataset:
    raise AssertionError("only rank 0 reads the data, and the launcher passes it the data")


def train_in_processes(
    nproc: int,
    recipe: Recipe,
    run: Run,
    title: str,
    verbose: bool,
    functions: Mapping[str, Callable[..., Any]],
    read: Callable[[Callable[[], bool]], Dataset],
    on_event: OnEvent | None,
) -> dict[str, Any]:
    """Train in `nproc` processes started by our launcher. Returns the content of `result.json`.

    `functions` are the functions that the user passed, by name. `read(stopped)` loads the data set, see
    `Prefetcher`. `on_event` is called here with each event. Raises what it raises, the error that a process
    raised, or `WorkerLost` for one that died.
    """
    if multiprocessing.current_process().daemon:
        raise UsageError(
            "nproc above 1 does not work in a daemonic process, such as a worker of multiprocessing.Pool: "
            "use concurrent.futures.ProcessPoolExecutor, or leave nproc at 1"
        )
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("nproc above 1 works only in the main thread, which receives signals")
    recipe.check_size(nproc)
    packed = pack(functions)
    out = run.out or layout.new_folder(title)
    run = dataclasses.replace(run, out=out)
    messages: list[str] = []

    def record_message(text: str) -> None:
        messages.append(text)
        if verbose:
            write_line(text)

    with tempfile.TemporaryDirectory() as error_folder, prefetch.Prefetcher(read) as data:
        task = WorkerTask(recipe, run, title, verbose, in_notebook(), packed, Path(error_folder))
        restarts = spawn.Restarts(
            run.max_restarts, partial(layout.newest_step, out), layout.resume_flags(out)
        )
        follow = EventFollower(out / "metrics.jsonl", on_event or (lambda _: None))
        code = spawn.spawn(
            nproc,
            [spawn.Task(f"{__name__}:work", task, restarts, data.for_rank_zero, record_message, follow)],
        )
        follow()
        if follow.error is not None:
            raise follow.error
        if code:
            raise _make_error(code, messages, Path(error_folder))
    result = read_result(out)
    if result is None:
        raise CheckpointError(f"{out} has no result.json")
    return result


def _make_error(code: int, messages: list[str], error_folder: Path) -> BaseException:
    """The error to raise for a group that exited with `code`.

    It is the error of a rank with this exit code, or `WorkerLost` with the last of the launcher's
    `messages`, which say how a process was lost.
    """
    if code == STOPPED_AT_ONCE:
        return KeyboardInterrupt()
    saved: list[DmnistError] = []
    for path in sorted(error_folder.iterdir()):
        with contextlib.suppress(ValueError):  # a rank that was killed while it wrote
            saved.append(recreate(*json.loads(path.read_text())))
    error = next((error for error in saved if error.exit_code == code), None)
    if error is not None and not (messages and isinstance(error, WorkerLost)):
        return error
    return WorkerLost(messages[-1] if messages else f"the processes exited with code {code}")


def console_for(verbose: bool, rewrites_lines: bool = False) -> Console:
    """The console for progress output: standard output if `verbose`, otherwise nowhere."""
    return (
        make_console(rewrites_lines=rewrites_lines)
        if verbose
        else Console(quiet=True, force_terminal=False)
    )
