"""A run's folder at its start: chosen, locked, and resumed from if asked to or if started again.

Rank 0 does what touches files; the others are told what came of it. On a host that does not see rank 0's
folder one rank keeps a copy of the checkpoints, so that losing a host loses none.
"""

import dataclasses
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Content, decode, read_bytes, versions
from .config import DATA_OPTIONS, Recipe, Run, flag
from .digest import digest
from .errors import CheckpointError, OutputError, UsageError
from .layout import RUNS, checkpoints_in, go_on, new_folder
from .lock import RunLock, write_json
from .share import Data
from .store import NullStore, RunStore, Store
from .train import State
from .world import World

_PATIENCE = 30.0  # seconds for the processes of a group that was started again to be gone


@dataclass(frozen=True)
class Folder:
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


def require_one_recipe(world: World, recipe: Recipe) -> None:
    """Raise `UsageError` if ranks were started with different flags, for they would wait for each other,
    and for a recipe that has no work for so many."""
    if others := world.differing(digest(recipe.to_dict())):
        told = f"rank {others[0]} was given another recipe than rank 0"
        hint = "; where rank 0 alone sees the run that goes on, that means --recipe and the data too"
        raise UsageError(f"{told}: start all with the same flags{hint}")
    recipe.check_size(world.size)


def open_folder(world: World, options: Run, recipe: Recipe, title: str) -> Folder:
    """The run's folder, the same on every rank; on rank 0 locked, and refused if it holds another run."""
    what = digest([recipe.to_dict(), *(str(getattr(options, name)) for name in DATA_OPTIONS)])
    known = _opened_before(world, options, what)
    locks: list[RunLock] = []

    def choose() -> Folder:
        path = known or options.out or new_folder(title)
        lock = RunLock(path, patience=_PATIENCE if known else 0.0)
        folder = Folder(path, known is not None, secrets.token_hex(8), what)
        try:
            if not known:
                _refuse_used(path, options)
            _leave_word(folder, world)
        except OutputError:
            lock.abandon()
            raise
        locks.append(lock)
        return folder

    with world.vitals.during("opening the run's folder", 2 * _PATIENCE):
        folder = world.from_rank_zero(choose)
    return dataclasses.replace(folder, lock=locks[0]) if locks else folder


def _opened_before(world: World, options: Run, what: str) -> Path | None:
    """The folder that this run had before its launcher started it again, if it did."""
    # Each rank knows its own launcher, and looks on its own host: rank 0 may have come anew.
    starter = world.peers[world.rank].starter
    mine = lambda word: word["what"] == what and starter in word["starters"]  # noqa: E731
    found = next((path for path in _candidates(options) if mine(_word_in(path))), None)
    has = world.gather(torch.tensor([found is not None], device=world.device)).flatten()
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


def _leave_word(folder: Folder, world: World) -> None:
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


def open_store(world: World, options: Run, folder: Folder, every_seconds: float | None) -> Store:
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

    return world.together(make)


def _named(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder: --resume names a checkpoint; a run goes on with {go_on(path)}"
        )
    return read_bytes(path)


def read_named(world: World, options: Run) -> bytes | None:
    """The checkpoint that `--resume` names, on every rank. Only rank 0's host needs to have it."""
    if options.resume in (None, "auto"):
        return None
    raw = world.from_rank_zero(lambda: _named(Path(options.resume or "")))
    decode(raw, str(options.resume))
    return raw


def resume(
    world: World,
    options: Run,
    folder: Folder,
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
    if options.resume == "auto" or folder.again:
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
    mine = world.together(lambda: store.newest(complain))
    steps = world.gather(torch.tensor([mine[2] if mine else -1], device=world.device)).flatten()
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
