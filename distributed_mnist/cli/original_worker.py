"""One rank's life in the original script's job: its files, its line per epoch, on this program's loop."""

import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..common.digest import START_OF_CHAIN
from ..common.placement import Placement
from ..config import Run, load_recipe
from ..data import datasets
from ..data.broadcast import Data, broadcast_dataset
from ..data.progress import DataProgress
from ..distributed.world import World
from ..errors import CheckpointError, OutputError
from ..launcher.rank_process import run_in_group
from ..launcher.signals import StopSignals
from ..optim.schedule import make_optimizer
from ..reporting.events import NullSink
from ..runs.checkpoint import Content, decode, encode, read_bytes, write
from ..runs.checkpoint_store import BackgroundStore, NullStore
from ..runs.original_format import to_original
from ..training.batches import Batches
from ..training.evaluate import evaluate
from ..training.loop import require_same_weights, train
from ..training.setup import make_gradients, make_model, pack, use_threads
from ..training.state import ZERO_TOTALS, State, TrainingContext
from .original_script import Options

FOLDER = Path("checkpoints")  # in the current folder, as the original has it


def work(placement: Placement, listener: socket.socket | None, options: Options) -> int:
    """Join the group and run the job in it; the exit code."""
    without_nccl = options.backend == "nccl" and not torch.cuda.is_available()
    backend = None if without_nccl else options.backend

    def body(world: World, signals: StopSignals) -> None:
        run(world, options, signals)

    return run_in_group(placement, listener, body, backend=backend, exact=False)


def run(world: World, options: Options, signals: StopSignals) -> None:
    """Train or evaluate as the original does. Every rank calls it."""
    say = _say if world.rank == 0 else _nothing
    for line in explanations(options, world):
        say(f"note: {line}")
    recipe = load_recipe("classic").replace(
        epochs=max(options.epochs, 1),
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        sync="ddp",
        shards=max(8, world.size),
    )
    use_threads(world, recipe)
    content: Content | None = None
    if options.resume:  # before the data: a missing file is soon told
        say(f"=> loading checkpoint '{options.resume}'")
        raw = world.on_rank_zero(lambda: read_bytes(Path(options.resume)))
        content = decode(raw, options.resume)
    with DataProgress(Console(stderr=True)) as progress:
        data = broadcast_dataset(
            world, lambda: datasets.load("mnist", Path(options.root), progress=progress)
        )
    model, traits = make_model(recipe, len(data.class_names), world)
    batches = Batches(data.train, recipe, data.mean, data.std)
    state = State(model, make_optimizer(recipe, model), step=options.start_epoch * batches.steps_per_epoch)
    if content is not None:
        name = options.resume
        state.restore(_complete(content, batches.steps_per_epoch, data, name), name)
        say(f"=> loaded checkpoint '{name}' (epoch {state.step // batches.steps_per_epoch})")
    scoring: dict[str, Any] = {"classes": len(data.class_names), "mean": data.mean, "std": data.std}
    require_same_weights(state, world)
    if options.evaluate:
        result = evaluate(model, data.test, world, precision="fp32", **scoring)
        say(f"test loss: {result.loss:.6f}, test acc: {result.accuracy:.2%}.")
        return

    job = TrainingContext(
        recipe=recipe,
        world=world,
        batches=batches,
        test=data.test,
        gradients=make_gradients(recipe, Run(), world, model, traits),
        reseed=traits.draws_random_numbers,
        store=OriginalStore(batches.steps_per_epoch) if world.rank == 0 else NullStore(),
        sink=EpochLines(options.epochs) if world.rank == 0 else NullSink(),
        pack=partial(pack, state, recipe, data, Run(), batches.steps_per_epoch),
        stop_requested=signals.requested,
        evaluation_options={**scoring, "precision": "fp32"},
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


def explanations(options: Options, world: World) -> list[str]:
    """One line for what is different here, and for each flag given that has nothing to do."""
    lines = []
    if world.device.type == "cpu":
        lines.append("no GPU here, training on CPU" + (f" with {world.backend}" if world.size > 1 else ""))
    if options.workers is not None:
        lines.append("--workers has nothing to do: the data is kept on the device, no process loads it")
    for name in ("momentum", "weight_decay"):
        if getattr(options, name) is not None:
            lines.append(
                f"--{name.replace('_', '-')} has no effect, as in the original: it trains with Adam"
            )
    for name, why in (("init_method", "a free port is found"), ("rank", "ranks are given out")):
        if getattr(options, name) is not None:
            lines.append(f"--{name.replace('_', '-')} has nothing to do: {why}")
    if options.world_size not in (1, world.size):
        lines.append(
            f"--world-size is {options.world_size}, but {world.launcher} started {world.size}: that holds"
        )
    return lines


class OriginalStore(BackgroundStore):
    """`checkpoints/checkpoint_{epoch}.pth.tar` after each epoch, the best also as `model_best.pth.tar`.

    One saved within an epoch, because the run was asked to stop, is `checkpoint_{epoch}_{step}.pth.tar`.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        super().__init__(None)
        self._steps_per_epoch = steps_per_epoch

    def path_of(self, content: Content) -> Path:
        """See `BackgroundStore`."""
        epoch, step = divmod(content["step"], self._steps_per_epoch)
        return FOLDER / (
            f"checkpoint_{epoch}_{step}.pth.tar" if step else f"checkpoint_{epoch - 1}.pth.tar"
        )

    def write(self, path: Path, content: Content, *, best: bool) -> None:
        """See `BackgroundStore`."""
        data = encode(to_original(content))
        if best:  # first: see `RunStore.write`
            write(FOLDER / "model_best.pth.tar", data)
        write(path, data)


class EpochLines:
    """The original's line per epoch on standard output, once."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def log(self, event: str, **fields: Any) -> None:
        """See `observe.Sink`."""
        if event == "notice":
            _say(f"note: {fields['text']}")
        if event == "evaluation":
            epoch = round(fields["epoch"]) - 1
            _say(
                f"Epoch: {epoch}/{self._epochs}, "
                f"train loss: {fields['train_loss']:.6f}, train acc: {fields['train_accuracy']:.2%}, "
                f"test loss: {fields['test_loss']:.6f}, test acc: {fields['test_accuracy']:.2%}."
            )

    def close(self) -> None:
        """See `observe.Sink`."""


def _complete(content: Content, steps_per_epoch: int, data: Data, name: str) -> Content:
    """A checkpoint as one of this job's: the original knows epochs, not steps, and records no samples.

    Of ours with another batch size only the epoch counts too. Raises `CheckpointError` for one of other
    data, or of the middle of an epoch that has other steps here.
    """
    dataset = content["dataset"]
    if dataset is not None and dataset["sha256"] != data.sha256:
        raise CheckpointError(f"{name} is of other data: {dataset['name']} {dataset['sha256'][:12]}…")
    if content.get("steps_per_epoch") == steps_per_epoch:
        return content
    if content["recipe"] is not None and content["step"] % content["steps_per_epoch"]:
        raise CheckpointError(f"{name} is of the middle of an epoch: go on with the same --batch-size")
    fresh = {"samples_sha256": START_OF_CHAIN, "train_seconds": 0.0, "totals": dict(ZERO_TOTALS)}
    return {**content, **fresh, "step": content["epoch"] * steps_per_epoch}


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _nothing(line: str) -> None:
    pass
