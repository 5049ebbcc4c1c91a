"""Evaluate an ensemble: networks of one recipe with consecutive seeds, which vote."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Any

import torch
from rich.console import Console

from ..common.digest import digest
from ..config import Recipe
from ..data.broadcast import broadcast_dataset
from ..data.datasets import Dataset
from ..distributed.world import World
from ..errors import CheckpointError
from ..reporting.progress_bar import Terminal
from ..runs.checkpoint import read_bytes
from ..runs.layout import checkpoints_in, member_folder, write_json
from ..runs.run_files import read_result
from .score import evaluate_trained
from .trained import CheckpointFiles, restore


def evaluate_ensemble(
    world: World, recipe: Recipe, out: Path, members: int, *, console: Console, read: Callable[[], Dataset]
) -> dict[str, Any]:
    """Evaluate the vote of the trained networks in `out`. Returns what `--json` prints.

    Rank 0 reads each network's final weights, and the data with `read()`. Each rank evaluates a part of the
    test images.
    """
    torch.set_num_threads(1)  # as in training
    data = broadcast_dataset(world, read)
    recipes = [recipe.replace(seed=recipe.seed + i) for i in range(members)]
    files, member_results = world.on_rank_zero(lambda: _read_members(out, recipes), _Members)
    trained = world.on_every_rank(lambda: restore(files, model=recipe.model, device=world.device))
    evaluation = evaluate_trained(trained, data, world, require_training_data=False)
    member_fields = ("test_accuracy", "test_loss", "weights_sha256", "train_seconds", "out")
    result = {
        "dataset": data.name,
        "model": recipe.model,
        "world_size": world.size,
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_images": evaluation.images,
        "mean_accuracy_alone": fmean(member["test_accuracy"] for member in member_results),
        "members": [
            {"seed": member.seed, **{name: member_result[name] for name in member_fields}}
            for member, member_result in zip(recipes, member_results, strict=True)
        ],
        "weights_sha256": digest([member["weights_sha256"] for member in member_results]),
        "data_sha256": data.sha256,
        "confusion": evaluation.confusion,
        "out": str(out),
    }
    world.on_rank_zero(lambda: write_json(out / "result.json", result), NoneType)
    if world.rank == 0:
        Terminal(console).log("vote", result=result)
    return result


_Members = tuple[CheckpointFiles, list[dict[str, Any]]]


def _read_members(out: Path, recipes: Sequence[Recipe]) -> _Members:
    """Read the members' last checkpoints and their results. Raises `CheckpointError`."""
    files, results = [], []
    for recipe in recipes:
        folder = member_folder(out, recipe.seed)
        result, checkpoints = read_result(folder), checkpoints_in(folder / "checkpoints")
        if result is None or not checkpoints:
            missing = "checkpoint" if result else "result.json"
            raise CheckpointError(f"{folder} has no {missing}: resume the ensemble with --resume auto")
        files.append((str(checkpoints[-1]), read_bytes(checkpoints[-1])))
        results.append(result)
    return CheckpointFiles(str(out), files, [result["weights_sha256"] for result in results]), results
