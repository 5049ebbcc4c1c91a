"""Signals that ask a run to stop: heard at once, obeyed at the next sync point.

SIGTERM (schedulers, torchrun), SIGINT (Ctrl-C) and SIGUSR1 (Slurm's `--signal`) all ask for the same: a
checkpoint at one common step, and the exit code that says "start me again".
"""

import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Protocol

from ..common.placement import Placement
from ..errors import Interrupted, tell

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
OBEY_SECONDS = 20.0
"""How long a process asked to stop may take: torchrun, the most impatient, kills after 30."""
_WATCH_SECONDS = 1.0


class StoppedEarly(BaseException):
    """A signal came before there was a state worth saving. No `except Exception` on the way may take it
    for a failure of its own."""


class StopRequests(Protocol):
    """Who knows whether a run was asked to stop: see `StopSignals`."""

    def arm(self, resume_flags: str = ...) -> None: ...  # noqa: D102
    def requested(self) -> bool: ...  # noqa: D102


class StopSignals:
    """Installed for a process's life. Before `arm` the first signal raises `StoppedEarly` where it strikes,
    afterwards it sets a flag that the loop looks at.

    Python runs handlers between two instructions of the main thread, which may be inside of a long
    computation or wait for a rank that hangs. So a thread hears of signals too, and ends a process that has
    not stopped by itself in time; the last checkpoint is what it leaves.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._armed, self._go_on = False, "--resume auto"
        self._received: str | None = None
        self._interrupts = 0
        heard, struck = socket.socketpair()
        struck.setblocking(False)
        signal.set_wakeup_fd(struck.fileno(), warn_on_full_buffer=False)
        self._struck = struck  # kept open
        threading.Thread(target=self._see_it_done, args=(heard,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # our launcher blocks them until now

    def arm(self, resume_flags: str = "--resume auto") -> None:
        """From now on there is a state worth saving; `resume_flags` are the flags that resume it."""
        self._armed, self._go_on = True, resume_flags

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self._received = self._received is None, signal.Signals(number).name
        # A second Ctrl-C: the user does not want to wait. (After the first one our launcher's SIGTERM comes
        # too, before the terminal's SIGINT or after it.)
        self._interrupts += number == signal.SIGINT
        if self._armed and number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt
        if not self._armed and first:
            raise StoppedEarly(f"stopped by {self._received} before there was anything to save")

    def _see_it_done(self, heard: socket.socket) -> None:
        while heard.recv(1)[0] not in SIGNALS:
            pass
        # If rank 0 goes, those who wait for it do too; who is still there a moment later tells as well.
        time.sleep(OBEY_SECONDS + (1.0 if self._placement.rank else 0.0))
        text = f"asked to stop, but not done after {OBEY_SECONDS:.0f} s (a long step, or something hangs)"
        error = Interrupted(f"{text}: a run goes on from its last checkpoint with {self._go_on}")
        error.on_one_rank = True
        tell(error, self._placement)
        os._exit(error.exit_code)


def end_with(parent: int) -> None:
    """Ask this process to stop when the one that started it is gone: nobody else would."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
