"""Resume a run: find its checkpoint, refuse a checkpoint from another run, and restore the state.

Rank 0 reads the files and sends the checkpoint to the other ranks.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.compute_platform import differences
from ..config import Recipe, Run, describe_shape, flag
from ..data.broadcast import Data
from ..distributed.world import World
from ..errors import CheckpointError
from ..runs.checkpoint import Content, decode, read_bytes, versions
from ..runs.checkpoint_store import Store, newest_checkpoint
from ..runs.initial_weights import load_initial_weights, read_initial_weights
from ..runs.layout import resume_flags
from ..runs.run_folder import RunFolder, folder_before_restart
from .state import State


def read_requested_checkpoint(world: World, options: Run) -> bytes | None:
    """Return the checkpoint that `--resume` names, on every rank. Only rank 0's host needs the file.

    Returns None if `--resume` is not given or is "auto". Raises `CheckpointError` if the file cannot be
    read.
    """
    if options.resume is None or options.resume == "auto":
        return None
    path = Path(options.resume)
    raw = world.on_rank_zero(lambda: _read_file(path), bytes)
    decode(raw, options.resume)
    return raw


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, but --resume takes a checkpoint; to resume a run use {resume_flags(path)}"
        )
    return read_bytes(path)


def with_kept_precision(world: World, recipe: Recipe, options: Run, requested: bytes | None) -> Recipe:
    """Return a recipe with the precision of the run that is resumed, or that its launcher has restarted.

    So the run goes on in it on other hardware. `requested` is the result of `read_requested_checkpoint`. A
    run that starts from the beginning keeps its recipe. All ranks must call it.
    """
    raw, name = requested, str(options.resume)
    if raw is None:
        resumed = options.resume == "auto"
        folder = options.out if resumed else folder_before_restart(world, recipe, options)
        if folder is None:
            return recipe
        # `resume` finds the same checkpoint, and tells the user about damaged ones.
        found = _newest_of_all_ranks(world, lambda warn: newest_checkpoint(folder, warn), lambda _: None)
        if found is None:
            return recipe
        name, raw = found
    there = decode(raw, name)["recipe"]
    return recipe.replace(precision=Recipe.from_dict(there, name).precision) if there else recipe


def resume(
    world: World,
    options: Run,
    folder: RunFolder,
    store: Store,
    requested: bytes | None,
    state: State,
    recipe: Recipe,
    data: Data,
    complain: Callable[[str], None],
) -> str | None:
    """Restore the state from a checkpoint, if there is one to resume from, and return its path.

    After a restart by a launcher, the run's newest checkpoint takes precedence over `--resume`. `requested`
    is the result of `read_requested_checkpoint`. `complain` is called with each notice for the user. Raises
    `CheckpointError` for a checkpoint that does not belong to this run.
    """
    found = (options.resume or "", requested) if requested is not None else None
    if options.resume == "auto" or folder.restarted:
        found = _newest_of_all_ranks(world, store.newest, complain) or found
        if found is None:
            complain("there is no checkpoint yet: starting from the beginning")
    if found is None:
        return None
    name, raw = found
    content = decode(raw, name)
    require_same_run(content, name, recipe, data)
    state.restore(content, name)
    store.resumed_from(name, state.step)
    exact = recipe.precision == "exact"  # the same on every platform
    if not exact and (notice := platform_notice(content, name, world.device)):
        complain(notice)
    return name


def start_from(world: World, state: State, path: Path) -> None:
    """Load the weights that `--init-from` names. Only rank 0's host needs the file.

    A run that is resumed has all that it needs in its checkpoint. Raises `CheckpointError`.
    """
    name, raw = world.on_rank_zero(partial(read_initial_weights, path), tuple[str, bytes])
    world.on_every_rank(lambda: load_initial_weights(state.model, name, raw))


def platform_notice(content: Content, name: str, device: torch.device) -> str | None:
    """Say how this platform differs from that on which a checkpoint was computed; None if it does not.

    A checkpoint of an earlier version does not say everything. What it does not say counts as equal.
    """
    changes = differences(content.get("versions") or {}, versions(device), ("then", "now"))
    return (
        f"{name} was computed differently ({'; '.join(changes)}): the last bits may differ"
        if changes
        else None
    )


def _newest_of_all_ranks(
    world: World,
    newest: Callable[[Callable[[str], None]], tuple[Path, bytes, int] | None],
    complain: Callable[[str], None],
) -> tuple[str, bytes] | None:
    """Return path (and host) and bytes of the newest undamaged checkpoint on any host, or None.

    `newest` finds this host's, as `Store.newest` does.
    """
    mine = world.on_every_rank(lambda: newest(complain))
    steps = world.all_gather(torch.tensor([mine[2] if mine else -1], device=world.device)).flatten()
    holder = int(steps.argmax())
    if steps[holder] < 0:
        return None
    host = "" if holder == 0 else f" on {world.peers[holder].host}"
    name = world.broadcast_object(f"{mine[0]}{host}" if mine else "", str, holder)
    return name, world.broadcast_bytes(mine[1] if mine else None, holder)


def require_same_run(content: Content, name: str, recipe: Recipe, data: Data) -> None:
    """Raise `CheckpointError`, listing the differences, if a checkpoint's recipe or data is different."""
    if content["recipe"] is None:
        raise CheckpointError(
            f"{name} is from the original script: resume it with multi_proc_single_gpu.py --resume {name}"
        )
    differences = Recipe.from_dict(content["recipe"], name).differences(recipe)
    if differences:
        shown = ", ".join(f"{flag(key)} {old} there, {new} here" for key, (old, new) in differences.items())
        hint = ""
        if {"epochs", "steps"} & differences.keys():
            depends = "choice" if recipe.validation else "average"
            hint = f"; this recipe's learning rate or {depends} of weights depends on the length of the run"
        raise CheckpointError(
            f"{name} was trained with a different recipe: {shown}{hint}; resume it with its own flags, or "
            "choose another --out"
        )
    if content["step"] > recipe.total_steps(content["steps_per_epoch"]):
        limit = f", --steps {recipe.steps}" if recipe.steps else ""
        raise CheckpointError(
            f"{name} is past the end of this run: it is from step {content['step']}, but this run has "
            f"--epochs {recipe.epochs}{limit}"
        )
    if problem := data_differences(content["dataset"], data):
        raise CheckpointError(f"{name} was trained on {problem}")


def data_differences(there: dict[str, Any], data: Data) -> str | None:
    """Return what in a checkpoint's data set would give other weights with `data`; None if nothing would.

    The names of the data set and of its classes do not change the weights.
    """
    if (shape := tuple(there["image_shape"])) != data.image_shape:
        return f"images of {describe_shape(shape)}, but here they are {describe_shape(data.image_shape)}"
    if there["sha256"] != data.sha256:
        pair = f"{there['name']} {there['sha256'][:12]}… there, {data.name} {data.sha256[:12]}… here"
        return f"different data: {pair}"
    names = there["name"], data.name
    numbers = {
        "mean": (there["mean"], data.mean),
        "deviation": (there["std"], data.std),
        "number of classes": (len(there["class_names"]), len(data.class_names)),
    }
    different = [f"{key} {old} there, {new} here" for key, (old, new) in numbers.items() if old != new]
    if not different:
        return None
    hint = f"; it was --dataset {names[0]}, not {names[1]}" if names[0] != names[1] else ""
    return f"the same images with different settings: {', '.join(different)}{hint}"


def run_config(recipe: Recipe, options: Run, data: Data, device: torch.device) -> dict[str, Any]:
    """Return the content of `config.json`: recipe, options, data set and versions, as plain values."""
    run = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
    }
    dataset = {**data.to_dict(), "source": data.source}
    return {"recipe": recipe.to_dict(), "run": run, "dataset": dataset, "versions": versions(device)}
