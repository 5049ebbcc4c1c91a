"""Which of a run's checkpoints are written, when, kept, found and pruned.

Writing goes on beside the training, in a thread of its own. Only some ranks have a `RunStore` (see
`folder`); the others are given a `NullStore`, so the code that trains never asks who it is.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..common.atomic_write import flush_folder, remove_leftovers
from ..errors import CheckpointError, OutputError, reason
from .checkpoint import Content, decode, encode, read_bytes, snapshot, write
from .layout import checkpoint_path, checkpoints_in, step_of

_LONG_SECONDS = 60.0  # for a checkpoint to be written
Pack = Callable[[], Content]


@dataclass(frozen=True)
class Saved:
    """What became of a checkpoint."""

    step: int
    path: str
    seconds: float
    """From handing it over to its being safe on disk."""
    problem: str | None = None
    """Why it could not be written: it costs safety, not the run."""


class Store(Protocol):
    """Where checkpoints go."""

    def due(self) -> bool:
        """Whether it is time for another checkpoint, where the time between them was given in seconds."""
        ...

    def save(self, pack: Pack, *, best: bool) -> None:
        """Take what `pack()` returns as it is now, and begin to write it, also as the best if `best`."""
        ...

    def finished(self, *, wait: bool) -> list[Saved]:
        """What became of the checkpoints since the last call; `wait` for those still being written."""
        ...

    def last_good(self) -> str:
        """The newest checkpoint's path, for messages; "none" before the first."""
        ...

    def resumed_from(self, path: str, step: int) -> None:
        """Say which checkpoint the run goes on from. Those of later steps are no longer of this run."""
        ...

    def newest(self, complain: Callable[[str], None]) -> tuple[Path, bytes, int] | None:
        """The newest whole checkpoint, its bytes and its step; `complain` hears of each damaged one."""
        ...


class NullStore:
    """Of a rank that writes nothing."""

    def due(self) -> bool:
        """Never."""
        return False

    def save(self, pack: Pack, *, best: bool) -> None:
        """Nothing."""

    def finished(self, *, wait: bool) -> list[Saved]:
        """Nothing."""
        return []

    def last_good(self) -> str:
        """Nothing is known here."""
        return "none"

    def resumed_from(self, path: str, step: int) -> None:
        """Nothing."""

    def newest(self, complain: Callable[[str], None]) -> tuple[Path, bytes, int] | None:
        """Nothing is known here."""
        return None


class BackgroundStore(ABC):
    """Writes one checkpoint at a time in a thread; a subclass says where (`path_of`) and how (`write`)."""

    def __init__(self, every_seconds: float | None) -> None:
        self._every = every_seconds
        self._writer = futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: list[futures.Future[Saved]] = []
        self._since = time.monotonic()
        self._last_good = "none"

    def due(self) -> bool:
        """See `Store`. While one is being written no other is due, until that takes suspiciously long: then
        `save` waits for it, where a disk that never answers is found out."""
        if self._every is None:
            return False
        busy = any(not future.done() for future in self._pending)
        return time.monotonic() - self._since >= (max(self._every, _LONG_SECONDS) if busy else self._every)

    def save(self, pack: Pack, *, best: bool) -> None:
        """See `Store`. Waits for the one before it: copies of the state must not pile up."""
        futures.wait(self._pending)
        self._since = time.monotonic()
        self._pending.append(self._writer.submit(self._write, snapshot(pack()), best, self._since))

    def _write(self, content: Content, best: bool, began: float) -> Saved:
        path = self.path_of(content)
        try:
            self.write(path, content, best=best)
        except OSError as error:
            problem = f"{path} could not be saved: {reason(error)}"
            return Saved(content["step"], str(path), time.monotonic() - began, problem)
        return Saved(content["step"], str(path), time.monotonic() - began)

    @abstractmethod
    def path_of(self, content: Content) -> Path:
        """Where a checkpoint goes."""

    @abstractmethod
    def write(self, path: Path, content: Content, *, best: bool) -> None:
        """Put a checkpoint on disk. Raises `OSError`."""

    def finished(self, *, wait: bool) -> list[Saved]:
        """See `Store`."""
        done = []
        while self._pending and (wait or self._pending[0].done()):
            saved = self._pending.pop(0).result()
            if saved.problem is None:
                self._last_good = saved.path
            done.append(saved)
        return done

    def last_good(self) -> str:
        """See `Store`."""
        return self._last_good

    def resumed_from(self, path: str, step: int) -> None:
        """See `Store`. Until the next one it is the last good."""
        self._last_good = path

    def newest(self, complain: Callable[[str], None]) -> tuple[Path, bytes, int] | None:
        """See `Store`. Nothing is looked for here."""
        return None


class RunStore(BackgroundStore):
    """`checkpoints/` of a run's folder: `step_00000470.pt` …, of which the newest `keep` stay, and
    `best.pt`."""

    def __init__(self, folder: Path, keep: int, every_seconds: float | None = None) -> None:
        super().__init__(every_seconds)
        self._folder, self._keep = folder / "checkpoints", keep
        self._owed: bytes | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            flush_folder(folder)  # or a power cut could take the new folder with all that is in it
            remove_leftovers(self._folder)
        except OSError as error:
            raise OutputError(f"{self._folder}: {reason(error)}") from None

    def path_of(self, content: Content) -> Path:
        """See `BackgroundStore`."""
        return checkpoint_path(self._folder, content["step"])

    def write(self, path: Path, content: Content, *, best: bool) -> None:
        """See `BackgroundStore`."""
        data = encode(content)
        # The best first: the other file says that this accuracy was reached, and must not say so while
        # nothing holds its weights. One that a full disk refused is owed until there is room.
        if best:
            self._owed = data
        if self._owed is not None:
            write(self._folder / "best.pt", self._owed)
            self._owed = None
        write(path, data)
        self._prune(content["step"])

    def newest(self, complain: Callable[[str], None]) -> tuple[Path, bytes, int] | None:
        """See `Store`."""
        for path in reversed(checkpoints_in(self._folder)):
            try:
                data = read_bytes(path)
                step = decode(data, str(path))["step"]
            except CheckpointError as error:
                complain(f"{error}; trying the one before it")
            else:
                return path, data, step
        return None

    def resumed_from(self, path: str, step: int) -> None:
        """See `Store`. Checkpoints that were passed over as damaged, or that the user went back before, are
        put aside: a restart must not take them for this run's newest."""
        super().resumed_from(path, step)
        for later in checkpoints_in(self._folder):
            if step_of(later) > step:
                with contextlib.suppress(OSError):
                    later.rename(later.with_name(f"{later.name}.before"))

    def _prune(self, step: int) -> None:
        earlier = [path for path in checkpoints_in(self._folder) if step_of(path) <= step]
        with contextlib.suppress(OSError):  # one too many harms nothing; the newest is saved
            for path in earlier[: -self._keep]:
                path.unlink()
            flush_folder(self._folder)
