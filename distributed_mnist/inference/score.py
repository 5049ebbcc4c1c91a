"""`dmnist evaluate`: evaluate a checkpoint on a data set."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..common.compute_platform import multiplies_bf16
from ..config import describe_shape
from ..data.broadcast import Data, broadcast_dataset
from ..data.catalog import NAMES
from ..data.datasets import Dataset, load
from ..data.download_progress import DataProgress
from ..distributed.world import World
from ..errors import CheckpointError, DataError
from ..gradients.cross_check import all_true
from ..reporting.confusion import per_class, table
from ..runs.run_files import config_in
from ..training.evaluate import Evaluation, evaluate
from ..training.platforms import require_same_platform
from ..user_code.failures import model_failures
from .trained import CheckpointFiles, Trained, find_checkpoint, restore


def evaluate_checkpoint(
    world: World,
    path: Path,
    *,
    model: str | None,
    dataset: str | None,
    folder: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Evaluate the checkpoint at `path`, or the last one of the run there. Returns what `--json` prints.

    Rank 0 reads the checkpoint and the data and sends them to the other ranks. `dataset` and `folder` are
    as in `load_dataset`, `model` is as in `restore`.
    """
    torch.set_num_threads(1)  # as in training with `tree`, so that the loss is bit-identical
    files = world.on_rank_zero(lambda: find_checkpoint(path), CheckpointFiles)
    trained = world.on_every_rank(lambda: restore(files, model=model, device=world.device))
    in_exact = trained.recipe.precision == "exact"  # the same on every platform
    # Otherwise a difference is a notice only: each image counts once, on whichever rank.
    notices = [] if in_exact else require_same_platform(world, "ddp")
    exact = in_exact or (trained.recipe.sync == "tree" and not notices)
    if trained.recipe.precision == "bf16" and not all_true(world, multiplies_bf16(world.device)):
        notices.append(
            "this network was trained in bf16, which this hardware emulates: scoring is slow here"
        )
    if world.rank == 0:
        for notice in notices:
            console.print(f"note: {notice}", soft_wrap=True)
    data = broadcast_dataset(world, lambda: load_dataset(trained, dataset, folder, console))
    start = time.perf_counter()
    same_data = dataset is None and folder is None
    result = evaluate_trained(trained, data, world, require_training_data=same_data, exact=exact)
    seconds = time.perf_counter() - start
    content, is_ours = trained.content, trained.content["recipe"] is not None
    if world.rank == 0:
        line = Text.assemble(
            (trained.title, "bold"),
            ": test accuracy ",
            (f"{result.accuracy:.2%}", "bold green"),
            f", loss {result.loss:.6f} on {result.images:,} images of {data.name}",
        )
        console.print(line, soft_wrap=True)
        console.print()
        console.print(table(result.confusion, trained.class_names, console.width))
    return {
        "dataset": data.name,
        "model": trained.recipe.model,
        "world_size": world.size,
        # What the original script does not record is None.
        "epochs": trained.recipe.epochs if is_ours else content["epoch"],
        "steps": (trained.best_step or content["step"]) if is_ours else None,
        "samples_sha256": content["samples_sha256"],
        "train_seconds": content.get("train_seconds"),
        **result.figures(),
        "weights_sha256": trained.weights_sha256,
        "data_sha256": data.sha256,
        "images_per_second": result.images / seconds,
        "confusion": result.confusion,
        "class_names": list(trained.class_names),
        "per_class": per_class(result.confusion, trained.class_names),
        "checkpoint": trained.path,
        "out": trained.path,
    }


def load_dataset(trained: Trained, dataset: str | None, folder: Path | None, console: Console) -> Dataset:
    """Load the data set called `dataset` from `folder`. The default is what `trained` was trained on.

    Digits are generated with the same seed and sizes as for training. Raises `DataError`.
    """
    trained_on = trained.content["dataset"] or {}
    if dataset is None and trained.dataset not in NAMES:
        raise DataError(
            f"{trained.path} was trained on {trained.dataset!r}, which was passed from Python: name a data "
            "set, or pass that data again (dataset)"
        )
    drawn = {key: trained_on[key] for key in ("seed", "train_size", "test_size") if key in trained_on}
    with DataProgress(console) as progress:
        folder = folder or (_training_data_folder(trained) if dataset is None else None) or Path("data")
        return load(dataset or trained.dataset, folder, progress=progress, **drawn)


def _training_data_folder(trained: Trained) -> Path | None:
    """The folder that the training data came from, if the run recorded it and it still exists.

    Raises `CheckpointError` for a damaged `config.json`.
    """
    is_run = trained.folder == Path(trained.path) or Path(trained.path).parent.name == "checkpoints"
    config = config_in(trained.folder) if is_run else None  # elsewhere, `config.json` may be anybody's
    return config.run.data if config and config.run.data.is_dir() else None


def evaluate_trained(
    trained: Trained, data: Data, world: World, *, require_training_data: bool, exact: bool = True
) -> Evaluation:
    """Evaluate a trained network on the test images. Every rank must call it. `exact` is as in `evaluate`.

    Raises `CheckpointError` if the data has more classes than the network, or images of another shape.
    Raises `DataError` if `require_training_data` is set and the network was trained on different data.
    """
    classes = len(trained.class_names)
    expected = (trained.content["dataset"] or {}).get("sha256")
    if require_training_data and expected not in (None, data.sha256):
        raise DataError(
            f"{trained.path} was trained on different data from what is here now (sha256 {expected[:12]}, "
            f"not {data.sha256[:12]}): name the data set or the folder to evaluate on"
        )
    if data.image_shape != trained.image_shape:
        shapes = describe_shape(trained.image_shape), describe_shape(data.image_shape)
        problem = f"takes images of {shapes[0]}, but those of {data.name} are {shapes[1]}"
        raise CheckpointError(f"{trained.path} {problem}")
    if len(data.class_names) > classes:
        raise CheckpointError(
            f"{trained.path} has {classes} classes, but {data.name} has {len(data.class_names)}"
        )
    as_trained = replace(data, class_names=trained.class_names, mean=trained.mean, std=trained.std)
    recipe = trained.recipe
    with model_failures(recipe.model):
        return evaluate(trained.network, as_trained, world, recipe.precision, recipe.model, exact=exact)
