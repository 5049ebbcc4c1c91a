"""Resume a run: find its checkpoint, refuse one of another run, restore the state.

Rank 0 reads the files and sends the checkpoint to the other ranks.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..common.digest import digest
from ..config import Recipe, Run, flag
from ..data.broadcast import Data
from ..distributed.world import World
from ..errors import CheckpointError, UsageError
from ..runs.checkpoint import Content, decode, read_bytes, versions
from ..runs.checkpoint_store import Store
from ..runs.layout import resume_flags
from ..runs.run_folder import RunFolder
from .loop import State


def require_one_recipe(world: World, recipe: Recipe) -> None:
    """Raise `UsageError` if ranks were started with different flags, for they would wait for each other,
    and for a recipe that has no work for so many."""
    if others := world.differing(digest(recipe.to_dict())):
        told = f"rank {others[0]} was given another recipe than rank 0"
        hint = "; where rank 0 alone sees the run that goes on, that means --recipe and the data too"
        raise UsageError(f"{told}: start all with the same flags{hint}")
    recipe.check_size(world.size)


def _named(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder: --resume names a checkpoint; a run goes on with {resume_flags(path)}"
        )
    return read_bytes(path)


def read_named(world: World, options: Run) -> bytes | None:
    """The checkpoint that `--resume` names, on every rank. Only rank 0's host needs to have it."""
    if options.resume in (None, "auto"):
        return None
    raw = world.on_rank_zero(lambda: _named(Path(options.resume or "")))
    decode(raw, str(options.resume))
    return raw


def resume(
    world: World,
    options: Run,
    folder: RunFolder,
    store: Store,
    named: bytes | None,
    state: State,
    *,
    refuse: Callable[[Content, str], None],
    complain: Callable[[str], None],
) -> str | None:
    """Take the state from the checkpoint asked for, if any; its path.

    Of a run that was started again that is the newest, whatever was asked for. `named` is what `read_named`
    gave. `refuse` raises for a checkpoint that does not belong to this run.
    """
    found = (options.resume or "", named) if named is not None else None
    if options.resume == "auto" or folder.restarted:
        found = _newest(world, store, complain) or found
        if found is None:
            complain("there is no checkpoint yet: starting from the beginning")
    if found is None:
        return None
    name, raw = found
    content = decode(raw, name)
    refuse(content, name)
    state.restore(content, name)
    store.resumed_from(name, state.step)
    here, there = versions(), content["versions"]
    changed = [
        f"{key} {there[key]} then, {here[key]} now"
        for key in here
        if there.get(key, here[key]) != here[key]
    ]
    if changed:
        told = "; ".join(changed)
        complain(f"{name} was made by other versions ({told}): the last bits may come out different")
    return name


def _newest(world: World, store: Store, complain: Callable[[str], None]) -> tuple[str, bytes] | None:
    """The newest whole checkpoint of all hosts and where it was found."""
    mine = world.on_every_rank(lambda: store.newest(complain))
    steps = world.all_gather(torch.tensor([mine[2] if mine else -1], device=world.device)).flatten()
    holder = int(steps.argmax())
    if steps[holder] < 0:
        return None
    where = "" if holder == 0 else f" on {world.peers[holder].host}"
    name = world.broadcast_object(f"{mine[0]}{where}" if mine else "", holder)
    return name, world.broadcast_bytes(mine[1] if mine else None, holder)


def refuse_mismatch(content: Content, name: str, recipe: Recipe, data: Data) -> None:
    """Raise `CheckpointError` if a checkpoint is of another recipe or of other data, showing how."""
    if content["recipe"] is None:
        raise CheckpointError(
            f"{name} is the original script's: go on with multi_proc_single_gpu.py --resume {name}"
        )
    differences = Recipe.from_dict(content["recipe"], name).differences(recipe)
    if differences:
        shown = ", ".join(f"{flag(key)} {old} there, {new} here" for key, (old, new) in differences.items())
        ahead = {"epochs", "steps"} & differences.keys()
        hint = "; this recipe's rate or average of weights looks ahead to the end" if ahead else ""
        raise CheckpointError(
            f"{name} is of another recipe: {shown}{hint}; go on with its flags, or choose another --out"
        )
    if content["step"] > recipe.total_steps(content["steps_per_epoch"]):
        limit = f", --steps {recipe.steps}" if recipe.steps else ""
        raise CheckpointError(
            f"{name} is past the end: step {content['step']}, --epochs {recipe.epochs}{limit} here"
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
