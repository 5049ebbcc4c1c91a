"""The ends of a group's processes, made one: what happened first, and what the others followed from."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

from ..errors import Interrupted, WorkerLost

_UNKNOWN = 255  # what multiprocessing gives for a process whose end nobody can tell any more


@dataclass(frozen=True)
class ExitStatus:
    """How a group ended."""

    code: int
    lost: str | None = None
    """What happened, if it lost a process."""


def explained(failed: Sequence[tuple[int, BaseProcess]]) -> ExitStatus:
    """The cause among a group's failures: a process ended by a signal, or an error of its own."""
    for rank, worker in failed:
        if worker.exitcode is not None and worker.exitcode < 0:
            name = _signal_name(-worker.exitcode)
            hint = " (out of memory, or by hand)" if name == "SIGKILL" else ""
            return ExitStatus(
                WorkerLost.exit_code, f"rank {rank} (pid {worker.pid}) was ended by {name}{hint}"
            )
    codes = [worker.exitcode or 0 for _, worker in failed]
    if _UNKNOWN in codes:
        return ExitStatus(WorkerLost.exit_code, "the server that the processes are forked from was ended")
    own = [code for code in codes if code not in (WorkerLost.exit_code, Interrupted.exit_code)]
    if own:
        return ExitStatus(own[0])
    if Interrupted.exit_code in codes:
        return ExitStatus(Interrupted.exit_code)
    return ExitStatus(WorkerLost.exit_code, "the group fell apart")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
