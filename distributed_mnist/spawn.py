"""Our own launcher: N processes on this host, looked after until all have ended.

They are forked from one server process that has imported torch already, so N of them start in little
more time than one. Rank 0 keeps the terminal; what the others print comes out with their rank in front.
No port is chosen in advance: the launcher opens a socket on a free one and hands it to rank 0.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from .errors import Interrupted, WorkerLost
from .placement import Placement
from .signals import SIGNALS

Target = str
"""`module:function`, so that this process need not import what only the others need. The function is called
as `function(placement, listener, argument)` and returns the process's exit code."""

GRACE_SECONDS = 10.0  # how long the others may take to end by themselves once one has failed


def start(placement: Placement | None, nproc: int | None, target: Target, argument: Any) -> int:
    """Run `target` here, if a launcher placed this process or one is enough, else in `nproc` processes."""
    if placement is not None or nproc in (None, 1):
        return _resolve(target)(placement or Placement(), None, argument)
    return spawn(nproc, target, argument)


def spawn(nproc: int, target: Target, argument: Any) -> int:
    """Run `target` in `nproc` processes and return the group's exit code.

    SIGTERM, SIGINT and SIGUSR1 are passed on. If a process dies, the others get some time to notice, and
    are then ended.
    """
    context = _context()
    # Kept for later rather than lost: by us until the workers exist, by them until they can obey, and by
    # the server they are forked from for good, because a scheduler signals a whole process group and the
    # server must outlive the workers to tell how they ended.
    resource_tracker.ensure_running()  # would unblock them when started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    listener = socket.create_server(("127.0.0.1", 0))
    workers: list[BaseProcess] = []
    alive_read, alive_write = context.Pipe(duplex=False)
    printers: list[threading.Thread] = []
    for rank in range(nproc):
        placement = Placement(
            rank=rank,
            size=nproc,
            local_rank=rank,
            local_size=nproc,
            ports=(listener.getsockname()[1],),
            launcher="spawned",
        )
        output: Connection | None = None
        if rank > 0:
            reader, output = context.Pipe(duplex=False)
            printers.append(threading.Thread(target=_print_with_rank, args=(reader, rank), daemon=True))
        own = listener if rank == 0 else None
        worker = context.Process(target=_work, args=(target, placement, own, output, alive_read, argument))
        worker.start()
        if output is not None:
            output.close()
        workers.append(worker)
    listener.close()
    alive_read.close()
    for printer in printers:
        printer.start()
    with _signals_passed_on(workers):
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = _look_after(workers)
    alive_write.close()
    for printer in printers:
        printer.join(timeout=1)
    return code


def _context() -> Any:
    """Processes forked from a server that has imported torch; fresh interpreters where none can be."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_mnist.preload"])
    return context


def _work(
    target: Target,
    placement: Placement,
    listener: socket.socket | None,
    output: Connection | None,
    alive: Connection,
    argument: Any,
) -> None:
    """Runs in the worker."""
    threading.Thread(target=_end_with_launcher, args=(alive,), daemon=True).start()
    if output is not None:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code = _resolve(target)(placement, listener, argument)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process that failed must not wait in a finaliser for a peer that is gone


def _resolve(target: Target) -> Callable[..., int]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _end_with_launcher(alive: Connection) -> None:
    """The launcher holds the other end of this pipe: when it dies, however it dies, so do we."""
    with contextlib.suppress(OSError, EOFError):
        alive.poll(None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(WorkerLost.exit_code)


def _print_with_rank(reader: Connection, rank: int) -> None:
    with os.fdopen(os.dup(reader.fileno()), "r", errors="replace") as lines:
        for line in lines:
            sys.stderr.write(f"[rank {rank}] {line.rstrip()}\n")
            sys.stderr.flush()


@contextlib.contextmanager
def _signals_passed_on(workers: list[BaseProcess]) -> Any:
    def pass_on(number: int, frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to the workers too, and a second one means something else to them.
        passed = signal.SIGTERM if number == signal.SIGINT else number
        for worker in workers:
            if worker.is_alive() and worker.pid:
                os.kill(worker.pid, passed)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _look_after(workers: list[BaseProcess]) -> int:
    """Wait for all workers. The exit code: 0, or that of the failure that the others followed from."""
    failed: list[tuple[int, BaseProcess]] = []  # in the order of their ends
    deadline: float | None = None
    overdue = False
    running = dict(enumerate(workers))
    while running:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = wait([worker.sentinel for worker in running.values()], timeout)
        for rank, worker in list(running.items()):
            if worker.sentinel in ended:
                worker.join()
                del running[rank]
                if worker.exitcode != 0 and not overdue:
                    failed.append((rank, worker))
                    deadline = deadline or time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() >= deadline:
            overdue = True
            for worker in running.values():
                worker.kill()
    if not failed:
        return 0
    return _explain(failed)


def _explain(failed: list[tuple[int, BaseProcess]]) -> int:
    """Say what became of a process that could not say so itself; the group's exit code."""
    for rank, worker in failed:
        if worker.exitcode is not None and worker.exitcode < 0:
            name = signal.Signals(-worker.exitcode).name
            hint = " (out of memory, or by hand)" if name == "SIGKILL" else ""
            _say(f"rank {rank} (pid {worker.pid}) was ended by {name}{hint}")
            return WorkerLost.exit_code
    codes = [worker.exitcode or 0 for _, worker in failed]
    told = [code for code in codes if code != WorkerLost.exit_code]
    if not told:
        _say(f"rank {failed[0][0]} lost the other processes, which had not ended")
    own = [code for code in told if code != Interrupted.exit_code]
    return (own or codes)[0]


def _say(text: str) -> None:
    sys.stderr.write(f"dmnist: {text}; a run goes on from its last checkpoint with --resume auto\n")
    sys.stderr.flush()
