"""Run `dmnist verify --chaos`: train the same job under random faults and compare every answer.

Each run under faults must give the same answer as the run without faults. The seed decides the faults.
"""

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from ...distributed.devices import find_accelerator
from ...errors import Interrupted, UsageError
from ...launcher.default_nproc import default_nproc
from ...launcher.signals import SIGNALS, StoppedEarly, obeyed_signals
from ..results_table import ResultsTable
from .compare import Answer, compare
from .faults import FAULTS
from .run_with_faults import LONGER_JOB, FaultyRun, RunEndedError
from .training_job import RunFailedError, options, recipe, run_without_faults

DEFAULT_FAULTS = 8
_DEFAULT_MAX_NPROC = 4
_MAX_FAULTS_PER_RUN = 6
_MAX_FAILURES = 5
_MAX_RUNS_WITHOUT_FAULT = 10  # in a row, each of which ended before its first fault


@dataclass(frozen=True)
class InjectedFault:
    """A fault that was injected. The fields are those of `chaos.blows` in `--json`."""

    kind: str
    what: str
    recovery: float | None
    """Seconds from the fault to the first new steps; None if no steps were left."""


@dataclass
class ChaosRun:
    """The faults and the result of one run under faults."""

    name: str
    sizes: list[int] = field(default_factory=list)
    """The world size of each start of the command."""
    faults: list[InjectedFault] = field(default_factory=list)
    answer: Answer | None = None
    problem: str | None = None


def run(
    *, nproc: int | None, device: str, faults: int | None, seed: int | None, as_json: bool, **_: object
) -> int:
    """Train under faults with up to `nproc` processes, and return the exit code.

    Raises `VerificationError` if an answer differs, after the table has shown which one and how.
    """
    find_accelerator(device)  # raises if there is not the one that `device` demands
    size, table = largest_size(nproc, device), ResultsTable.make(as_json=as_json)
    seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    with _signals_as_exceptions():
        with table.work_folder() as folder:
            run_chaos(size, device, faults or DEFAULT_FAULTS, seed, folder, table)
        table.conclude()
    return 0


def largest_size(nproc: int | None, device: str) -> int:
    """Return the largest number of processes: `nproc`, or from 2 to 4. Raises `UsageError`."""
    if nproc is None:
        useful = default_nproc(recipe(), options(device=device))
        nproc = max(1 if find_accelerator(device) else 2, min(useful, _DEFAULT_MAX_NPROC))
    if nproc > recipe().shards:
        raise UsageError(f"--nproc must be between 1 and {recipe().shards}, not {nproc}")
    return nproc


def run_chaos(
    max_nproc: int, device: str, fault_count: int, seed: int, folder: Path, table: ResultsTable
) -> None:
    """Run the job at 1 to `max_nproc` processes until `fault_count` faults have been injected in all.

    `seed` decides the faults and the sizes. Problems go into `table`.
    """
    table.print_line(
        f"\nchaos     {fault_count} fault{'s' if fault_count > 1 else ''}, --seed {seed}", "bold"
    )
    began = time.monotonic()
    with table.busy("a run without faults"):
        try:
            reference = run_without_faults(folder / "chaos-reference", 1, device, *LONGER_JOB)
        except RunFailedError as error:
            table.problems.append(f"chaos, before any fault: {error}")
            return
    table.header("under faults")
    seconds = time.monotonic() - began
    table.add("a longer job, without faults", reference.sha256, seconds, None, "reference")
    kinds = _fault_kinds(Random(seed))
    faults: list[InjectedFault] = []
    number = failures = runs_without_fault = 0
    while (
        len(faults) < fault_count
        and failures < _MAX_FAILURES
        and runs_without_fault < _MAX_RUNS_WITHOUT_FAULT
    ):
        number += 1
        began, rng = time.monotonic(), Random(f"{seed}/{number}")
        start = partial(FaultyRun, folder / f"chaos-{number}", max_nproc, device, rng)
        with table.busy(f"run {number}, {len(faults)} of {fault_count} faults so far"):
            chaos_run = _run_once(f"run {number}", start, kinds, fault_count - len(faults), reference)
        faults += chaos_run.faults
        failures += chaos_run.problem is not None
        runs_without_fault = 0 if chaos_run.faults else runs_without_fault + 1
        _show_run(chaos_run, seed, time.monotonic() - began, table)
    if runs_without_fault == _MAX_RUNS_WITHOUT_FAULT:
        table.problems.append(f"chaos: {runs_without_fault} runs in a row ended before the first fault")
    table.json_fields["chaos"] = _summary(faults, number, failures, seed)
    _show_summary(table)


def _run_once(
    name: str, start: Callable[[], FaultyRun], kinds: Iterator[str], max_faults: int, reference: Answer
) -> ChaosRun:
    chaos_run = ChaosRun(name)
    try:
        with start() as run:
            chaos_run.sizes = run.sizes
            fault_count = min(max_faults, run.rng.randint(1, _MAX_FAULTS_PER_RUN))
            for _, kind in zip(range(fault_count), kinds, strict=False):
                if fault := _inject(run, kind):
                    chaos_run.faults.append(fault)
            chaos_run.answer = run.answer()
            if difference := compare(reference, chaos_run.answer):
                chaos_run.problem = str(difference)
    except RunFailedError as error:
        chaos_run.problem = str(error)
    return chaos_run


def _inject(run: FaultyRun, kind: str) -> InjectedFault | None:
    """Inject a fault at a random moment and wait until the run has recovered.

    Returns None if the run ended before that. Raises `RunFailedError` if it does not recover.
    """
    try:
        if kind != "kill at start-up" or run.has_trained():
            run.wait_for_random_moment()
        what = FAULTS[kind](run)
        return InjectedFault(kind, what, run.recovery_seconds())
    except RunEndedError:
        return None
    except RunFailedError as error:
        raise RunFailedError(f"{kind}: {error}") from error


def _fault_kinds(rng: Random) -> Iterator[str]:
    """Yield kinds of faults forever, each kind once per round, so that even a few faults are varied."""
    while True:
        yield from rng.sample(list(FAULTS), len(FAULTS))


def _show_run(chaos_run: ChaosRun, seed: int, seconds: float, table: ResultsTable) -> None:
    sizes = " → ".join(map(str, chaos_run.sizes))
    kinds = ", ".join(fault.kind for fault in chaos_run.faults)
    after = f" after {kinds}" if kinds else ""
    name = f"{chaos_run.name}, size {sizes}"
    sha256 = chaos_run.answer and chaos_run.answer.sha256
    table.add(name, sha256, seconds, chaos_run.problem, f"same{after}")
    if chaos_run.problem:
        table.problems.append(f"chaos, --seed {seed}, {name}{after}: {chaos_run.problem}")


def _summary(faults: list[InjectedFault], runs: int, failures: int, seed: int) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for kind in (*FAULTS, "all"):
        of_kind = [fault for fault in faults if kind in (fault.kind, "all")]
        seconds = [fault.recovery for fault in of_kind if fault.recovery is not None]
        kinds[kind] = {
            "count": len(of_kind),
            "median_seconds": statistics.median(seconds) if seconds else None,
            "worst_seconds": max(seconds, default=None),
        }
    return {
        "seed": seed,
        "runs": runs,
        "faults": len(faults),
        "failures": failures,
        "kinds": kinds,
        "blows": [asdict(fault) for fault in faults],
    }


def _show_summary(table: ResultsTable) -> None:
    chaos = table.json_fields["chaos"]
    totals = ", ".join(f"{chaos[name]} {name}" for name in ("faults", "runs", "failures"))
    table.print_line(f"\n  {totals:<36} {'count':>5} {'median s':>9} {'worst s':>9}  to recover", "bold")
    for kind, figures in chaos["kinds"].items():
        if not figures["count"]:
            continue
        median, worst = (
            "-" if figures[name] is None else f"{figures[name]:.1f}"
            for name in ("median_seconds", "worst_seconds")
        )
        table.print_line(f"  {kind:<36} {figures['count']:>5} {median:>9} {worst:>9}")


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
