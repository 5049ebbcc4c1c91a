"""`dmnist verify`: a small job with a known answer, at several sizes and under faults. Whoever brings up a
machine learns whether it computes what it should."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from ..errors import Interrupted, UsageError
from ..launcher.default_nproc import default_nproc
from ..launcher.signals import SIGNALS, StoppedEarly
from .chaos import soak
from .compare import Answer, compare
from .job import RunFailedError, options, recipe, undisturbed
from .known_answers import say_known, this_platform
from .results_table import ResultsTable, Row

MOST_BY_DEFAULT = 4
FAULTS_BY_DEFAULT = 8


def run(
    *, nproc: int | None, device: str, chaos: bool, faults: int | None, seed: int | None, as_json: bool
) -> int:
    """Verify this host. Raises `VerificationError` if the answer differs, after saying how."""
    sizes = sizes_to_try(nproc, device)
    board = ResultsTable.make(as_json=as_json)
    with _stoppable():
        with board.workplace() as folder:
            answer = several_sizes(sizes, device, folder, board)
            if answer is not None and chaos:
                seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
                soak(max(sizes), device, faults or FAULTS_BY_DEFAULT, seed, folder, board)
            if answer is not None:
                say_known(answer.result, this_platform(_device(device)), board)
        board.close()
    return 0


def sizes_to_try(nproc: int | None, device: str) -> list[int]:
    """1 to `nproc`; one size twice where there is no other. Raises `UsageError`."""
    if nproc is None:
        paying = default_nproc(recipe(), options(device=device))
        least = 2 if _device(device).type == "cpu" else 1
        nproc = max(least, min(paying, MOST_BY_DEFAULT))
    if nproc > recipe().shards:
        raise UsageError(f"--nproc must be between 1 and {recipe().shards}, not {nproc}")
    return list(range(1, nproc + 1)) if nproc > 1 else [1, 1]


def several_sizes(sizes: list[int], device: str, folder: Path, board: ResultsTable) -> Answer | None:
    """Train at these sizes, and compare with the first; its answer, or None if it did not end well."""
    reference: Answer | None = None
    board.head("undisturbed")
    for number, size in enumerate(sizes, start=1):
        name = f"{size} process{'es' if size > 1 else ''}{', again' if size in sizes[: number - 1] else ''}"
        began, answer = time.monotonic(), None
        try:
            with board.busy(f"training with {name}"):
                answer = undisturbed(folder / f"undisturbed-{number}", size, device)
        except RunFailedError as error:
            wrong = str(error)
        else:
            wrong = reference and compare(reference, answer)
        verdict = str(wrong or ("same" if reference else "reference"))
        sha256 = answer.sha256 if answer else None
        board.add(Row(name, not wrong, verdict, sha256, time.monotonic() - began))
        if wrong:
            board.wrong.append(f"{name}{' against 1' if answer else ''}: {wrong}")
        reference = reference or answer
        if reference is None:
            break
    return reference


def _device(device: str) -> torch.device:
    found = None if device == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Signals are errors here, so that whatever is under way is ended first."""

    def stop(number: int, frame: FrameType | None) -> None:
        for one in SIGNALS:  # what is under way is being ended; a second Ctrl-C must not interrupt that
            signal.signal(one, signal.SIG_IGN)
        raise StoppedEarly(f"stopped by {signal.Signals(number).name} before it was verified")

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except StoppedEarly as early:
        raise Interrupted(str(early)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
