"""Signals that ask a run to stop: heard at once, obeyed at the next sync point.

SIGTERM (schedulers, torchrun), SIGINT (Ctrl-C) and SIGUSR1 (Slurm's `--signal`) all ask for the same: a
checkpoint at one common step, and the exit code that says "start me again".
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StoppedEarly(BaseException):
    """A signal came before there was a state worth saving. No `except Exception` on the way may take it
    for a failure of its own."""


class StopSignals:
    """Installed for a process's life. Before `arm` the first signal raises `StoppedEarly` where it strikes,
    afterwards it sets a flag that the loop looks at."""

    def __init__(self) -> None:
        self._armed = False
        self._received: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # our launcher blocks them until now

    def arm(self) -> None:
        """From now on there is a state worth saving."""
        self._armed = True

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self._received = self._received is None, signal.Signals(number).name
        if self._armed and not first and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: the user does not want to wait
        if not self._armed and first:
            raise StoppedEarly(f"stopped by {self._received} before there was anything to save")
