"""Lock a run's folder, so that only one process at a time writes to it."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from ..common.regular_file import read_regular
from ..errors import OutputError, reason
from .layout import CHECKPOINTS, FIRST_FILES, TENSORBOARD

_NAME = ".lock"
_ATTEMPTS = 100  # another process must abandon the folder for each attempt to fail
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Errors of a file system without locks, such as some mounts of Lustre and NFS."""

_PROBE_SECONDS = 0.1  # `is_live` in another process holds the lock for a moment
_POLL_SECONDS = 0.05
_HOLDER = re.compile(r"pid (\d{1,10}) on ([!-~]{1,255}?)(?:, started (\d{1,12}\.\d\d))?")
"""The content of `.lock`. It does not decide whether the folder is locked."""


@dataclass(frozen=True)
class Holder:
    """What `.lock` says about the run that holds the lock."""

    pid: int
    """Id of the process to which SIGTERM is sent to stop the run: its launcher, or else rank 0."""
    host: str
    started: float | None
    """When it started, in seconds since 1970; None if SIGTERM would end it without a checkpoint."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


class RunLock:
    """The lock on a run's folder, held by the one process that writes to it until that process ends.

    The kernel releases the lock even if the process is killed, so there are no stale locks. After a
    restart, the last processes of the old group may still be exiting. So the new owner waits for the lock
    for up to `timeout` seconds. Some network file systems have no locks; then `note` says so, and nothing
    is locked. `process` is the process that stops the run on SIGTERM, if any. Raises `OutputError` if the
    folder is in use or cannot be written.
    """

    def __init__(self, folder: Path, *, timeout: float = 0.0, process: int | None = None) -> None:
        self._folder = folder
        self.note: str | None = None
        """What the user should know about the lock; None if it works."""
        try:
            made = self._open_and_lock(time.monotonic() + max(timeout, _PROBE_SECONDS))
            # Others may have used a folder that this process made, before it had the lock.
            self._is_new = made and self.note is None and _is_empty(folder)
        except OSError as error:
            raise OutputError(f"--out {folder}: {reason(error)}") from None
        try:
            os.ftruncate(self._file.fileno(), 0)
            # Bypass the file's buffer: after an error, `close` would try to write it again and fail again.
            started = f", started {_start_time(process):.2f}" if process else ""
            text = f"pid {process or os.getpid()} on {socket.gethostname()}{started}"
            os.write(self._file.fileno(), text.encode())
        except OSError as error:
            self.abandon()
            raise OutputError(f"--out {folder}: {reason(error)}") from None

    def _open_and_lock(self, deadline: float) -> bool:
        """Make the folder and lock its file. Return whether this process made the folder.

        Raises `OutputError`, or `OSError` if the file cannot be opened.
        """
        made = False
        for _ in range(_ATTEMPTS):
            made |= _make_folder(self._folder)
            try:
                self._file = (self._folder / _NAME).open("ab+")
            except FileNotFoundError:  # another process has just abandoned the folder
                continue
            self._acquire(deadline)
            # The file that was opened may have been deleted before it was locked.
            if self.note is not None or _is_at(self._file, self._folder / _NAME):
                return made
            self._file.close()
        raise OutputError(f"--out {self._folder} is in use: other processes keep starting a run in it")

    def _acquire(self, deadline: float) -> None:
        """Lock the open file, or set `note` if its file system has no locks. Raises `OutputError`."""
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.close()
                    holder = holder_of(self._folder) or "an unknown process"
                    text = f"--out {self._folder} is in use by a live run ({holder})"
                    raise OutputError(text) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    self._file.close()
                    raise OutputError(f"--out {self._folder} cannot be locked: {reason(error)}") from None
                self.note = (
                    f"the file system of {self._folder} has no locks ({reason(error)}): nothing stops a "
                    "second run from writing to this folder"
                )
                return None
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Release the lock."""
        self._file.close()

    def abandon(self) -> None:
        """Release the lock, and first delete what a run that did not start has written to a new folder.

        The folder stays if anything else is in it.
        """
        if self._is_new:
            shutil.rmtree(self._folder / TENSORBOARD, ignore_errors=True)
            with contextlib.suppress(OSError):
                (self._folder / CHECKPOINTS).rmdir()
            with contextlib.suppress(OSError):
                for name in FIRST_FILES:
                    (self._folder / name).unlink(missing_ok=True)
                if _is_empty(self._folder):
                    (self._folder / _NAME).unlink()
                    self._folder.rmdir()
        self.release()


def _make_folder(folder: Path) -> bool:
    """Make a folder and its parents. Return whether it did not exist. Raises `OSError`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


def _is_empty(folder: Path) -> bool:
    """Return whether there is only the lock's file in the folder. Raises `OSError`."""
    return all(path.name == _NAME for path in folder.iterdir())


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether `path` is still the name of this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _start_time(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:  # it has just ended
        return 0.0


def holder_of(folder: Path) -> Holder | None:
    """Return what the run's lock says about its holder, which may have ended; None if it is not known."""
    try:
        match = _HOLDER.fullmatch(read_regular(folder / _NAME, 1 << 20).decode("ascii"))
    except (OSError, ValueError):
        return None
    return match and Holder(int(match[1]), match[2], float(match[3]) if match[3] else None)


def is_live(folder: Path) -> bool:
    """Return whether a process holds the lock on the run in `folder`: it is training, or about to."""
    try:
        with (folder / _NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False
