"""Our own launcher: start N processes on this host, wait for them, and restart all when one dies.

All are forked from one server process that has already imported torch. So N processes start in little more
time than one, and restart much faster. Rank 0 keeps the terminal and inherits a listening socket on a free
port. The output of the other ranks gets their rank in front. A secret that all inherit keeps others out.
"""

import contextlib
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from ..common import environment
from ..common.placement import Placement
from ..distributed import network
from ..errors import Interrupted, LaunchError, tidy_terminal, write_line
from .exit_status import ExitStatus, group_exit_status
from .fork_server import cannot_start, make_context, warm_up
from .signals import OBEY_SECONDS, SIGNALS, obeyed_signals
from .worker import FINISHED, Target, print_with_rank, resolve, run_worker

_POLL_SECONDS = 0.5  # between two checks of the deadlines; the end of a process is noticed at once
GRACE_SECONDS = 2.0  # how long the other processes may take to end by themselves after one has failed


@dataclass(frozen=True)
class Restarts:
    """When to restart a group that lost a process."""

    limit: int
    """The most restarts in a row without progress."""
    progress: Callable[[], int]
    """Returns a number that grows as the work proceeds; below zero if there is no checkpoint."""
    resume_flags: str
    """The flags with which a user resumes the work."""


@dataclass(frozen=True)
class Task:
    """The work of one group of processes."""

    target: Target
    argument: Any
    restarts: Restarts | None = None
    """When to restart the group if a process dies; None: never."""
    rank_zero_argument: Callable[[], Any] | None = None
    """Called once per attempt; its result is one more argument of rank 0's target."""
    report: Callable[[str], object] = write_line
    """Called with a message when something happens to the processes."""
    watch: Callable[[], bool] = lambda: True
    """Called twice per second while the processes run. They are asked to stop if it returns False."""


def start(placement: Placement | None, nproc: int | None, target: Target, argument: Any) -> int:
    """Run `target` here under another launcher or as one process, else in `nproc`; its exit code."""
    if placement is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # stay pending until the handlers are installed
    if placement is not None or nproc in (None, 1):
        return resolve(target)(placement or Placement(), None, argument)
    return spawn(nproc, [Task(target, argument)])


def spawn(nproc: int, tasks: Sequence[Task]) -> int:
    """Run these tasks one after another, each in a group of `nproc` processes.

    Return 0, or the exit code of the first task that failed. Signals that ask to stop are forwarded to the
    workers. If a process dies, the others have `GRACE_SECONDS` to notice it, and are then killed.
    """
    stop = _StopRequest()
    # Blocked signals stay pending and are not lost. This process blocks them while it has no workers, a
    # worker until it has installed its handlers, and the server that forks the workers always: a scheduler
    # signals the whole process group, and the server must outlive the workers to report their exit codes.
    warm_up(*(task.target for task in tasks))
    if nproc > 1 and (names := environment.thread_binding()):
        tasks[0].report(f"{' and '.join(names)} not used: all processes would be bound to one core")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handlers = {number: signal.signal(number, stop.on_signal) for number in obeyed_signals()}
    try:
        for i, task in enumerate(tasks):
            if i and stop.requested():  # the signal came when the previous task was already done
                restarts = tasks[i - 1].restarts
                advice = f"; resume with {restarts.resume_flags}" if restarts else ""
                task.report(f"stopped before all was done{advice}")
                return Interrupted.exit_code
            if (code := _run_with_restarts(nproc, task, stop)) != 0:
                return code
        return 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run_with_restarts(nproc: int, task: Task, stop: "_StopRequest") -> int:
    """Run one group after another until the task is done or `Restarts` allows no more; return exit code."""
    launcher_id, restarts = secrets.token_hex(8), task.restarts
    failures, best_progress = 0, restarts.progress() if restarts else 0
    while True:
        status = _Group(nproc, task, launcher_id, stop).run()
        if status.lost is None:
            return status.code
        tidy_terminal(sys.stdout, cursor=True)
        if restarts is None:
            task.report(status.lost)
            return status.code
        progress = restarts.progress()
        advice = f"resume with {restarts.resume_flags}" if progress >= 0 else "there is no checkpoint yet"
        if stop.requested():
            task.report(f"{status.lost} while the run was stopping; {advice}")
            return Interrupted.exit_code
        failures = 1 if progress > best_progress else failures + 1
        best_progress = max(best_progress, progress)
        if failures > restarts.limit:
            limit = f"(--max-restarts {restarts.limit})"
            count = f"; failure {failures} in a row without a checkpoint {limit}" if failures > 1 else ""
            task.report(f"{status.lost}{count}; {advice}")
            return status.code
        count = f" (restart {failures} of {restarts.limit} without a new one)" if failures > 1 else ""
        start = "the last checkpoint" if progress >= 0 else "the beginning"
        task.report(f"{status.lost}; restarting from {start}{count}")


class _StopRequest:
    """Whether a signal asked this process to stop, and the workers to which it is forwarded."""

    def __init__(self) -> None:
        self._workers: list[BaseProcess] = []
        self._forwarded: int | None = None
        self.at_once = False
        """Whether Ctrl-C was pressed a second time."""
        self._interrupted = False
        self.deadline: float | None = None
        """When the workers must have stopped."""

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: set the deadline, and forward it."""
        self.deadline = self.deadline or time.monotonic() + OBEY_SECONDS + GRACE_SECONDS
        if number == signal.SIGINT and self._interrupted:
            self.at_once, self.deadline = True, time.monotonic() + _POLL_SECONDS
        self._interrupted |= number == signal.SIGINT
        # Not as SIGINT: a terminal sends Ctrl-C to the workers too, and they would count two.
        self._forwarded = signal.SIGTERM if number == signal.SIGINT else number
        self._forward()

    def forward_to(self, workers: list[BaseProcess]) -> None:
        """Forward signals to these workers from now on, and the latest one if it has already come.

        A signal may arrive even though it is blocked, because blocking is per thread and libraries have
        their own threads.
        """
        self._workers = workers
        self._forward()

    def _forward(self) -> None:
        for worker in self._workers:
            if self._forwarded is not None and worker.is_alive() and worker.pid:
                os.kill(worker.pid, self._forwarded)

    def requested(self) -> bool:
        """Return whether a signal has come, including one that is blocked and pending."""
        return self.deadline is not None or not signal.sigpending().isdisjoint(obeyed_signals())


class _Group:
    """One attempt at a task: `nproc` processes, from start to exit."""

    def __init__(self, nproc: int, task: Task, launcher_id: str, stop: _StopRequest) -> None:
        self._nproc, self._task, self._launcher_id, self._stop = nproc, task, launcher_id, stop
        self._workers: list[BaseProcess] = []
        self._printers: list[threading.Thread] = []
        self._secret = secrets.token_bytes(32)

    def run(self) -> ExitStatus:
        """Start the processes and wait until all have ended. Signals are blocked before and after."""
        context = make_context()
        alive_read, alive_write = context.Pipe(duplex=False)
        with network.open_listener(network.LOOPBACK) as listener, alive_read:
            try:
                for rank in range(self._nproc):
                    self._start(context, rank, listener, alive_read)
            except LaunchError:  # too few processes, files or memory
                for worker in self._workers:
                    worker.kill()
                raise
        for printer in self._printers:
            printer.start()
        self._stop.forward_to(self._workers)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        status = self._wait_for_workers()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        alive_write.close()
        for printer in self._printers:
            printer.join(timeout=1)
        return status

    def _start(self, context: Any, rank: int, listener: socket.socket, alive: Any) -> None:
        placement = Placement(
            rank=rank,
            size=self._nproc,
            local_rank=rank,
            local_size=self._nproc,
            ports=(listener.getsockname()[1],),
            launcher_id=self._launcher_id,
            launcher_pid=os.getpid(),
            launcher="spawned",
            secret=self._secret,
        )
        output = None
        if rank > 0:
            reader, output = context.Pipe(duplex=False)
            self._printers.append(
                threading.Thread(target=print_with_rank, args=(reader, rank), daemon=True)
            )
        task = self._task
        mine = listener if rank == 0 else None
        more = task.rank_zero_argument() if task.rank_zero_argument is not None and rank == 0 else None
        arguments = (task.target, placement, mine, output, alive, task.argument, more)
        worker = context.Process(target=run_worker, args=arguments, name=f"rank {rank}")
        with _without_main_module(), environment.for_workers():
            try:
                worker.start()
            except (OSError, EOFError) as error:
                raise cannot_start(error) from None
        if output is not None:
            output.close()
        self._workers.append(worker)

    def _wait_for_workers(self) -> ExitStatus:
        """Wait until all workers have ended; kill those that are overdue."""
        failed: list[tuple[int, BaseProcess]] = []  # in the order in which they ended
        deadline = math.inf
        overdue: set[int] = set()
        running = dict(enumerate(self._workers))
        while running:
            ended = wait([worker.sentinel for worker in running.values()], _POLL_SECONDS)
            if not self._task.watch() and not self._stop.requested():
                self._stop.on_signal(signal.SIGTERM, None)
            for rank, worker in list(running.items()):
                if worker.sentinel in ended:
                    worker.join()
                    del running[rank]
                    if worker.exitcode != FINISHED and rank not in overdue:
                        failed.append((rank, worker))
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() >= min(deadline, self._stop.deadline or math.inf):
                overdue.update(running)
                for worker in running.values():
                    worker.kill()
        if overdue and self._stop.at_once:
            tidy_terminal(sys.stdout, cursor=True)
            self._task.report("stopped at once; nothing saved since the last checkpoint")
            return ExitStatus(130)
        if overdue and not failed:
            tidy_terminal(sys.stdout, cursor=True)
            ranks = ", ".join(map(str, sorted(overdue)))
            self._task.report(f"rank {ranks} did not stop in time: killed")
            return ExitStatus(Interrupted.exit_code)
        return group_exit_status(failed) if failed else ExitStatus(0)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep multiprocessing from running the main file of this program again in each worker.

    Workers do not need that file, and a script that trains at its top level would train in each worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
