"""One writer a run: the lock on a run's folder, and the small JSON files in it."""

import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path

from ..errors import OutputError, reason
from .checkpoint import write

_GLANCE = 0.1  # seconds: `is_live` of another process holds a lock for an instant


class RunLock:
    """Held by the one process that writes into a run's folder, for as long as it lives.

    The kernel drops the lock with the process, however it dies, so there is no stale lock to remove. A
    group that was started again may have to wait up to `patience` seconds for the last of the dead.
    """

    def __init__(self, folder: Path, *, patience: float = 0.0) -> None:
        path = folder / ".lock"
        self._folder, self._is_new = folder, not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        except OSError as error:
            raise OutputError(f"--out {folder}: {reason(error)}") from None
        try:
            self._take(time.monotonic() + max(patience, _GLANCE))
        except OSError as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise OutputError(f"--out {folder} is in use by a live run ({owner})") from None
            raise OutputError(f"--out {folder} cannot be locked: {reason(error)}") from None
        try:
            os.ftruncate(self._file.fileno(), 0)
            # Not through the buffer of the file, which would be written again, and fail, when it is closed.
            os.write(self._file.fileno(), f"pid {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            self.abandon()
            raise OutputError(f"--out {folder}: {reason(error)}") from None

    def _take(self, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def release(self) -> None:
        """Let others in."""
        self._file.close()

    def abandon(self) -> None:
        """Let others in, and leave no trace of a folder that was made for nothing."""
        if self._is_new:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.release()


def is_live(folder: Path) -> bool:
    """Whether a process holds the lock of the run in `folder`: it trains, or is about to."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False


def write_json(path: Path, value: object) -> None:
    """Write a small JSON file whole or not at all. Raises `OutputError`."""
    try:
        write(path, (json.dumps(value, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path}: {reason(error)}") from None
