"""Combine the exit codes of a group's processes into one exit status: that of the first cause."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

from ..errors import Interrupted, WorkerLost

_UNKNOWN = 255  # multiprocessing's exit code of a process whose real one is not known any more


@dataclass(frozen=True)
class ExitStatus:
    """How a group ended."""

    code: int
    lost: str | None = None
    """What happened, if the group lost a process."""


def group_exit_status(failed: Sequence[tuple[int, BaseProcess]]) -> ExitStatus:
    """Return the failure that caused the others. `failed` has (rank, process) in the order they ended.

    The cause is a process that was ended by a signal or left with 0 before its work was finished, otherwise
    one that failed by itself. Processes that lost a peer or were interrupted are consequences.
    """
    for rank, worker in failed:
        if worker.exitcode is not None and worker.exitcode < 0:
            name = _signal_name(-worker.exitcode)
            hint = " (out of memory, or by hand)" if name == "SIGKILL" else ""
            return ExitStatus(
                WorkerLost.exit_code, f"rank {rank} (pid {worker.pid}) was ended by {name}{hint}"
            )
        if worker.exitcode == 0:
            return ExitStatus(
                WorkerLost.exit_code,
                f"rank {rank} (pid {worker.pid}) ended itself before its work was finished (the model or a "
                "library has called exit)",
            )
    codes = [worker.exitcode or 0 for _, worker in failed]
    if _UNKNOWN in codes:
        return ExitStatus(WorkerLost.exit_code, "the server that forks the processes was ended")
    own_errors = [code for code in codes if code not in (WorkerLost.exit_code, Interrupted.exit_code)]
    if own_errors:
        return ExitStatus(own_errors[0])
    if Interrupted.exit_code in codes:
        return ExitStatus(Interrupted.exit_code)
    return ExitStatus(WorkerLost.exit_code, "the group lost a process")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
