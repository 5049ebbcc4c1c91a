"""A run's folder at its start: chosen, locked, and resumed from if asked to.

Rank 0 does what touches files; the others are told what came of it.
"""

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .checkpoint import Content, decode, read_bytes, versions
from .config import Recipe, Run, flag
from .errors import CheckpointError, OutputError
from .share import Data
from .store import NullStore, RunLock, RunStore, Store, checkpoints_in
from .train import State
from .world import World


def open_folder(world: World, options: Run, title: str) -> tuple[Path, RunLock | None]:
    """The run's folder, the same on every rank; on rank 0 locked, and refused if it holds another run."""
    locks: list[RunLock] = []

    def choose() -> Path:
        folder = options.out or _new_folder(title)
        mine = (folder / "checkpoints").resolve()
        resuming_here = options.resume is not None and Path(options.resume).resolve().parent == mine
        lock = RunLock(folder)
        if checkpoints_in(mine) and options.resume != "auto" and not resuming_here:
            lock.release()
            raise OutputError(
                f"--out {folder} already holds a run: add --resume auto to go on, or choose another folder"
            )
        locks.append(lock)
        return folder

    folder = world.from_rank_zero(choose)
    return folder, locks[0] if locks else None


def _new_folder(title: str) -> Path:
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{Path(title).stem}"
    names = [stamp, *(f"{stamp}-{again}" for again in range(2, 100))]
    return next(Path("runs") / name for name in names if not (Path("runs") / name).exists())


def open_store(world: World, options: Run, folder: Path) -> Store:
    """Rank 0's writes into the folder; the others' does nothing."""
    return world.together(lambda: RunStore(folder, options.keep) if world.rank == 0 else NullStore())


def read_named(world: World, options: Run) -> bytes | None:
    """The checkpoint that `--resume` names, on every rank. Only rank 0's host needs to have it."""
    if options.resume in (None, "auto"):
        return None
    raw = world.from_rank_zero(lambda: read_bytes(Path(options.resume or "")))
    decode(raw, str(options.resume))
    return raw


def resume(
    world: World,
    options: Run,
    store: Store,
    named: bytes | None,
    state: State,
    *,
    refuse: Callable[[Content, str], None],
    complain: Callable[[str], None],
) -> str | None:
    """Take the state from the checkpoint asked for, if any; its path.

    `named` is what `read_named` gave. `refuse` raises for a checkpoint that does not belong to this run.
    """
    found = (options.resume or "", named) if named is not None else None
    if options.resume == "auto":

        def newest() -> tuple[str, bytes] | None:
            newest = store.newest(complain)
            if newest is None:
                complain("nothing to resume: starting from the beginning")
            return newest and (str(newest[0]), newest[1])

        found = world.from_rank_zero(newest)
    if found is None:
        return None
    name, raw = found
    content = decode(raw, name)
    refuse(content, name)
    state.restore(content, name)
    store.resumed_from(name)
    here, there = versions(), content["versions"]
    changed = [
        f"{key} {there[key]} then, {here[key]} now"
        for key in here
        if there.get(key, here[key]) != here[key]
    ]
    if changed:
        complain(f"{name} was made elsewhere ({'; '.join(changed)}): the last bits may come out different")
    return name


def refuse_mismatch(content: Content, name: str, recipe: Recipe, data: Data) -> None:
    """Raise `CheckpointError` if a checkpoint is of another recipe or of other data, showing how."""
    if content["recipe"] is None:
        raise CheckpointError(
            f"{name} is the original script's: go on with multi_proc_single_gpu.py --resume {name}"
        )
    differences = Recipe.from_dict(content["recipe"], name).differences(recipe)
    if differences:
        shown = ", ".join(f"{flag(key)} {old} there, {new} here" for key, (old, new) in differences.items())
        hint = "; the rate of this recipe looks ahead to the last epoch" if "epochs" in differences else ""
        raise CheckpointError(f"{name} is of another recipe: {shown}{hint}")
    if content["step"] > recipe.epochs * content["steps_per_epoch"]:
        raise CheckpointError(
            f"{name} is past the end: step {content['step']}, --epochs {recipe.epochs} here"
        )
    theirs = content["dataset"]
    if theirs["sha256"] != data.sha256:
        raise CheckpointError(
            f"{name} is of other data: {theirs['name']} {theirs['sha256'][:12]}… there, "
            f"{data.name} {data.sha256[:12]}… here"
        )


def described(recipe: Recipe, options: Run, data: Data) -> dict[str, Any]:
    """`config.json`: what was asked for and what it was taken to mean, in plain values."""
    run = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
    found = {**data.to_dict(), "source": data.source}
    return {"recipe": recipe.to_dict(), "run": run, "dataset": found, "versions": versions()}
