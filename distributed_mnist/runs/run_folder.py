"""Choose and lock a run's folder, and open its checkpoint store.

Rank 0 chooses the folder and broadcasts the result. If a host does not see rank 0's folder (no shared file
system), one rank on that host keeps a copy of the checkpoints, so that losing a host loses no checkpoint.
"""

import dataclasses
import errno
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.digest import digest
from ..config import DATA_OPTIONS, Recipe, Run
from ..distributed.world import World
from ..errors import OutputError, reason
from .checkpoint_store import NullStore, RunStore, Store
from .layout import RUNS, checkpoints_in, new_folder, write_json
from .lock import RunLock, holder_of, is_live
from .run_files import read_group

_LOCK_TIMEOUT = 30.0  # seconds for the last processes of a restarted group to end


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and how it was opened."""

    path: Path
    restarted: bool
    """Whether the launcher has restarted this run. It then continues from its newest checkpoint."""
    token: str
    """A random string that rank 0 writes into the folder. Ranks that read it there see the same folder."""
    run_id: str
    """See `_run_id`."""
    lock: RunLock | None = None
    """The lock on the folder; None on ranks other than 0."""


def open_folder(
    world: World, options: Run, recipe: Recipe, title: str, process: int | None = None
) -> RunFolder:
    """Return the run's folder, the same on every rank, locked by rank 0. `process` is as in `RunLock`.

    `recipe` is the one that was asked for, in which the precision may be "auto". Raises `OutputError` if
    the folder cannot be used, or if it contains a different run.
    """
    run_id = _run_id(recipe, options)
    earlier = folder_before_restart(world, recipe, options)
    locks: list[RunLock] = []

    def choose_and_lock() -> RunFolder:
        path = earlier or options.out or new_folder(title)
        lock = RunLock(path, timeout=_LOCK_TIMEOUT if earlier else 0.0, process=process)
        folder = RunFolder(path, earlier is not None, secrets.token_hex(8), run_id)
        try:
            if not earlier:
                _refuse_used(path, options)
            _write_group_file(folder, world)
        except BaseException:
            lock.abandon()
            raise
        locks.append(lock)
        return folder

    try:
        with world.status.during("opening the run's folder", 2 * _LOCK_TIMEOUT):
            folder = world.on_rank_zero(choose_and_lock, RunFolder)
    except BaseException:  # another rank is lost
        for lock in locks:
            lock.abandon()
        raise
    return dataclasses.replace(folder, lock=locks[0]) if locks else folder


def folder_before_restart(world: World, recipe: Recipe, options: Run) -> Path | None:
    """Return the folder that this run used before its launcher restarted it; None for a new run.

    `recipe` is as in `open_folder`. All ranks must call it.
    """
    run_id = _run_id(recipe, options)
    # Every rank searches its own host for a folder of its own launcher, because rank 0 may have moved to a
    # new host.
    launcher_id = world.peers[world.rank].starter
    candidates = [options.out] if options.out else sorted(RUNS.glob("*"), reverse=True)
    found = next((path for path in candidates if _was_opened_by(path, run_id, launcher_id)), None)
    has_found = world.all_gather(torch.tensor([found is not None], device=world.device)).flatten()
    if not has_found.any():
        return None
    return world.broadcast_object(found, Path, int(has_found.int().argmax()))


def _run_id(recipe: Recipe, options: Run) -> str:
    """Return a digest of recipe and data, which identifies a run: one launcher may start several runs."""
    return digest([recipe.to_dict(), *(str(getattr(options, name)) for name in DATA_OPTIONS)])


def _was_opened_by(path: Path, run_id: str, launcher_id: str) -> bool:
    group = _read_group_file(path)
    return group["what"] == run_id and launcher_id in group["starters"]


def _read_group_file(path: Path) -> dict[str, Any]:
    """Read token, run ID and launcher IDs from `.group`, as written by the last group to open the folder.

    If there is no valid file, the values are empty and match nothing.
    """
    group = read_group(path) or {"mark": "", "what": "", "starters": []}
    return {**group, "starters": [launcher_id for launcher_id in group["starters"] if launcher_id]}


def _write_group_file(folder: RunFolder, world: World) -> None:
    launcher_ids = sorted({peer.starter for peer in world.peers})
    group = {"mark": folder.token, "what": folder.run_id, "starters": launcher_ids}
    write_json(folder.path / ".group", group)


def _refuse_used(path: Path, options: Run) -> None:
    """Raise `OutputError` if the folder has checkpoints but the run does not resume from them."""
    checkpoints = (path / "checkpoints").resolve()
    resuming_here = options.resume is not None and Path(options.resume).resolve().parent == checkpoints
    if checkpoints_in(checkpoints) and options.resume != "auto" and not resuming_here:
        raise OutputError(
            f"--out {path} already holds a run: add --resume auto to resume it, or choose another folder"
        )


def require_usable(path: Path, options: Run) -> None:
    """Raise `OutputError` if `open_folder` would, as far as this can be known without writing."""
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OutputError(f"--out {path}: {reason(error)}") from None
    if is_live(path):
        raise OutputError(
            f"--out {path} is in use by a live run ({holder_of(path) or 'an unknown process'})"
        )
    _refuse_used(path, options)


def open_store(world: World, options: Run, folder: RunFolder, every_seconds: float | None) -> Store:
    """Return a `RunStore` on rank 0 and on one rank of each host that does not see rank 0's folder.

    All other ranks get a `NullStore`.
    """

    def make() -> Store:
        if world.rank == 0:
            return RunStore(folder.path, options.keep, every_seconds)
        if world.local_rank != 0 or _read_group_file(folder.path)["mark"] == folder.token:
            return NullStore()
        if not folder.restarted:
            _refuse_used(folder.path, options)
        try:
            store = RunStore(folder.path, options.keep, every_seconds)
            _write_group_file(dataclasses.replace(folder, token=""), world)
            return store
        except OutputError:  # this host cannot be written to, but other hosts have the checkpoints
            return NullStore()

    return world.on_every_rank(make)
