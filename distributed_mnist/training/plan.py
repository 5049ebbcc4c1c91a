"""What a run would do, for `dmnist train --dry-run`: the last checks before it writes its first file."""

import dataclasses
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from ..config import Recipe
from ..distributed.peer import describe_devices
from ..distributed.world import World
from ..errors import OutputError
from ..models.summary import layers_of
from ..optim.schedule import make_optimizer
from ..runs.checkpoint import decode, encode
from ..runs.checkpoint_store import newest_checkpoint
from ..runs.initial_weights import load_initial_weights, read_initial_weights
from ..runs.layout import CHECKPOINTS, checkpoints_in, new_folder
from ..runs.run_folder import RunFolder, require_usable
from ..user_code.failures import model_failures
from .batches import Batches
from .notices import start_lines, start_notices
from .preparation import Preparation
from .resume import require_same_run
from .state import State

_OTHER_FILES_BYTES = 16_384  # config.json, metrics.jsonl and others beside the checkpoints


def make_plan(world: World, prepared: Preparation) -> dict[str, Any]:
    """Check the folder and the checkpoint to resume from, and return what the run would do.

    All ranks must call it. It changes the state. Raises `OutputError` and `CheckpointError`, as the run
    would.
    """
    recipe, options, requested = prepared.recipe, prepared.options, prepared.requested
    data, batches, state = prepared.data, prepared.batches, prepared.state

    def make() -> dict[str, Any]:
        folder = options.out or new_folder(prepared.title)
        require_usable(folder, options)
        found = (options.resume or "", requested) if requested is not None else None
        opened = RunFolder(folder, restarted=False, token="", run_id="")
        messages = [*prepared.notices, *start_notices(world, prepared, opened)]
        if options.resume == "auto":
            newest = newest_checkpoint(folder, messages.append)
            found = (str(newest[0]), newest[1]) if newest else None
        if found is not None:
            content = decode(found[1], found[0])
            require_same_run(content, found[0], recipe, data)
            state.restore(content, found[0])
        elif options.init_from is not None:
            load_initial_weights(state.model, *read_initial_weights(Path(options.init_from)))
        shown = start_lines(world, prepared, folder)
        shown["steps"] = _steps(state, batches, found[0] if found else None)
        checkpoint_bytes, free_bytes = _checkpoint_bytes(state, recipe), _free_bytes(folder)
        room = f"{folder}: {_in_units(free_bytes)} are free, but "
        # A run removes old checkpoints to make room for a new one, but never the newest.
        old = sum(path.stat().st_size for path in checkpoints_in(folder / CHECKPOINTS)[:-1])
        if free_bytes < _OTHER_FILES_BYTES or free_bytes + old < checkpoint_bytes:
            raise OutputError(
                f"{room}a checkpoint takes {_in_units(checkpoint_bytes)}: choose another --out"
            )
        if free_bytes < (most := checkpoint_bytes * (options.keep + 2)):
            messages.append(f"{room}its checkpoints may take {_in_units(most)}")
        memory_bytes = _peak_memory()
        shown["disk"] = f"{_in_units(checkpoint_bytes)} for each checkpoint, {_in_units(free_bytes)} free"
        shown["memory"] = f"{_in_units(memory_bytes)} in each process, before the first step"
        with model_failures(recipe.model):
            layers = layers_of(state.model, data.image_shape, world.device)
        return {
            "lines": shown,
            "notices": messages,
            "recipe": recipe.to_dict(),
            "dataset": data.name,
            "train_images": len(data.train),
            "validation_images": len(data.validation or ()),
            "test_images": len(data.test),
            "step": state.step,
            "steps": batches.total_steps,
            "steps_per_epoch": batches.steps_per_epoch,
            "parameters": sum(layer.parameters for layer in layers),
            "layers": [dataclasses.asdict(layer) for layer in layers],
            "world_size": world.size,
            "launcher": world.launcher,
            "device": describe_devices(world.peers),
            "threads": prepared.threads,
            "checkpoint_bytes": checkpoint_bytes,
            "free_bytes": free_bytes,
            "memory_bytes": memory_bytes,
            "resume": found[0] if found else None,
            "out": str(folder),
        }

    return world.on_rank_zero(make, dict[str, Any])


def _in_units(count: int) -> str:
    """Return a number of bytes in megabytes or gigabytes."""
    return f"{count / 1e9:,.0f} GB" if count >= 10e9 else f"{count / 1e6:,.{int(count < 10e6)}f} MB"


def _steps(state: State, batches: Batches, resumed: str | None) -> str:
    total = f"{batches.total_steps:,} (an epoch has {batches.steps_per_epoch:,})"
    return f"{total}, resuming after step {state.step:,} from {resumed}" if resumed else total


def _free_bytes(folder: Path) -> int:
    """Return how much can be written to a folder, which may not exist yet."""
    return shutil.disk_usage(
        next(path for path in (folder, *folder.absolute().parents) if path.exists())
    ).free


def _checkpoint_bytes(state: State, recipe: Recipe) -> int:
    """Return the size of the largest checkpoint: after a step, when the optimizer's state exists."""
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer = make_optimizer(recipe, state.model)  # shares no work: the other ranks take no step
    optimizer.step()
    weights = sum(p.numel() * p.element_size() for p in state.model.parameters() if p.requires_grad)
    copies = bool(recipe.average or recipe.ema) + bool(recipe.validation)
    return len(encode({**state.to_content(), "optimizer": optimizer.state_dict()})) + copies * weights


def _peak_memory() -> int:
    """Return the most memory that this process has used so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
