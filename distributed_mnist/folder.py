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
from .errors import CheckpointError, OutputError, UsageError
from .share import Data
from .store import NullStore, RunLock, RunStore, Store, checkpoints_in, write_json
from .train import State
from .world import World


def open_folder(world: World, options: Run, title: str) -> tuple[Path, RunLock | None]:
    """The run's folder, the same on every rank; on rank 0 locked, and refused if it holds another run."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    locks: list[RunLock] = []

    def choose() -> Path:
        folder = options.out
        if folder is None and options.resume == "auto":
            raise UsageError("--resume auto needs --out: the folder of the run to go on with")
        if folder is None:
            folder = Path("runs") / f"{stamp}-{Path(title).stem}"
            for attempt in range(2, 100):
                if not folder.exists():
                    break
                folder = Path("runs") / f"{stamp}-{Path(title).stem}-{attempt}"
        locks.append(RunLock(folder))
        mine = (folder / "checkpoints").resolve()
        goes_on = options.resume == "auto" or Path(options.resume or "").resolve().parent == mine
        if checkpoints_in(mine) and not goes_on:
            raise OutputError(
                f"--out {folder} already holds a run: add --resume auto to go on, or choose another folder"
            )
        return folder

    folder = world.from_rank_zero(choose)
    return folder, locks[0] if locks else None


def resume(
    world: World,
    options: Run,
    folder: Path,
    state: State,
    recipe: Recipe,
    data: Data,
    complain: Callable[[str], None],
) -> tuple[Store, str | None]:
    """This rank's store, and the checkpoint's path if the state was taken from one.

    Rank 0 reads the file and broadcasts it, so only its host needs to have it.
    """
    store = RunStore(folder, options.keep) if world.rank == 0 else NullStore()

    def find() -> tuple[str, bytes] | None:
        if options.resume is None:
            return None
        if options.resume == "auto":
            assert isinstance(store, RunStore)
            newest = store.newest(complain)
            if newest is None:
                complain(f"nothing to resume in {folder}: starting from the beginning")
            return newest and (str(newest[0]), newest[1])
        data = read_bytes(Path(options.resume))
        decode(data, options.resume)
        return options.resume, data

    found = world.from_rank_zero(find)
    if world.rank == 0 and (found is None or not (folder / "config.json").exists()):
        write_json(folder / "config.json", describe_config(recipe, options))
    if found is None:
        return store, None
    name, raw = found
    content = decode(raw, name)
    refuse_mismatch(content, recipe, data, name)
    state.restore(content, name)
    here, there = versions(), content.get("versions", {})
    changed = [
        f"{key} {there[key]} then, {here[key]} now"
        for key in here
        if there.get(key, here[key]) != here[key]
    ]
    if changed:
        complain(f"{name} was made elsewhere ({'; '.join(changed)}): the last bits may come out different")
    return store, name


def refuse_mismatch(content: Content, recipe: Recipe, data: Data, name: str) -> None:
    """Raise `CheckpointError` if a checkpoint is of another recipe or of other data, showing how."""
    if content["recipe"] is None:
        raise CheckpointError(
            f"{name} is the original script's: go on with multi_proc_single_gpu.py --resume {name}"
        )
    differences = Recipe.from_dict(content["recipe"], name).differences(recipe)
    if differences:
        shown = ", ".join(f"{flag(key)} {old} there, {new} here" for key, (old, new) in differences.items())
        raise CheckpointError(f"{name} is of another recipe: {shown}")
    theirs = content["dataset"]
    if theirs["sha256"] != data.sha256:
        raise CheckpointError(
            f"{name} is of other data: {theirs['name']} {theirs['sha256'][:12]}… there, "
            f"{data.name} {data.sha256[:12]}… here"
        )


def describe_config(recipe: Recipe, options: Run) -> dict[str, Any]:
    """`config.json`: what was asked for, in plain values."""
    plain = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(options).items()
    }
    return {"recipe": recipe.to_dict(), "run": plain, "versions": versions()}
