"""Choose and lock a run's folder, and open its checkpoint store.

Rank 0 touches the files and tells the other ranks the result. On a host that does not see rank 0's folder
one rank keeps a copy of the checkpoints, so that losing a host loses none.
"""

import dataclasses
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.digest import digest
from ..config import DATA_OPTIONS, Recipe, Run
from ..distributed.world import World
from ..errors import OutputError
from .checkpoint_store import NullStore, RunStore, Store
from .layout import RUNS, checkpoints_in, new_folder
from .lock import RunLock, write_json

_PATIENCE = 30.0  # seconds for the processes of a group that was started again to be gone


@dataclass(frozen=True)
class RunFolder:
    """Where a run's files are."""

    path: Path
    again: bool
    """The launcher started this run before: it goes on where it was."""
    mark: str
    """What a rank finds there if it sees the same folder as rank 0."""
    what: str
    """Digest of recipe and data: one launcher may start several runs."""
    lock: RunLock | None = None
    """On rank 0."""


def open_folder(world: World, options: Run, recipe: Recipe, title: str) -> RunFolder:
    """The run's folder, the same on every rank; on rank 0 locked, and refused if it holds another run."""
    what = digest([recipe.to_dict(), *(str(getattr(options, name)) for name in DATA_OPTIONS)])
    known = _opened_before(world, options, what)
    locks: list[RunLock] = []

    def choose() -> RunFolder:
        path = known or options.out or new_folder(title)
        lock = RunLock(path, patience=_PATIENCE if known else 0.0)
        folder = RunFolder(path, known is not None, secrets.token_hex(8), what)
        try:
            if not known:
                _refuse_used(path, options)
            _leave_word(folder, world)
        except OutputError:
            lock.abandon()
            raise
        locks.append(lock)
        return folder

    with world.status.during("opening the run's folder", 2 * _PATIENCE):
        folder = world.on_rank_zero(choose)
    return dataclasses.replace(folder, lock=locks[0]) if locks else folder


def _opened_before(world: World, options: Run, what: str) -> Path | None:
    """The folder that this run had before its launcher started it again, if it did."""
    # Each rank knows its own launcher, and looks on its own host: rank 0 may have come anew.
    starter = world.peers[world.rank].starter
    mine = lambda word: word["what"] == what and starter in word["starters"]  # noqa: E731
    found = next((path for path in _candidates(options) if mine(_word_in(path))), None)
    has = world.all_gather(torch.tensor([found is not None], device=world.device)).flatten()
    return Path(world.broadcast_object(str(found), int(has.int().argmax()))) if has.any() else None


def _candidates(options: Run) -> list[Path]:
    return [options.out] if options.out else sorted(RUNS.glob("*"), reverse=True)


def _word_in(path: Path) -> dict[str, Any]:
    """What the last group that opened a folder left there: its mark, its run, who started its processes."""
    try:
        word = json.loads((path / ".group").read_text())
        starters = [name for name in word["starters"] if name]
        return {"mark": word["mark"], "what": word["what"], "starters": starters}
    except (OSError, ValueError, KeyError, TypeError):
        return {"mark": "", "what": "", "starters": []}


def _leave_word(folder: RunFolder, world: World) -> None:
    starters = sorted({peer.starter for peer in world.peers})
    word = {"mark": folder.mark, "what": folder.what, "starters": starters}
    write_json(folder.path / ".group", word)


def _refuse_used(path: Path, options: Run) -> None:
    mine = (path / "checkpoints").resolve()
    resuming_here = options.resume is not None and Path(options.resume).resolve().parent == mine
    if checkpoints_in(mine) and options.resume != "auto" and not resuming_here:
        raise OutputError(
            f"--out {path} already holds a run: add --resume auto to go on, or choose another folder"
        )


def open_store(world: World, options: Run, folder: RunFolder, every_seconds: float | None) -> Store:
    """Rank 0's writes into the folder, and so does one rank's on each host that does not see it."""

    def make() -> Store:
        if world.rank == 0:
            return RunStore(folder.path, options.keep, every_seconds)
        if world.local_rank != 0 or _word_in(folder.path)["mark"] == folder.mark:
            return NullStore()
        if not folder.again:
            _refuse_used(folder.path, options)
        try:
            store = RunStore(folder.path, options.keep, every_seconds)
            _leave_word(dataclasses.replace(folder, mark=""), world)
            return store
        except OutputError:  # a host where nothing can be written: there are others
            return NullStore()

    return world.on_every_rank(make)
