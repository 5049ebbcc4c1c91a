"""Signals that ask a run to stop: heard at once, obeyed at the next sync point.

SIGTERM (schedulers, torchrun), SIGINT (Ctrl-C) and SIGUSR1 (Slurm's `--signal`) all ask for the same: a
checkpoint at one common step, and the exit code that says "start me again".
"""

import signal
from types import FrameType

from .errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Installed for a process's life. Before `arm`, a signal ends the process where it stands."""

    def __init__(self) -> None:
        self._armed = False
        self.received: str | None = None
        """Name of the first signal, once one came."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def arm(self) -> None:
        """From now on there is a state worth saving: a first signal only sets a flag."""
        self._armed = True

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._armed:
            raise Interrupted(f"stopped by {name} before the first step; nothing to save")
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: the user does not want to wait
        self.received = self.received or name
