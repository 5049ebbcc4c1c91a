"""Lock a run's folder, so that only one process at a time writes to it."""

import fcntl
import os
import re
import shutil
import socket
import time
from pathlib import Path

from ..errors import OutputError, reason

_PROBE_SECONDS = 0.1  # `is_live` in another process holds the lock for a moment
_POLL_SECONDS = 0.05
_OWNER = re.compile(rb"pid \d{1,10} on [!-~]{1,255}")
"""The content of `.lock`. It is shown to the user, and decides nothing."""


class RunLock:
    """The lock on a run's folder, held by the one process that writes to it until that process ends.

    The kernel releases the lock even if the process is killed, so there are no stale locks. After a
    restart, the last processes of the old group may still be exiting. So the new owner waits for the lock
    for up to `timeout` seconds. Raises `OutputError` if the folder cannot be locked.
    """

    def __init__(self, folder: Path, *, timeout: float = 0.0) -> None:
        path = folder / ".lock"
        self._folder, self._is_new = folder, not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+")
        except OSError as error:
            raise OutputError(f"--out {folder}: {reason(error)}") from None
        try:
            self._acquire(time.monotonic() + max(timeout, _PROBE_SECONDS))
        except OSError as error:
            self._file.seek(0)
            content = self._file.read(1000)
            owner = content.decode() if _OWNER.fullmatch(content) else "an unknown process"
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise OutputError(f"--out {folder} is in use by a live run ({owner})") from None
            raise OutputError(f"--out {folder} cannot be locked: {reason(error)}") from None
        try:
            os.ftruncate(self._file.fileno(), 0)
            # Bypass the file's buffer: after an error, `close` would try to write it again and fail again.
            os.write(self._file.fileno(), f"pid {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            self.abandon()
            raise OutputError(f"--out {folder}: {reason(error)}") from None

    def _acquire(self, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Release the lock."""
        self._file.close()

    def abandon(self) -> None:
        """Release the lock, and delete the folder if this lock created it."""
        if self._is_new:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.release()


def is_live(folder: Path) -> bool:
    """Return whether a process holds the lock on the run in `folder`: it is training, or about to."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False
