"""What a run says when it starts, and when the user's model fails."""

from pathlib import Path

import torch

from ..common import environment
from ..common.placement import usable_cores
from ..config import UNUSED_IN_EXACT, Recipe, Run, flag
from ..data.broadcast import Data
from ..distributed.peer import describe_devices
from ..distributed.world import World
from ..gradients.tree_sum import shard_sizes
from ..runs.run_folder import RunFolder
from .preparation import Preparation
from .state import State, TrainingContext


def log_start(
    state: State, context: TrainingContext, lines: dict[str, str], notices: list[str], *, again: bool
) -> None:
    """Log the start of the run, with the lines and notices to print. `again`: after a restart."""
    context.sink.log(
        "start",
        lines=lines,
        world_size=context.world.size,
        step=state.step,
        steps=context.batches.total_steps,
        epochs=context.recipe.epochs,
        again=again,
        ranks=[
            {"rank": peer.rank, "host": peer.host, "pid": peer.pid, "device": peer.device}
            for peer in context.world.peers
        ],
    )
    for text in notices:
        context.sink.log("notice", text=text)


def add_place(state: State, context: TrainingContext, resume_flags: str, problem: str) -> str:
    """Add to a problem the step at which it came, and from where to resume."""
    context.store.finished(wait=True)
    saved = f"; last good checkpoint: {context.store.last_good()}" if context.world.rank == 0 else ""
    return (
        f"step {context.world.status.step or state.step + 1}: {problem}{saved}; resume with {resume_flags}"
    )


def start_notices(world: World, prepared: Preparation, folder: RunFolder) -> list[str]:
    """Return the notices to print before training starts."""
    recipe, data, threads = prepared.recipe, prepared.data, prepared.threads
    notices = [] if folder.restarted else oversubscription_warnings(world, threads)
    if folder.lock is not None and folder.lock.note is not None:
        notices.append(folder.lock.note)
    if world.restarts and not folder.restarted:
        notices.append(f"{world.launcher} has restarted this run, but its folder was not found")
    notices += unused_settings(recipe, prepared.options)
    notices += equal_parts(world, prepared.options)
    kinds = ("training", "validation") if data.validation else ("training",)
    notices += [text for kind in kinds if (text := empty_classes(data, kind))]
    if recipe.patience and recipe.schedule not in ("constant", "step"):
        notices.append(
            f"--patience may stop the run before --schedule {recipe.schedule} has lowered the learning rate"
        )
    if recipe.batch_size > len(data.train):
        images = f"the {len(data.train):,} training images"
        notices.append(f"--batch-size {recipe.batch_size} is more than {images}")
    return notices


def unused_settings(recipe: Recipe, options: Run) -> list[str]:
    """Return a notice about settings that have no effect in the run's precision, else nothing."""
    if recipe.precision != "exact":
        if options.balance == Run.balance:
            return []
        return [f"--balance {options.balance} changes nothing without --precision exact"]
    given = [
        f"{flag(name)} {getattr(recipe, name)}"
        for name in UNUSED_IN_EXACT
        if getattr(recipe, name) != getattr(Recipe, name)
    ]
    if not given:
        return []
    verb = "change" if len(given) > 1 else "changes"
    return [f"{' and '.join(given)} {verb} nothing with --precision exact"]


def equal_parts(world: World, options: Run) -> list[str]:
    """Return a notice if ranks get as many images as others that are surely faster, else nothing."""
    if options.balance == "auto" or len({peer.device for peer in world.peers}) == 1:
        return []
    return [
        "ranks on different kinds of device get equally many images: --balance auto follows their speed"
    ]


def empty_classes(data: Data, kind: str = "training") -> str | None:
    """Return a notice about classes without training or validation images; None if there are none.

    They are usual where digits are generated, but few.
    """
    split = data.validation if kind == "validation" and data.validation else data.train
    counts = torch.bincount(split.labels.cpu().long(), minlength=len(data.class_names))
    empty = [data.class_names[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if not empty or data.name == "generated":
        return None
    shown = ", ".join(empty[:4]) + (f" and {len(empty) - 4} more" if len(empty) > 4 else "")
    return f"no {kind} image has the class {shown} (classes are counted from 0)"


def oversubscription_warnings(world: World, threads: int) -> list[str]:
    """Return a warning if this host's processes have more threads than cores, else nothing."""
    wanted, cores = world.local_size * threads, usable_cores()
    if world.device.type != "cpu" or wanted <= cores:
        return []
    if (names := environment.thread_binding()) and cores == 1:
        return [f"{' and '.join(names)} may bind all processes to one core: unset it to use more cores"]
    processes, shared = world.local_size, _count(cores, "core")
    if threads > 1:
        who = f"{_count(processes, 'process', 'processes')} with {threads} threads on {shared}"
        return [f"{who}: same answer, slower than OMP_NUM_THREADS={max(1, cores // processes)}"]
    return [f"{processes} processes share {shared}: same answer, slower than --nproc {cores}"]


def start_lines(world: World, prepared: Preparation, folder: Path) -> dict[str, str]:
    """Return the labelled lines that a run prints when it starts."""
    recipe, data, properties = prepared.recipe, prepared.data, prepared.properties
    processes = _count(world.size, "process", "processes")
    if world.size > 1:
        processes += f" ({world.launcher}, {world.backend})"
    length = _count(recipe.epochs, "epoch")
    if recipe.steps:
        length = f"at most {_count(recipe.steps, 'step')} or {length}"
    norm = ""
    if properties.statistics_layers:
        sizes = sorted(set(shard_sizes(min(recipe.batch_size, len(data.train)), recipe.shards)))
        norm = f" (batch norm over each shard of {' or '.join(map(str, sizes))} images)"
    if recipe.precision == "exact":
        arithmetic = "exact arithmetic"
    else:
        sync = "tree" if recipe.sync == "tree" else "DistributedDataParallel"
        arithmetic = f"{sync} over {_count(recipe.shards, 'shard')}{norm}, {recipe.precision}"
    counts = " + ".join(f"{len(split):,}" for split in (data.train, data.validation, data.test) if split)
    counts += " images (training, validation, test)" if data.validation is not None else " images"
    kinds = describe_devices(world.peers)
    where = f": {kinds}" if "," in kinds else f" on {kinds}"
    if kinds == "cpu":
        where += f", {_count(prepared.threads, 'thread')} each"
    return {
        "recipe": f"{prepared.title}: {recipe.model} with {properties.parameters:,} parameters, "
        f"{length} in batches of {recipe.batch_size}, "
        f"{arithmetic}, seed {recipe.seed}",
        "data": f"{data.name}, {counts}, {data.source}",
        "world": processes + where,
        "out": str(folder),
    }


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
