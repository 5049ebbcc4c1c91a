"""One rank's life in a `dmnist train`: connect, get the data, make or resume the state, train, report."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import datasets
from .batches import Batches
from .checkpoint import FORMAT, Content, versions
from .config import Recipe, Run, steps_between
from .digest import digest
from .errors import DataError, DmnistError, Interrupted, OutputError, UsageError, WorkerLost
from .evaluate import Evaluation
from .folder import open_folder, resume
from .gradients import DdpGradients, Gradients, TreeGradients
from .locate import NotFoundError
from .models import Traits, build, inspect, place
from .observe import DataProgress, JsonLines, Many, NullSink, Sink, Terminal
from .optim import make_optimizer
from .placement import usable_cores
from .share import Data, share
from .signals import StopSignals
from .store import write_json
from .train import Job, State, train
from .world import World


def run(
    world: World,
    recipe: Recipe,
    options: Run,
    *,
    title: str,
    console: Console,
    signals: StopSignals,
) -> dict[str, Any]:
    """Train, and return what `--json` prints. `title` is the recipe's name, for people."""
    began = time.perf_counter()
    recipe.check_size(world.size)
    threads = use_threads(world, recipe)
    data = load_data(world, options, console)
    model, traits = make_model(recipe, len(data.class_names), world)
    folder, lock = open_folder(world, options, title)
    batches = Batches(data.train, recipe, data.mean, data.std)
    state = State(model, make_optimizer(recipe, model))
    early_notices: list[str] = []
    try:
        store, resumed_from = resume(world, options, folder, state, recipe, data, early_notices.append)
    except DmnistError:
        if lock is not None:
            lock.abandon()
        raise
    sink = make_sink(world, folder, console)
    job = Job(
        recipe=recipe,
        world=world,
        batches=batches,
        test=data.test,
        gradients=make_gradients(recipe, options, world, model, traits),
        reseed=traits.draws_random_numbers,
        store=store,
        sink=sink,
        pack=partial(pack, state, recipe, data, options, batches.steps_per_epoch),
        stop_requested=signals.requested,
        evaluation={
            "classes": len(data.class_names),
            "mean": data.mean,
            "std": data.std,
            "precision": recipe.precision,
        },
        save_every=steps_between(options.checkpoint_every, batches.steps_per_epoch, "checkpoint_every"),
        eval_every=steps_between(options.eval_every, batches.steps_per_epoch, "eval_every"),
    )
    lines = describe(world, recipe, data, traits, title, threads, folder)
    total = recipe.epochs * batches.steps_per_epoch
    sink.log(
        "start", lines=lines, world_size=world.size, step=state.step, steps=total, epochs=recipe.epochs
    )
    if resumed_from:
        early_notices.append(f"resumed from {resumed_from} at step {state.step} of {total}")
    for text in [*early_notices, *oversubscription(world, threads)]:
        sink.log("notice", text=text)
    images_before, seconds_before = batches.images_before(state.step), state.train_seconds
    signals.arm()
    try:
        evaluation = train(state, job)
        images = batches.images_before(state.step) - images_before
        result = {
            **outcome(state, recipe, data, evaluation),
            "world_size": world.size,
            "device": world.device.type,
            "images_per_second": images / max(state.train_seconds - seconds_before, 1e-9),
            "total_seconds": time.perf_counter() - began,
            "out": str(folder),
        }
        sink.log("end", result=result)
    except Interrupted as error:
        raise Interrupted(f"{error}; go on with --resume auto --out {folder}") from None
    except WorkerLost as error:
        raise WorkerLost(f"{error}; go on with --resume auto --out {folder}") from error
    finally:
        sink.close()
    if lock is not None:
        write_json(folder / "result.json", result)
        lock.release()
    if state.unsaved:
        raise OutputError(f"trained, but {state.unsaved}")
    return result


def outcome(state: State, recipe: Recipe, data: Data, evaluation: Evaluation) -> dict[str, Any]:
    """What a run came to, as it is the same wherever and however it ran (but for the seconds)."""
    return {
        "dataset": data.name,
        "model": recipe.model,
        "sync": recipe.sync,
        "epochs": recipe.epochs,
        "steps": state.step,
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_images": evaluation.images,
        "weights_sha256": digest(dict(state.model.state_dict())),
        "samples_sha256": state.samples_sha256,
        "data_sha256": data.sha256,
        "train_seconds": state.train_seconds,
    }


def pack(state: State, recipe: Recipe, data: Data, options: Run, steps_per_epoch: int) -> Content:
    """The checkpoint of this moment."""
    drawn = {"seed": options.data_seed, "train_size": options.train_size, "test_size": options.test_size}
    return {
        "format": FORMAT,
        **state.to_content(),
        "recipe": recipe.to_dict(),
        "dataset": {**data.to_dict(), **(drawn if data.name == "generated" else {})},
        "steps_per_epoch": steps_per_epoch,
        "versions": versions(),
    }


def use_threads(world: World, recipe: Recipe) -> int:
    """Set and return this process's intra-op threads.

    In `tree` it is one: two threads would add in another order. In `ddp` the host's cores are divided.
    """
    threads = 1 if recipe.sync == "tree" else max(1, usable_cores() // world.local_size)
    torch.set_num_threads(threads)
    if world.device.type == "cuda" and recipe.sync == "tree":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return threads


def oversubscription(world: World, threads: int) -> list[str]:
    """A warning if this host's processes have more threads than cores."""
    wanted, cores = world.local_size * threads, usable_cores()
    if world.device.type != "cpu" or wanted <= cores:
        return []
    return [
        f"{world.local_size} processes share {cores} cores: same answer, no faster than --nproc {cores}"
    ]


def load_data(world: World, options: Run, console: Console) -> Data:
    """The run's data set on every rank."""

    def load() -> datasets.Dataset:
        with DataProgress(console) as progress:
            return datasets.load(
                options.dataset,
                options.data,
                seed=options.data_seed,
                train_size=options.train_size,
                test_size=options.test_size,
                progress=progress,
            )

    try:
        return share(world, load)
    except NotFoundError as error:
        raise DataError(
            f"{error}; give --data DIR, or train on drawn digits: --dataset generated"
        ) from None


def make_model(recipe: Recipe, classes: int, world: World) -> tuple[torch.nn.Module, Traits]:
    """The model on this rank's device, found fit for exact training."""
    model = place(build(recipe.model, classes, recipe.seed), world.device)
    return model, inspect(model, recipe.model, classes, world.device)


def make_gradients(
    recipe: Recipe, options: Run, world: World, model: torch.nn.Module, traits: Traits
) -> Gradients:
    """The recipe's way of adding gradients up. Raises `UsageError` if a shard exceeds `--micro-batch`."""
    shard_size = -(-recipe.batch_size // recipe.shards)
    if options.micro_batch is not None and options.micro_batch < shard_size:
        raise UsageError(
            f"--micro-batch {options.micro_batch}, but a shard has {shard_size} images: use --shards "
            f"{-(-recipe.batch_size // options.micro_batch)} or more"
        )
    if recipe.sync == "tree":
        return TreeGradients(model, world, recipe.shards)
    return DdpGradients(
        model,
        world,
        recipe.shards,
        shard_size=shard_size,
        one_by_one=traits.draws_random_numbers,
        micro_batch=options.micro_batch,
    )


def make_sink(world: World, folder: Path, console: Console) -> Sink:
    """Rank 0 tells the terminal and `metrics.jsonl`; the others nothing."""
    if world.rank != 0:
        return NullSink()
    terminal = Terminal(console)
    return Many(
        JsonLines(folder / "metrics.jsonl", lambda text: terminal.log("notice", text=text)), terminal
    )


def describe(
    world: World, recipe: Recipe, data: Data, traits: Traits, title: str, threads: int, folder: Path
) -> dict[str, str]:
    """The lines a run begins with."""
    how = "tree" if recipe.sync == "tree" else "DistributedDataParallel"
    group = (
        "1 process" if world.size == 1 else f"{world.size} processes ({world.launcher}, {world.backend})"
    )
    per = f", {threads} thread{'s' if threads > 1 else ''} each" if world.device.type == "cpu" else ""
    return {
        "recipe": f"{title}: {recipe.model} with {traits.parameters:,} parameters, "
        f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''} in batches of {recipe.batch_size}, "
        f"{how} over {recipe.shards} shards, {recipe.precision}, seed {recipe.seed}",
        "data": f"{data.name}, {len(data.train):,} + {len(data.test):,} images, {data.source}",
        "world": f"{group} on {world.device.type}{per}",
        "out": str(folder),
    }
