"""Run `dmnist verify --sync tree` on one host: train a small job at several sizes. `--chaos`: under faults.

The answer of every run must be the same, and the same as the known answer of this platform.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from ..distributed.devices import find_accelerator
from ..errors import Interrupted, UsageError
from ..launcher.default_nproc import default_nproc
from ..launcher.signals import SIGNALS, StoppedEarly, obeyed_signals
from .chaos import run_chaos
from .compare import Answer, compare
from .known_answers import report_known_answer, this_platform
from .results_table import ResultsTable
from .training_job import RunFailedError, options, recipe, run_without_faults

DEFAULT_MAX_NPROC = 4
DEFAULT_FAULTS = 8


def run(
    *,
    nproc: int | None,
    device: str,
    chaos: bool,
    faults: int | None,
    seed: int | None,
    sync: str | None,
    as_json: bool,
    **_: object,
) -> int:
    """Verify this host and return the exit code.

    If `sync` is "tree", train at several sizes and compare with the platform's known answer. With `chaos`,
    train under faults afterwards.

    Raises `VerificationError` if an answer differs, after the table has shown which one and how.
    """
    accelerator = find_accelerator(device)  # raises if there is not the one that `device` demands
    sizes = sizes_to_try(nproc, device)
    table = ResultsTable.make(as_json=as_json)
    with _signals_as_exceptions():
        with table.work_folder() as folder:
            reference = compare_sizes(sizes, device, folder, table) if sync else None
            if chaos and not table.problems:
                seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
                run_chaos(max(sizes), device, faults or DEFAULT_FAULTS, seed, folder, table)
            if reference is not None:
                report_known_answer(
                    reference.result, this_platform(accelerator or torch.device("cpu")), table
                )
        table.conclude()
    return 0


def sizes_to_try(nproc: int | None, device: str) -> list[int]:
    """Return the world sizes 1 to `nproc`; if `nproc` is 1, size 1 twice. Raises `UsageError`."""
    if nproc is None:
        useful = default_nproc(recipe(), options(device=device))
        least = 1 if find_accelerator(device) else 2
        nproc = max(least, min(useful, DEFAULT_MAX_NPROC))
    if nproc > recipe().shards:
        raise UsageError(f"--nproc must be between 1 and {recipe().shards}, not {nproc}")
    return list(range(1, nproc + 1)) if nproc > 1 else [1, 1]


def compare_sizes(sizes: list[int], device: str, folder: Path, table: ResultsTable) -> Answer | None:
    """Train at each of these sizes and compare every answer with the first.

    Returns the first answer, or None if the first run failed.
    """
    reference: Answer | None = None
    table.header("without faults")
    for number, size in enumerate(sizes, start=1):
        name = f"{size} process{'es' if size > 1 else ''}{', again' if size in sizes[: number - 1] else ''}"
        began, answer = time.monotonic(), None
        try:
            with table.busy(f"training with {name}"):
                answer = run_without_faults(folder / f"run-{number}", size, device)
        except RunFailedError as error:
            problem = str(error)
        else:
            problem = reference and compare(reference, answer)
        table.add(name, answer, time.monotonic() - began, problem, "same" if reference else "reference")
        if problem:
            table.problems.append(f"{name}{' against 1' if answer else ''}: {problem}")
        reference = reference or answer
        if reference is None:
            break
    return reference


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Turn signals into exceptions, so that the `with` blocks stop the running training first."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:  # a second Ctrl-C must not interrupt that cleanup
            signal.signal(other, signal.SIG_IGN)
        raise StoppedEarly(f"stopped by {signal.Signals(number).name} before it was verified")

    handlers = {number: signal.signal(number, stop) for number in obeyed_signals()}
    try:
        yield
    except StoppedEarly as early:
        raise Interrupted(str(early)) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
