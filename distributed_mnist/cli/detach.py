"""`dmnist train --detach`: the run goes on in a session of its own, and its terminal may close."""

import contextlib
import os
import shlex
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.text import Text

from ..errors import OutputError, UsageError, WorkerLost, reason
from ..launcher.signals import OBEY_SECONDS, StoppedEarly
from ..reporting.console import make_console, print_json, print_labelled
from ..reporting.watch import Tail
from ..runs.lock import holder_of

_POLL_SECONDS = 0.1


def detach(folder: Path, first: Path, *, as_json: bool) -> int | None:
    """Fork. Return None in the process that is to run in the background, and here the exit code.

    Here it returns when the run has started or failed. `folder` is that of the run or ensemble, and `first`
    that of the run, or of the ensemble's first member. Raises `OutputError` if the log cannot be written.
    """
    name = f"output-{datetime.now(UTC):%Y%m%d-%H%M%S}.log"
    log = folder.parent / f".{folder.name}-{name}"  # the run makes its folder itself, when all is checked
    tail = Tail(first)
    with contextlib.suppress(UsageError):
        tail.new_events()  # of earlier starts
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        _require_room(descriptor, log)
    except OSError as error:
        raise OutputError(f"--out {folder}: {reason(error)}") from None
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _leave_the_terminal(descriptor)
        return None
    os.close(descriptor)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the log must get into the run's folder
    try:
        code = _wait_for_start(pid, first, tail)
    except (KeyboardInterrupt, StoppedEarly):
        _stop(pid)
        log.unlink()
        raise
    text = log.read_text(errors="replace")
    if code is not None:  # the run has not started
        log.unlink()
        sys.stderr.write(text)
        if code < 0:
            raise WorkerLost(f"the run was ended by {signal.Signals(-code).name} before it had started")
        return code
    log = log.rename(folder / name)
    if as_json:
        print_json({"out": str(folder), "pid": pid, "log": str(log)})
        return 0
    console = make_console()
    for line in text.splitlines():
        print_labelled(console, Text(line[:9], "bold"), Text(line[9:]), 9)
    for label, line in (
        ("pid", f"{pid}, in the background; the output goes to {log}"),
        ("watch", f"dmnist watch {shlex.quote(str(first))}"),
        ("stop", f"dmnist stop {shlex.quote(str(folder))}"),
    ):
        print_labelled(console, Text(f"{label:<8} ", "bold"), Text(line), 9)
    return 0


def _require_room(descriptor: int, log: Path) -> None:
    """Raise `OSError` and delete the log if nothing can be written to it: no error could be read there."""
    try:
        os.write(descriptor, bytes(4096))
        os.ftruncate(descriptor, 0)
    except OSError:
        os.close(descriptor)
        log.unlink()
        raise


def _leave_the_terminal(log: int) -> None:
    """In the new process: lead a session of its own, read nothing, and write to the log."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _wait_for_start(pid: int, folder: Path, tail: Tail) -> int | None:
    """Wait until the run has started, and return None; or until it has ended, and return its exit code.

    Another process may start a run in the same folder meanwhile. The lock's file tells whose it is.
    """
    started = False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        with contextlib.suppress(UsageError):  # there is no file yet
            started |= any(event["event"] == "start" for event in tail.new_events())
        holder = holder_of(folder)
        if started and holder is not None and holder.pid == pid:
            return None
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_SECONDS)


def _stop(pid: int) -> None:
    """Ask the run to stop, and wait until it has."""
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 2 * OBEY_SECONDS
    while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
