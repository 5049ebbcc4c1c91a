"""`dmnist evaluate`: score a checkpoint on a data set."""

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .confusion import per_class, table
from .datasets import Dataset, load
from .digest import digest
from .errors import CheckpointError
from .evaluate import Evaluation, evaluate
from .progress import DataProgress
from .share import Data, share
from .trained import Trained, find, restore
from .world import World


def run(
    world: World, path: Path, *, model: str | None, dataset: str | None, folder: Path, console: Console
) -> dict[str, Any]:
    """Score the checkpoint at `path` and return what `--json` prints.

    Rank 0 reads the checkpoint and the data and sends them to the others. `path` may be a run's folder: its
    best checkpoint is taken. A checkpoint of a user's own model names code, which is only run if `model`
    names the same: a stranger's file must not choose what is imported.
    """
    torch.set_num_threads(1)  # as in training with `tree`: the loss comes out the same to the bit
    where, raw = world.from_rank_zero(lambda: find(path))
    trained = world.together(lambda: restore(where, raw, model=model, device=world.device))
    data = share(world, lambda: read(trained, dataset, folder, console))
    began = time.perf_counter()
    result = score(trained, data, world)
    seconds = time.perf_counter() - began
    if world.rank == 0:
        console.print(
            f"[bold]{where}[/]: test accuracy [bold green]{result.accuracy:.2%}[/], loss {result.loss:.6f} "
            f"on {result.images:,} images of {data.name}",
            highlight=False,
            soft_wrap=True,
        )
        console.print()
        console.print(table(result.confusion, trained.class_names))
    return {
        "dataset": data.name,
        "model": trained.recipe.model,
        "world_size": world.size,
        **_training(trained),
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "test_images": result.images,
        "weights_sha256": digest(dict(trained.network.state_dict())),
        "data_sha256": data.sha256,
        "images_per_second": result.images / seconds,
        "confusion": result.confusion,
        "class_names": list(trained.class_names),
        "per_class": per_class(result.confusion, trained.class_names),
        "checkpoint": where,
        "out": where,
    }


def read(trained: Trained, dataset: str | None, folder: Path, console: Console) -> Dataset:
    """The data set of that name, or the one it was trained on, drawn digits as they were drawn then."""
    told = trained.content["dataset"] or {}
    drawn = {key: told[key] for key in ("seed", "train_size", "test_size") if key in told}
    with DataProgress(console) as progress:
        return load(dataset or trained.dataset, folder, progress=progress, **drawn)


def score(trained: Trained, data: Data, world: World) -> Evaluation:
    """On the data's test images. Raises `CheckpointError` for data with classes that it does not know."""
    classes = len(trained.class_names)
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
