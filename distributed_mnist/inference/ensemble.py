"""Several networks of one recipe, from seeds that count up, and their vote."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from ..common.digest import digest
from ..config import Recipe
from ..data.broadcast import broadcast_dataset
from ..data.datasets import Dataset
from ..distributed.world import World
from ..reporting.terminal import Terminal
from ..runs.checkpoint import read_bytes
from ..runs.layout import checkpoints_in, member_folder, write_json
from ..training.evaluate import evaluate
from .trained import Found, restore


def run(
    world: World, recipe: Recipe, out: Path, members: int, *, console: Console, read: Callable[[], Dataset]
) -> dict[str, Any]:
    """Let the trained networks in `out` vote, and return what `--json` prints.

    Rank 0 reads them, each as it was at its end, and `read()`, the data; all ranks score a part of the
    test images.
    """
    torch.set_num_threads(1)  # as in training
    data = broadcast_dataset(world, read)
    recipes = [recipe.replace(seed=recipe.seed + i) for i in range(members)]
    found, results = world.on_rank_zero(lambda: _read(out, recipes))
    vote = world.on_every_rank(lambda: restore(found, model=recipe.model, device=world.device)).network
    score = evaluate(
        vote,
        data.test,
        world,
        classes=len(data.class_names),
        mean=data.mean,
        std=data.std,
        precision=recipe.precision,
    )
    told = ("test_accuracy", "test_loss", "weights_sha256", "train_seconds", "out")
    result = {
        "dataset": data.name,
        "model": recipe.model,
        "world_size": world.size,
        "test_accuracy": score.accuracy,
        "test_loss": score.loss,
        "test_images": score.images,
        "mean_accuracy_alone": fmean(one["test_accuracy"] for one in results),
        "members": [
            {"seed": one.seed, **{name: found[name] for name in told}}
            for one, found in zip(recipes, results, strict=True)
        ],
        "weights_sha256": digest([one["weights_sha256"] for one in results]),
        "data_sha256": data.sha256,
        "confusion": score.confusion,
        "out": str(out),
    }
    world.on_rank_zero(lambda: write_json(out / "result.json", result))
    if world.rank == 0:
        Terminal(console).log("vote", result=result)
    return result


def _read(out: Path, recipes: Sequence[Recipe]) -> tuple[Found, list[dict[str, Any]]]:
    """The networks' last checkpoints, and their results."""
    files, results = [], []
    for recipe in recipes:
        folder = member_folder(out, recipe.seed)
        path = checkpoints_in(folder / "checkpoints")[-1]
        files.append((str(path), read_bytes(path)))
        results.append(json.loads((folder / "result.json").read_text()))
    return Found(str(out), files, [one["weights_sha256"] for one in results]), results
