"""Run one rank of the original script's job: the same files and output, but with our training loop."""

import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..common.digest import START_OF_CHAIN
from ..common.generators import ModelDraws
from ..common.placement import Placement
from ..common.printable import printable
from ..config import Run, flag, load_recipe
from ..data import datasets
from ..data.broadcast import Data, broadcast_dataset
from ..data.download_progress import DataProgress
from ..distributed.peer import describe_job
from ..distributed.world import World
from ..errors import CheckpointError, OutputError
from ..gradients.loss import make_loss
from ..gradients.setup import make_gradients
from ..launcher.rank_process import run_in_group
from ..launcher.signals import StopSignals
from ..models.build import make_model
from ..optim.schedule import make_optimizer
from ..reporting.events import NullSink
from ..runs.checkpoint import Content, decode, encode, read_bytes, write
from ..runs.checkpoint_store import BackgroundStore, NullStore
from ..runs.original_format import to_original
from ..training.batches import Batches
from ..training.evaluate import evaluate
from ..training.loop import require_same_weights, train
from ..training.platforms import require_one_kind, require_same_platform, use_threads
from ..training.resume import data_differences, platform_notice
from ..training.state import ZERO_TOTALS, State, TrainingContext
from .original_script import Options

FOLDER = Path("checkpoints")  # in the current folder, as in the original
_WITHOUT_EFFECT = {
    "workers": ": the data stays on the device, there are no loader processes",
    "momentum": ", as in the original: it trains with Adam",
    "weight_decay": ", as in the original: it trains with Adam",
    "init_method": ": a free port is chosen automatically",
    "rank": ": ranks are assigned automatically",
}
"""Flags of the original script that are accepted, and why they change nothing."""


def work(placement: Placement, listener: socket.socket | None, options: Options) -> int:
    """Join the process group and run the job. Returns the exit code."""
    without_nccl = options.backend == "nccl" and not torch.cuda.is_available()
    backend = None if without_nccl else options.backend
    names = ("backend", "epochs", "start_epoch", "batch_size", "lr", "seed", "evaluate")
    values = {name: getattr(options, name) for name in names} | {"resume": bool(options.resume)}
    job = describe_job("multi_proc_single_gpu.py", **values)
    return run_in_group(placement, listener, partial(run, options), backend=backend, exact=False, job=job)


def run(options: Options, world: World, signals: StopSignals) -> None:
    """Train or evaluate like the original. Every rank calls it."""

    def say(line: str) -> None:
        if world.rank == 0:
            _print_line(line)

    for note in make_notes(options, world):
        say(f"note: {note}")
    recipe = load_recipe("classic").replace(
        epochs=max(options.epochs, 1),
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        sync="ddp",
        shards=max(8, world.size),
    )
    require_one_kind(world, "set CUDA_VISIBLE_DEVICES= to use only CPUs")
    for note in require_same_platform(world, recipe.sync):
        say(f"note: {note}")
    use_threads(world, recipe)
    content: Content | None = None
    if options.resume:  # before loading the data, so that a missing file is reported at once
        say(f"=> loading checkpoint '{options.resume}'")
        raw = world.on_rank_zero(lambda: read_bytes(Path(options.resume)), bytes)
        content = decode(raw, options.resume)
    with DataProgress(Console(stderr=True)) as progress:
        data = broadcast_dataset(
            world, lambda: datasets.load("mnist", Path(options.root), progress=progress)
        )
    model, traits = make_model(recipe, len(data.class_names), world.device)
    batches = Batches(data.train, recipe, data.mean, data.std)
    state = State(model, make_optimizer(recipe, model), step=options.start_epoch * batches.steps_per_epoch)
    if content is not None:
        name = options.resume
        state.restore(_adapt_checkpoint(content, batches.steps_per_epoch, data, name), name)
        if notice := platform_notice(content, name, world.device):
            say(f"note: {notice}")
        say(f"=> loaded checkpoint '{name}' (epoch {state.step // batches.steps_per_epoch})")
    require_same_weights(state, world)
    if options.evaluate:
        result = evaluate(model, data, world, recipe.precision, exact=False)
        say(f"test loss: {result.loss:.6f}, test acc: {result.accuracy:.2%}.")
        return

    job = TrainingContext(
        recipe=recipe,
        options=Run(),
        world=world,
        data=data,
        batches=batches,
        gradients=make_gradients(recipe, Run(), world, model, traits),
        loss=make_loss(recipe, len(data.class_names), world.device),
        draws=ModelDraws(traits.draws_from) if traits.draws_from else None,
        store=OriginalStore(batches.steps_per_epoch) if world.rank == 0 else NullStore(),
        sink=EpochLines(options.epochs) if world.rank == 0 else NullSink(),
        stop_requested=signals.requested,
        save_every=batches.steps_per_epoch,
        eval_every=batches.steps_per_epoch,
    )
    if state.step < options.epochs * batches.steps_per_epoch:
        signals.arm()
        try:
            train(state, job)
        finally:
            job.store.finished(wait=True)
    if state.unsaved:
        raise OutputError(f"trained, but {state.unsaved}")


def make_notes(options: Options, world: World) -> list[str]:
    """One line for each difference from the original script, and for each given flag without effect."""
    lines = []
    if world.device.type == "cpu":
        backend = f" with {world.backend}" if world.size > 1 else ""
        lines.append(f"no GPU found, training on the CPU{backend}")
    lines += [
        f"{flag(name)} has no effect{why}"
        for name, why in _WITHOUT_EFFECT.items()
        if getattr(options, name) is not None
    ]
    if options.world_size not in (1, world.size):
        started = f"{world.launcher} started {world.size} processes"
        lines.append(f"--world-size {options.world_size} has no effect: {started}")
    return lines


class OriginalStore(BackgroundStore):
    """Writes `checkpoints/checkpoint_{epoch}.pth.tar` after each epoch.

    The best one is also written as `model_best.pth.tar`. If the run is asked to stop within an epoch, the
    checkpoint is `checkpoint_{epoch}_{step}.pth.tar`.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        super().__init__(None)
        self._steps_per_epoch = steps_per_epoch

    def path_of(self, content: Content) -> Path:
        """See `BackgroundStore`."""
        epoch, step = divmod(content["step"], self._steps_per_epoch)
        return FOLDER / f"checkpoint_{f'{epoch}_{step}' if step else epoch - 1}.pth.tar"

    def write(self, path: Path, content: Content, *, best: bool) -> None:
        """See `BackgroundStore`."""
        data = encode(to_original(content))
        if best:  # written first, see `RunStore.write`
            write(FOLDER / "model_best.pth.tar", data)
        write(path, data)


class EpochLines:
    """Prints the original script's line for each epoch to standard output. Used on rank 0 only."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def log(self, event: str, **fields: Any) -> None:
        """See `events.Sink`."""
        if event == "notice":
            _print_line(f"note: {fields['text']}")
        if event == "evaluation":
            epoch = round(fields["epoch"]) - 1
            _print_line(
                f"Epoch: {epoch}/{self._epochs}, "
                f"train loss: {fields['train_loss']:.6f}, train acc: {fields['train_accuracy']:.2%}, "
                f"test loss: {fields['test_loss']:.6f}, test acc: {fields['test_accuracy']:.2%}."
            )

    def close(self) -> None:
        """See `events.Sink`."""


def _adapt_checkpoint(content: Content, steps_per_epoch: int, data: Data, name: str) -> Content:
    """The content of a checkpoint, adapted to this job. `name` is the file's name, for error messages.

    The original script's checkpoints count epochs, not steps, and do not record samples. From one of our
    checkpoints with a different batch size, also only the epoch is used.

    Raises `CheckpointError` for a checkpoint from different data, or from the middle of an epoch that has a
    different number of steps.
    """
    if content["dataset"] is not None and (problem := data_differences(content["dataset"], data)):
        raise CheckpointError(f"{name} was trained on {problem}")
    if content.get("steps_per_epoch") == steps_per_epoch:
        return content
    if content["recipe"] is not None and content["step"] % content["steps_per_epoch"]:
        raise CheckpointError(
            f"{name} is from the middle of an epoch: resume it with the same --batch-size"
        )
    reset = {"samples_sha256": START_OF_CHAIN, "train_seconds": 0.0, "totals": dict(ZERO_TOTALS)}
    return {**content, **reset, "step": content["epoch"] * steps_per_epoch}


def _print_line(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()
