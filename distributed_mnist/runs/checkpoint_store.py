"""Write, find and prune the checkpoints of a run.

A background thread writes them while training continues. Only some ranks have a `RunStore` (see
`run_folder`). The others have a `NullStore`, so that the training code is the same on every rank.
"""

import contextlib
import errno
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

from ..common.atomic_write import flush_folder, remove_leftovers
from ..errors import CheckpointError, OutputError, reason
from .checkpoint import Content, decode, encode, read_bytes, snapshot, write
from .layout import CHECKPOINTS, checkpoint_path, checkpoints_in, step_of

_SLOW_WRITE_SECONDS = 60.0  # a slower write may never finish
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
Pack = Callable[[], Content]


@dataclass(frozen=True)
class SaveResult:
    """The outcome of saving one checkpoint."""

    step: int
    path: str
    seconds: float
    """From the call to `save` until the file is safely on disk."""
    problem: str | None = None
    """Why the file could not be written; None if it was. The run continues, and keeps older checkpoints."""


class Store:
    """The interface for saving checkpoints. This base class saves nothing and finds nothing."""

    def due(self) -> bool:
        """Return whether it is time for the next checkpoint, if the interval is given in seconds."""
        return False

    def save(self, pack: Pack, *, best: bool) -> None:
        """Copy the result of `pack()` and start to write it; with `best`, also as the best checkpoint."""

    def finished(self, *, wait: bool) -> list[SaveResult]:
        """Return the results of writes that ended since the last call; with `wait`, wait for all writes."""
        return []

    def last_good(self) -> str:
        """Return the path of the newest saved checkpoint, for messages; "none" if there is none yet."""
        return "none"

    def resumed_from(self, path: str, step: int) -> None:
        """Record which checkpoint the run resumes from. Checkpoints of later steps become obsolete."""

    def newest(self, warn: Callable[[str], None]) -> tuple[Path, bytes, int] | None:
        """Return path, bytes and step of the newest undamaged checkpoint, or None.

        `warn` is called with a message about each damaged one.
        """
        return None


class NullStore(Store):
    """The store of a rank that writes no checkpoints."""


class BackgroundStore(Store, ABC):
    """Writes checkpoints one at a time in a thread. Subclasses define `path_of` and `write`."""

    def __init__(self, every_seconds: float | None) -> None:
        self._every_seconds = every_seconds
        self._writer = futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: list[futures.Future[SaveResult]] = []
        self._last_save = time.monotonic()
        self._last_good = "none"

    def due(self) -> bool:
        """See `Store`.

        During a write no checkpoint is due until the write has taken `_SLOW_WRITE_SECONDS`. Then the next
        `save` waits for the write, so that the watchdog notices a disk that never answers.
        """
        if self._every_seconds is None:
            return False
        writing = any(not future.done() for future in self._pending)
        interval = max(self._every_seconds, _SLOW_WRITE_SECONDS) if writing else self._every_seconds
        return time.monotonic() - self._last_save >= interval

    def save(self, pack: Pack, *, best: bool) -> None:
        """See `Store`. Waits for the previous write, so that copies of the state do not accumulate."""
        futures.wait(self._pending)
        self._last_save = time.monotonic()
        self._pending.append(self._writer.submit(self._write, snapshot(pack()), best, self._last_save))

    def _write(self, content: Content, best: bool, began: float) -> SaveResult:
        path, problem = self.path_of(content), None
        try:
            self.write(path, content, best=best)
        except OSError as error:
            problem = f"{path} could not be saved: {reason(error)}"
        return SaveResult(content["step"], str(path), time.monotonic() - began, problem)

    @abstractmethod
    def path_of(self, content: Content) -> Path:
        """Return the path to write this checkpoint to."""

    @abstractmethod
    def write(self, path: Path, content: Content, *, best: bool) -> None:
        """Write a checkpoint to disk. Raises `OSError`."""

    def finished(self, *, wait: bool) -> list[SaveResult]:
        """See `Store`."""
        results = []
        while self._pending and (wait or self._pending[0].done()):
            result = self._pending.pop(0).result()
            if result.problem is None:
                self._last_good = result.path
            results.append(result)
        return results

    def last_good(self) -> str:
        """See `Store`."""
        return self._last_good

    def resumed_from(self, path: str, step: int) -> None:
        """See `Store`. Until the next save this checkpoint is the last good one."""
        self._last_good = path


class RunStore(BackgroundStore):
    """The `checkpoints/` folder of a run: `best.pt`, and the newest `keep` files `step_00000470.pt` ….

    On a full disk it keeps fewer, but at least one.
    """

    def __init__(self, folder: Path, keep: int, every_seconds: float | None = None) -> None:
        super().__init__(every_seconds)
        self._folder, self._keep = folder / CHECKPOINTS, keep
        self._unwritten_best: bytes | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            flush_folder(folder)  # otherwise a power cut could remove the new folder and its content
            remove_leftovers(self._folder)
        except OSError as error:
            raise OutputError(f"{self._folder}: {reason(error)}") from None

    def path_of(self, content: Content) -> Path:
        """See `BackgroundStore`."""
        return checkpoint_path(self._folder, content["step"])

    def write(self, path: Path, content: Content, *, best: bool) -> None:
        """See `BackgroundStore`."""
        data = encode(content)
        # Write `best.pt` first. The other file records that this accuracy was reached, so it must not exist
        # before a file with those weights. If the disk is full, try `best.pt` again at the next save.
        if best:
            self._unwritten_best = data
        if self._unwritten_best is not None:
            self._write_making_room(self._folder / "best.pt", self._unwritten_best, content["step"])
            self._unwritten_best = None
        self._write_making_room(path, data, content["step"])
        self._prune(content["step"])

    def _write_making_room(self, path: Path, data: bytes, step: int) -> None:
        """Write a file; on a full disk, remove the oldest checkpoints for it. Raises `OSError`."""
        while True:
            try:
                return write(path, data)
            except OSError as error:
                if error.errno not in _NO_ROOM or not self._remove_oldest(step):
                    raise

    def _remove_oldest(self, step: int) -> bool:
        """Remove the oldest checkpoint before `step`, and return whether there was one to remove.

        The newest undamaged one is never removed: a run that dies now resumes from it.
        """
        newest = self.newest(lambda _: None)
        if newest is None:
            return False
        for path in checkpoints_in(self._folder):
            if path != newest[0] and step_of(path) < step:
                with contextlib.suppress(OSError):
                    path.unlink()
                    return True
        return False

    def newest(self, warn: Callable[[str], None]) -> tuple[Path, bytes, int] | None:
        """See `Store`."""
        return newest_checkpoint(self._folder.parent, warn)

    def resumed_from(self, path: str, step: int) -> None:
        """See `Store`.

        Renames checkpoints of later steps, which are damaged or were discarded by the user, so that a
        restart does not mistake one of them for this run's newest checkpoint.
        """
        super().resumed_from(path, step)
        for later in checkpoints_in(self._folder):
            if step_of(later) > step:
                with contextlib.suppress(OSError):
                    later.rename(later.with_name(f"{later.name}.before"))

    def _prune(self, step: int) -> None:
        earlier = [path for path in checkpoints_in(self._folder) if step_of(path) <= step]
        with contextlib.suppress(OSError):  # an extra file is harmless, and the newest checkpoint is saved
            for path in earlier[: -self._keep]:
                path.unlink()
            flush_folder(self._folder)


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> tuple[Path, bytes, int] | None:
    """Return path, bytes and step of the newest undamaged checkpoint of the run in `folder`; None without.

    `warn` is called with a message about each damaged one.
    """
    for path in reversed(checkpoints_in(folder / CHECKPOINTS)):
        try:
            data = read_bytes(path)
            step = decode(data, str(path))["step"]
        except CheckpointError as error:
            warn(f"{error}; trying the one before it")
        else:
            return path, data, step
    return None
