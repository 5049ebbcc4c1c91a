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
from ..runs.layout import write_json
from .score import evaluate_trained
from .trained import Members, read_members, restore


def evaluate_ensemble(
    world: World, recipe: Recipe, out: Path, members: int, *, console: Console, read: Callable[[], Dataset]
) -> dict[str, Any]:
    """Evaluate the vote of the trained networks in `out`. Returns what `--json` prints.

    Rank 0 reads each network's final weights, and the data with `read()`. Each rank evaluates a part of the
    test images.
    """
    torch.set_num_threads(1)  # as in training
    data = broadcast_dataset(world, read)
    seeds = range(recipe.seed, recipe.seed + members)
    files, member_results = world.on_rank_zero(lambda: _finished(out, seeds), Members)
    trained = world.on_every_rank(lambda: restore(files, model=recipe.model, device=world.device))
    evaluation = evaluate_trained(trained, data, world, require_training_data=False)
    member_fields = ("test_accuracy", "test_loss", "weights_sha256", "train_seconds", "out")
    result = {
        "dataset": data.name,
        "model": recipe.model,
        "world_size": world.size,
        **evaluation.figures(),
        "mean_accuracy_alone": fmean(member["test_accuracy"] for member in member_results),
        "members": [
            {"seed": seed, **{name: member_result[name] for name in member_fields}}
            for seed, member_result in zip(seeds, member_results, strict=True)
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


def _finished(out: Path, seeds: Sequence[int]) -> Members:
    found = read_members(out, seeds)
    if found is None:
        raise CheckpointError(f"{out} has an unfinished network: resume the ensemble with --resume auto")
    return found
