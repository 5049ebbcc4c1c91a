"""Our own launcher: N processes on this host, looked after until all have ended, all started again when one
dies.

They are forked from one server process that has imported torch already, so N of them start in little
more time than one, and start again in much less. Rank 0 keeps the terminal; what the others print comes
out with their rank in front. No port is chosen in advance: the launcher opens a socket on a free one and
hands it to rank 0.
"""

import contextlib
import math
import multiprocessing
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
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from ..common.placement import Placement
from ..errors import Interrupted, tidy_terminal, write_line
from .exit_status import ExitStatus, explained
from .signals import OBEY_SECONDS, SIGNALS
from .worker import Target, print_with_rank, resolve, work

_GLANCE_SECONDS = 0.5  # between two looks at deadlines; an end is seen at once
GRACE_SECONDS = 2.0  # how long the others may take to end by themselves once one has failed


def say(text: str) -> None:
    """Tell a person what has happened to a group."""
    write_line(text)


@dataclass(frozen=True)
class Restarts:
    """When a group that lost a process is started again."""

    limit: int
    """At most so often in a row without getting further."""
    reached: Callable[[], int]
    """How far the work has got, as a number that grows; below zero: there is nothing to go on from."""
    resume_flags: str
    """The flags with which a person goes on."""


@dataclass(frozen=True)
class Task:
    """What a group of processes is for."""

    target: Target
    argument: Any
    restarts: Restarts | None = None
    """With them, the group is started again when a process dies."""
    hand: Callable[[], Any] | None = None
    """What it returns goes to each attempt's rank 0."""
    say: Callable[[str], None] = say
    """Told what happens to the processes."""


def start(placement: Placement | None, nproc: int | None, target: Target, argument: Any) -> int:
    """Run `target` here, if a launcher placed this process or one is enough, else in `nproc` processes."""
    if placement is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # kept, until it is there to obey them
    if placement is not None or nproc in (None, 1):
        return resolve(target)(placement or Placement(), None, argument)
    return spawn(nproc, [Task(target, argument)])


def warm_up(*targets: Target) -> None:
    """Start the server that workers are forked from, unless it runs already.

    It imports the modules of these targets, and torch with them, while this process does other things.
    """
    context = _context()
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([target.partition(":")[0] for target in targets])
        start_server()


def start_server() -> None:
    """Start multiprocessing's server, if there is none yet, so that its children are born with our signals
    blocked: a program that forks others from there must unblock them."""
    resource_tracker.ensure_running()  # it would unblock the signals when started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn(nproc: int, tasks: Sequence[Task]) -> int:
    """Do these works one after the other, each by a group of `nproc` processes, and return the exit code:
    that of the first which failed.

    SIGTERM, SIGINT and SIGUSR1 are passed on. If a process dies, the others get some time to notice, and
    are then ended.
    """
    stop = _Stop()
    # Signals are kept for later rather than lost: by us whenever there are no workers to pass them on to,
    # by those until they can obey, and by the server they are forked from for good, because a scheduler
    # signals a whole process group and the server must outlive the workers to tell how they ended.
    warm_up(*(work.target for work in tasks))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handlers = {number: signal.signal(number, stop.pass_on) for number in SIGNALS}
    try:
        for i, work in enumerate(tasks):
            if i and stop.asked():  # too late for the one before, which was done
                restarts = tasks[i - 1].restarts
                work.say(
                    "stopped before all was done"
                    + (f"; go on with {restarts.resume_flags}" if restarts else "")
                )
                return Interrupted.exit_code
            if (code := _until_done(nproc, work, stop)) != 0:
                return code
        return 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _until_done(nproc: int, work: Task, stop: "_Stop") -> int:
    """One group after the other, until one has done it or there is no sense in another."""
    starter, restarts = secrets.token_hex(8), work.restarts
    in_a_row, furthest = 0, restarts.reached() if restarts else 0
    while True:
        ending = _Group(nproc, work, starter, stop).run()
        if ending.lost is None:
            return ending.code
        tidy_terminal(sys.stdout, cursor=True)
        if restarts is None:
            work.say(ending.lost)
            return ending.code
        reached = restarts.reached()
        by_hand = f"go on with {restarts.resume_flags}" if reached >= 0 else "there is no checkpoint yet"
        if stop.asked():
            work.say(f"{ending.lost} while it was to stop; {by_hand}")
            return Interrupted.exit_code
        in_a_row = 1 if reached > furthest else in_a_row + 1
        furthest = max(furthest, reached)
        if in_a_row > restarts.limit:
            limit = f"(--max-restarts {restarts.limit})"
            often = f"; failure {in_a_row} in a row without a checkpoint {limit}" if in_a_row > 1 else ""
            work.say(f"{ending.lost}{often}; {by_hand}")
            return ending.code
        often = f" (restart {in_a_row} of {restarts.limit} without a new one)" if in_a_row > 1 else ""
        start = "the last checkpoint" if reached >= 0 else "the beginning"
        work.say(f"{ending.lost}; starting again from {start}{often}")


class _Stop:
    """Whether this process was asked to stop, and the workers to whom that is passed on."""

    def __init__(self) -> None:
        self._workers: list[BaseProcess] = []
        self._passed: int | None = None
        self.at_once = False
        """By a second Ctrl-C."""
        self._interrupted = False
        self.deadline: float | None = None
        """When they should have obeyed."""

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.deadline = self.deadline or time.monotonic() + OBEY_SECONDS + GRACE_SECONDS
        if number == signal.SIGINT and self._interrupted:
            self.at_once, self.deadline = True, time.monotonic() + _GLANCE_SECONDS
        self._interrupted |= number == signal.SIGINT
        # A terminal sends Ctrl-C to the workers too, and a second one means something else to them.
        self._passed = signal.SIGTERM if number == signal.SIGINT else number
        self._tell()

    def take(self, workers: list[BaseProcess]) -> None:
        """Pass on to these from now on, and what has come already: blocking a signal keeps it for later in
        this thread only, and libraries have threads of their own."""
        self._workers = workers
        if self._passed is not None:
            self._tell()

    def _tell(self) -> None:
        for worker in self._workers:
            if worker.is_alive() and worker.pid:
                os.kill(worker.pid, self._passed or signal.SIGTERM)

    def asked(self) -> bool:
        """Also by a signal that has come while they are blocked."""
        return self.deadline is not None or not signal.sigpending().isdisjoint(SIGNALS)


class _Group:
    """One attempt: `nproc` processes from their start to their ends."""

    def __init__(self, nproc: int, work: Task, starter: str, stop: _Stop) -> None:
        self._nproc, self._work, self._starter, self._stop = nproc, work, starter, stop
        self._workers: list[BaseProcess] = []
        self._printers: list[threading.Thread] = []

    def run(self) -> ExitStatus:
        """Start the processes and wait for their ends. Signals are blocked before and after."""
        context = _context()
        alive_read, alive_write = context.Pipe(duplex=False)
        with socket.create_server(("127.0.0.1", 0)) as listener, alive_read:
            for rank in range(self._nproc):
                self._start(context, rank, listener, alive_read)
        for printer in self._printers:
            printer.start()
        self._stop.take(self._workers)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        ending = self._look_after()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        alive_write.close()
        for printer in self._printers:
            printer.join(timeout=1)
        return ending

    def _start(self, context: Any, rank: int, listener: socket.socket, alive: Any) -> None:
        placement = Placement(
            rank=rank,
            size=self._nproc,
            local_rank=rank,
            local_size=self._nproc,
            ports=(listener.getsockname()[1],),
            starter=self._starter,
            launcher="spawned",
        )
        output = None
        if rank > 0:
            reader, output = context.Pipe(duplex=False)
            self._printers.append(
                threading.Thread(target=print_with_rank, args=(reader, rank), daemon=True)
            )
        own = listener if rank == 0 else None
        handed = self._work.hand() if self._work.hand is not None and rank == 0 else None
        arguments = (self._work.target, placement, own, output, alive, self._work.argument, handed)
        worker = context.Process(target=work, args=arguments, name=f"rank {rank}")
        with _main_hidden():
            worker.start()
        if output is not None:
            output.close()
        self._workers.append(worker)

    def _look_after(self) -> ExitStatus:
        """Wait for all workers: 0, or the code of the failure that the others followed from."""
        failed: list[tuple[int, BaseProcess]] = []  # in the order of their ends
        deadline = math.inf
        overdue: set[int] = set()
        running = dict(enumerate(self._workers))
        while running:
            ended = wait([worker.sentinel for worker in running.values()], _GLANCE_SECONDS)
            for rank, worker in list(running.items()):
                if worker.sentinel in ended:
                    worker.join()
                    del running[rank]
                    if worker.exitcode != 0 and rank not in overdue:
                        failed.append((rank, worker))
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() >= min(deadline, self._stop.deadline or math.inf):
                overdue.update(running)
                for worker in running.values():
                    worker.kill()
        if overdue and self._stop.at_once:
            tidy_terminal(sys.stdout, cursor=True)
            self._work.say("stopped at once; nothing saved since the last checkpoint")
            return ExitStatus(130)
        if overdue and not failed:
            tidy_terminal(sys.stdout, cursor=True)
            self._work.say(f"rank {', '.join(map(str, sorted(overdue)))} did not obey, and was ended")
            return ExitStatus(Interrupted.exit_code)
        return explained(failed) if failed else ExitStatus(0)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Workers need nothing of the program that starts them: without this, multiprocessing would run its
    main file again in each, and a script that trains at its top level would train in all of them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _context() -> Any:
    """Processes forked from a server that has imported torch; fresh interpreters where none can be."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("forkserver")
