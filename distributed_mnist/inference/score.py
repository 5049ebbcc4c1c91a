"""`dmnist evaluate`: score a checkpoint on a data set."""

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..data.broadcast import Data, broadcast_dataset
from ..data.catalog import NAMES
from ..data.datasets import Dataset, load
from ..data.progress import DataProgress
from ..distributed.world import World
from ..errors import CheckpointError, DataError
from ..reporting.confusion import per_class, table
from ..runs import layout
from ..training.evaluate import Evaluation, evaluate
from .trained import Trained, find, restore


def run(
    world: World,
    path: Path,
    *,
    model: str | None,
    dataset: str | None,
    folder: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Score the checkpoint at `path` and return what `--json` prints.

    Rank 0 reads the checkpoint and the data and sends them to the others. `path` may be a run's folder: its
    best checkpoint is taken. A checkpoint of a user's own model names code, which is only run if `model`
    names the same: a stranger's file must not choose what is imported.
    """
    torch.set_num_threads(1)  # as in training with `tree`: the loss comes out the same to the bit
    found = world.on_rank_zero(lambda: find(path))
    trained = world.on_every_rank(lambda: restore(found, model=model, device=world.device))
    data = broadcast_dataset(world, lambda: read(trained, dataset, folder, console))
    began = time.perf_counter()
    result = score(trained, data, world, its_own=dataset is None and folder is None)
    seconds = time.perf_counter() - began
    if world.rank == 0:
        line = Text.assemble(
            (trained.path, "bold"),
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
        **_training(trained),
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "test_images": result.images,
        "weights_sha256": trained.weights_sha256,
        "data_sha256": data.sha256,
        "images_per_second": result.images / seconds,
        "confusion": result.confusion,
        "class_names": list(trained.class_names),
        "per_class": per_class(result.confusion, trained.class_names),
        "checkpoint": trained.path,
        "out": trained.path,
    }


def read(trained: Trained, dataset: str | None, folder: Path | None, console: Console) -> Dataset:
    """The data set of that name in that folder, or what it was trained on: digits are drawn as then."""
    told = trained.content["dataset"] or {}
    if dataset is None and trained.dataset not in NAMES:
        raise DataError(
            f"{trained.path} was trained on {trained.dataset!r}, data given in Python: name a data set, or "
            "give those (dataset)"
        )
    drawn = {key: told[key] for key in ("seed", "train_size", "test_size") if key in told}
    with DataProgress(console) as progress:
        place = folder or _folder_of(trained, dataset) or Path("data")
        return load(dataset or trained.dataset, place, progress=progress, **drawn)


def _folder_of(trained: Trained, dataset: str | None) -> Path | None:
    """Where the data were that it was trained on, if they are asked for and it is still there."""
    told = layout.config_in(trained.folder) if dataset is None else None
    place = Path(str(told["run"].get("data", ""))) if told else None
    return place if place is not None and place.is_dir() else None


def score(trained: Trained, data: Data, world: World, *, its_own: bool) -> Evaluation:
    """On the data's test images. Raises `CheckpointError` for data with classes that it does not know, and
    `DataError` where they should be `its_own`, those it was trained on, and are not."""
    classes = len(trained.class_names)
    known = (trained.content["dataset"] or {}).get("sha256")
    if its_own and known not in (None, data.sha256):
        raise DataError(
            f"{trained.path} was trained on other data than there are now (sha256 {known[:12]}, not "
            f"{data.sha256[:12]}): say which to score on"
        )
    if len(data.class_names) > classes:
        told = f"knows {classes} classes, {data.name} has {len(data.class_names)}"
        raise CheckpointError(f"{trained.path} {told}")
    return evaluate(
        trained.network,
        data.test,
        world,
        classes=classes,
        mean=trained.mean,
        std=trained.std,
        precision=trained.recipe.precision,
    )


def _training(trained: Trained) -> dict[str, Any]:
    """What the checkpoint tells of its training; None where the original script wrote it."""
    content, recipe = trained.content, trained.recipe
    known = content["recipe"] is not None
    return {
        "epochs": recipe.epochs if known else content["epoch"],
        "steps": content["step"] if known else None,
        "samples_sha256": content["samples_sha256"],
        "train_seconds": content.get("train_seconds"),
    }
