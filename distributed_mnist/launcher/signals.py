"""Handle signals that ask a run to stop. The run stops at the next sync point.

SIGTERM (schedulers, torchrun), SIGINT and SIGQUIT (from the keyboard), SIGHUP (the terminal is gone),
SIGUSR1 and SIGUSR2 (Slurm's `--signal`) and SIGXCPU (a limit of processor time) have the same effect: a
checkpoint at one common step, and the exit code that means "start me again".
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

from ..common.placement import Placement
from ..errors import Interrupted, print_error

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGXCPU,
)
OBEY_SECONDS = 20.0
"""How long a process may take to stop after a signal, in seconds. torchrun kills it after 30."""
_POLL_SECONDS = 1.0


def obeyed_signals() -> list[signal.Signals]:
    """Return those of `SIGNALS` that stop a run. `nohup` and others start it with some of them ignored."""
    ignorable = (signal.SIGHUP, signal.SIGQUIT)
    return [n for n in SIGNALS if n not in ignorable or signal.getsignal(n) != signal.SIG_IGN]


class StoppedEarly(BaseException):
    """A signal came before there was any state to save.

    It is not an `Exception`, so that no `except Exception` treats it as a failure.
    """


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, where Python may not take note of it.

    If a `KeyboardInterrupt` itself has once left code that was executed from a string, as `dataclasses`
    does, Python ends the process by SIGINT instead of its exit code.
    """


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """In the body, let the first signal that asks to stop raise `StoppedEarly`, or `Interrupt` for Ctrl-C.

    The body may install other handlers. Signals that are ignored stay ignored, and a program that has
    handlers of its own keeps them. Has no effect outside of the main thread.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    taken = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) in usual}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)  # a second one ends the process at once
        if number == signal.SIGINT:
            raise Interrupt
        raise StoppedEarly(f"stopped by {signal.Signals(number).name} before there was anything to save")

    if threading.current_thread() is not threading.main_thread():
        taken.clear()
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in taken.items():
            if signal.getsignal(number) in (stop, signal.SIG_DFL):  # not what the body has installed
                signal.signal(number, handler)


class StopRequests(Protocol):
    """Reports whether a run was asked to stop. `StopSignals` documents the members."""

    @property
    def process(self) -> int | None: ...  # noqa: D102

    def arm(self, resume_flags: str = ...) -> None: ...  # noqa: D102
    def requested(self) -> bool: ...  # noqa: D102


class StopSignals:
    """Signal handlers, installed until the process ends.

    Before `arm`, the first signal raises `StoppedEarly` in the main thread. Afterwards a signal sets a
    flag, which the training loop reads.

    Python runs handlers between two instructions of the main thread. That thread may be inside a long
    computation, or waiting for a rank that hangs. So a second thread also receives signals, and ends the
    process if it does not stop by itself in time. The run can then be resumed from its last checkpoint.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self.process = placement.launcher_pid or placement.parent or os.getpid()
        """Id of the process that ends all ranks on SIGTERM, with a checkpoint; None if there is none."""
        self._armed, self._resume_flags = False, "--resume auto"
        self._received: str | None = None
        self._interrupts = 0
        read_end, write_end = socket.socketpair()
        write_end.setblocking(False)
        signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        self._write_end = write_end  # a reference, so that it stays open
        threading.Thread(target=self._enforce_deadline, args=(read_end,), daemon=True).start()
        for number in obeyed_signals():
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # our own launcher blocks them until now

    def arm(self, resume_flags: str = "--resume auto") -> None:
        """Declare that from now on there is state to save. `resume_flags` are the flags that resume it."""
        self._armed, self._resume_flags = True, resume_flags

    def requested(self) -> bool:
        """Return whether a signal has asked this process to stop."""
        return self._received is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self._received = self._received is None, signal.Signals(number).name
        # After a second Ctrl-C the user does not want to wait. (After one Ctrl-C our own launcher sends
        # SIGTERM too, which may arrive before or after the terminal's SIGINT.)
        self._interrupts += number == signal.SIGINT
        if self._armed and number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt
        if not self._armed and first:
            raise StoppedEarly(f"stopped by {self._received} before there was anything to save")

    def _enforce_deadline(self, read_end: socket.socket) -> None:
        while read_end.recv(1)[0] not in SIGNALS:
            pass
        # When rank 0 ends, ranks that wait for it end too. Other ranks report too if they still run a
        # moment later.
        time.sleep(OBEY_SECONDS + (1.0 if self._placement.rank else 0.0))
        error = Interrupted(
            f"asked to stop, but still running after {OBEY_SECONDS:.0f} s (a long step, or a hang): "
            f"nothing saved since the last checkpoint; resume with {self._resume_flags}"
        )
        error.on_one_rank = True
        print_error(error, self._placement)
        os._exit(error.exit_code)


def stop_with_parent(parent: int) -> None:
    """Send this process SIGTERM when its parent, which has this process id, has ended."""

    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=poll, daemon=True).start()
