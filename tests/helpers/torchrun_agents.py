"""torchrun in tests: how it is started, and a program that ends with all that it started."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from ranks import PATIENCE, TORCHRUN, Program

ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it agents of torch 2.13 cannot take another one in: see docs/explanation/faults.md."""
_MARK = "DMNIST_TEST_PROGRAM"
_COUNT = itertools.count(1)
# A group forms again seconds after it broke, not the better part of a minute: docs/explanation/faults.md.
_QUICK = (
    "keep_alive_interval=1,keep_alive_max_attempt=4,last_call_timeout=1,join_timeout=60,read_timeout=20"
)


def torchrun(
    endpoint: str, nnodes: object, *more: object, serves: bool | None = None
) -> tuple[object, ...]:
    """One agent with one worker; the program's own words come after. `serves`: they meet at this agent."""
    meet = _QUICK if serves is None else f"{_QUICK},is_host={serves}"
    group = ("--nnodes", nnodes, "--nproc-per-node", 1, "--max-restarts", 9, "--monitor-interval", 0.1)
    where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", meet)
    return (*TORCHRUN, *group, *where, *more, "-m", "distributed_mnist")


class Whole(Program):
    """A program under way that is ended with everything it started. torchrun's workers are in sessions of
    their own, and outlive it for a moment when it is killed."""

    def __init__(self, command: Sequence[object], *, cwd: Path | None = None, **variables: str) -> None:
        self._mark = f"{os.getpid()}-{next(_COUNT)}"
        super().__init__(command, cwd=cwd, **{**variables, _MARK: self._mark})

    def __exit__(self, *reason: object) -> None:
        self.signal(signal.SIGKILL, group=True)
        super().__exit__(*reason)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the program, or to it and all it started."""
        if not group:
            super().signal(number)
        for process in self.processes() if group else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def processes(self) -> Iterator[psutil.Process]:
        """What is left of the program: itself, its workers, theirs, orphans too."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def gone(self, pid: int | None = None) -> None:
        """Wait until nothing is left of it, or of that process of it. It need not be reaped."""
        deadline = time.monotonic() + PATIENCE
        while left := [process for process in self.processes() if pid in (None, process.pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)  # looking at all processes takes a while
