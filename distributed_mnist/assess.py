"""`dmnist evaluate`: score a checkpoint on a data set."""

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import datasets
from .checkpoint import Content, decode, load_weights, read_bytes
from .config import Recipe
from .digest import digest
from .errors import CheckpointError
from .evaluate import evaluate
from .layout import checkpoints_in
from .models import MODELS, build, place
from .progress import DataProgress
from .share import share
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
    path, raw = world.from_rank_zero(lambda: _read(path))
    content = decode(raw, str(path))
    recipe = Recipe.from_dict(content["recipe"], str(path)) if content["recipe"] else Recipe(model="linear")
    if recipe.model not in MODELS and recipe.model != model:
        raise CheckpointError(
            f"{path} is of the model {recipe.model}, which is code outside this program: "
            f"if you trust it, add --model {recipe.model}"
        )
    trained_on: dict[str, Any] = content["dataset"] or {"name": "mnist"}

    def load() -> datasets.Dataset:
        drawn = {key: trained_on[key] for key in ("seed", "train_size", "test_size") if key in trained_on}
        with DataProgress(console) as progress:
            return datasets.load(dataset or trained_on["name"], folder, progress=progress, **drawn)

    data = share(world, load)
    classes = len(trained_on.get("class_names", data.class_names))
    if len(data.class_names) > classes:
        raise CheckpointError(f"{path} knows {classes} classes, {data.name} has {len(data.class_names)}")
    network = world.together(lambda: build(recipe.model, classes, recipe.seed))
    load_weights(network, content["model"], str(path))
    network = place(network, world.device)
    began = time.perf_counter()
    mean, std = trained_on.get("mean", data.mean), trained_on.get("std", data.std)
    result = evaluate(
        network, data.test, world, classes=classes, mean=mean, std=std, precision=recipe.precision
    )
    seconds = time.perf_counter() - began
    if world.rank == 0:
        console.print(
            f"[bold]{path}[/]: test accuracy [bold green]{result.accuracy:.2%}[/], loss {result.loss:.6f} "
            f"on {result.images:,} images of {data.name}",
            highlight=False,
            soft_wrap=True,
        )
    return {
        "dataset": data.name,
        "model": recipe.model,
        "world_size": world.size,
        **_training(content, recipe),
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "test_images": result.images,
        "weights_sha256": digest(dict(network.state_dict())),
        "data_sha256": data.sha256,
        "images_per_second": result.images / seconds,
        "confusion": result.confusion,
        "out": str(path),
    }


def _read(path: Path) -> tuple[Path, bytes]:
    for best in (path / "checkpoints" / "best.pt", path / "best.pt", path / "model_best.pth.tar"):
        if best.is_file():
            return best, read_bytes(best)
    if seeds := sorted(path.glob("seed-*")):
        raise CheckpointError(
            f"{path} is an ensemble: name one of its networks, such as {seeds[0]} (the vote is in "
            f"{path / 'result.json'})"
        )
    if steps := checkpoints_in(path / "checkpoints"):
        raise CheckpointError(
            f"{path} was not scored before it stopped: name a checkpoint, such as {steps[-1]}"
        )
    return path, read_bytes(path)


def _training(content: Content, recipe: Recipe) -> dict[str, Any]:
    """What the checkpoint tells of its training; None where the original script wrote it."""
    known = content["recipe"] is not None
    return {
        "epochs": recipe.epochs if known else content["epoch"],
        "steps": content["step"] if known else None,
        "samples_sha256": content["samples_sha256"],
        "train_seconds": content.get("train_seconds"),
    }
