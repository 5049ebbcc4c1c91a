"""Ctrl-C in the caller's process, or a notebook's interrupt: the run stops and saves."""

import signal
import threading
from types import FrameType
from typing import Self


class StopOnInterrupt:
    """Within this context, the first SIGINT asks the run to stop, and the next raises `KeyboardInterrupt`.

    As long as there is nothing to save, the first one raises it too. A handler of the caller's own stays.
    Outside of the main thread, which alone receives signals, nothing changes.
    """

    process: int | None = None
    """SIGTERM would end the caller's process without a checkpoint."""

    def __init__(self) -> None:
        self._armed = self._requested = self._installed = False

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_interrupt)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def arm(self, resume_flags: str = "") -> None:
        """Declare that from now on there is state to save."""
        self._armed = True

    def requested(self) -> bool:
        """Return whether SIGINT has asked the run to stop."""
        return self._requested

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._requested or not self._armed:
            raise KeyboardInterrupt
        self._requested = True
