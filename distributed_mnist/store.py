"""A run's folder: its lock, and which checkpoints in it are written, kept, found and pruned.

Only one process of a run has a `RunStore`; the others are given a `NullStore`, so the code that trains
never asks who it is.
"""

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from .aside import flush_folder, remove_leftovers
from .checkpoint import Content, decode, encode, read_bytes, write
from .errors import CheckpointError, OutputError, reason

_NAME = re.compile(r"step_(\d+)\.pt")

Pack = Callable[[], Content]


class Store(Protocol):
    """Where checkpoints go."""

    def save(self, pack: Pack, *, best: bool) -> str | None:
        """Save what `pack()` returns, also as the best if `best`.

        Returns None, or what went wrong: a checkpoint that cannot be written costs safety, not the run.
        """
        ...

    def last_good(self) -> str:
        """The newest checkpoint's path, for messages; "none" before the first."""
        ...

    def resumed_from(self, path: str) -> None:
        """Say which checkpoint the run goes on from: until the next one it is the last good."""
        ...

    def newest(self, complain: Callable[[str], None]) -> tuple[Path, bytes] | None:
        """The newest whole checkpoint and its bytes; `complain` hears of each damaged one passed over."""
        ...


class NullStore:
    """Of a rank that writes nothing."""

    def save(self, pack: Pack, *, best: bool) -> str | None:
        """Nothing."""
        return None

    def last_good(self) -> str:
        """Nothing is known here."""
        return "none"

    def resumed_from(self, path: str) -> None:
        """Nothing."""

    def newest(self, complain: Callable[[str], None]) -> tuple[Path, bytes] | None:
        """Nothing is known here."""
        return None


class RunStore:
    """`checkpoints/` of a run's folder: `step_00000470.pt` …, of which the newest `keep` stay, and
    `best.pt`."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder / "checkpoints", keep
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._folder)
        except OSError as error:
            raise OutputError(f"{self._folder}: {reason(error)}") from None
        self._last_good = "none"

    def save(self, pack: Pack, *, best: bool) -> str | None:
        """See `Store`."""
        content = pack()
        path = self._folder / f"step_{content['step']:08d}.pt"
        try:
            data = encode(content)
            # The best first: the other file says that this accuracy was reached, and must not say so while
            # nothing holds its weights.
            if best:
                write(self._folder / "best.pt", data)
            write(path, data)
            self._last_good = str(path)
            self._prune(path)
        except OSError as error:
            return f"{path} could not be saved: {reason(error)}"
        return None

    def last_good(self) -> str:
        """See `Store`."""
        return self._last_good

    def resumed_from(self, path: str) -> None:
        """See `Store`."""
        self._last_good = path

    def newest(self, complain: Callable[[str], None]) -> tuple[Path, bytes] | None:
        """See `Store`."""
        for path in reversed(checkpoints_in(self._folder)):
            try:
                data = read_bytes(path)
                decode(data, str(path))
            except CheckpointError as error:
                complain(f"{error}; trying the one before it")
            else:
                return path, data
        return None

    def _prune(self, newest: Path) -> None:
        # Later files were passed over as damaged, or the user went back before them: they are not in the
        # way, and reaching their steps again replaces them.
        found = checkpoints_in(self._folder)
        for path in found[: found.index(newest) + 1][: -self._keep]:
            path.unlink(missing_ok=True)
        flush_folder(self._folder)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a folder by step, oldest first; without `best.pt`."""
    try:
        found = [
            (int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))
        ]
    except OSError:
        return []
    return [path for _, path in sorted(found)]


class RunLock:
    """Held by the one process that writes into a run's folder, for as long as it lives.

    The kernel drops the lock with the process, however it dies, so there is no stale lock to remove.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ".lock"
        self._folder, self._is_new = folder, not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        except OSError as error:
            raise OutputError(f"--out {folder}: {reason(error)}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise OutputError(f"--out {folder} is in use by a live run ({owner})") from None
            raise OutputError(f"--out {folder} cannot be locked: {reason(error)}") from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let others in."""
        self._file.close()

    def abandon(self) -> None:
        """Let others in, and leave no trace of a folder that was made for nothing."""
        if self._is_new:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.release()


def write_json(path: Path, value: object) -> None:
    """Write a small JSON file whole or not at all. Raises `OutputError`."""
    try:
        write(path, (json.dumps(value, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path}: {reason(error)}") from None
