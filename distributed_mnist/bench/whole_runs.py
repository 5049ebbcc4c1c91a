"""Sections of `dmnist bench` that train recipes to their end: accuracy and durations."""

import sys
from collections import defaultdict
from typing import Any

from ..common.placement import physical_cores
from .session import Bench
from .timed_runs import median_and_range, ratios, seconds_of, summary

_AIMS = {
    ("fast", "tree"): 0.15,
    ("fast", "ddp"): 0.10,
    ("default", "tree"): 0.6,
    ("default", "ddp"): 0.6,
    ("accurate", "tree"): 15.0,
    ("accurate", "ddp"): 15.0,
}
"""The seconds of training that a recipe should take at most on one NVIDIA H100 or H200."""


def time_to_99(bench: Bench) -> dict[str, Any]:
    """Train the recipe `fast` with several seeds; measure its accuracy and its duration.

    On a GPU, with `ddp` too.
    """
    processes = bench.gpus.count if bench.gpus else physical_cores()
    nproc, seeds = bench.plan.nproc or min(processes, 8), bench.plan.seeds
    results: dict[str, Any] = {"nproc": nproc, "seeds": seeds}
    for sync in ("tree", "ddp") if bench.gpus else ("tree",):
        samples = defaultdict[str, list[float]](list)
        dataset = ""
        for seed in range(seeds):
            bench.show_progress(f"{sync}, run {seed + 1} of {seeds}")
            training = bench.train(nproc, "--recipe", "fast", "--seed", str(seed), "--sync", sync)
            dataset = training.result["dataset"]
            figures = {
                "test accuracy, %": 100 * training.result["test_accuracy"],
                "training, s": training.result["train_seconds"],
                "first step to last weight, s": training.all_steps_seconds,
                "whole command, s": training.wall_seconds,
            }
            for name, value in figures.items():
                samples[name].append(value)
        results[sync] = {name: summary(values) for name, values in samples.items()}
        bench.show(
            f"Recipe fast on {dataset}, {sync}, {nproc} process{'es' if nproc > 1 else ''}, {seeds} seeds",
            ["", "mean", "deviation", "min", "max"],
            (
                [name, *(f"{row[key]:.3f}" for key in ("mean", "deviation", "min", "max"))]
                for name, row in results[sync].items()
            ),
        )
    return results


def recipes(bench: Bench) -> dict[str, Any]:
    """Train recipes to their end in one process, with `tree` and with `ddp`, beside the aims for a GPU."""
    samples = defaultdict[tuple[str, str], list[dict[str, float]]](list)
    for i in range(bench.plan.runs):
        import_seconds = seconds_of([sys.executable, "-c", bench.import_torch])
        for recipe, sync in _AIMS:
            bench.show_progress(f"round {i + 1} of {bench.plan.runs}, {recipe} with {sync}")
            training = bench.train(1, "--recipe", recipe, "--sync", sync)
            samples[recipe, sync].append(
                {
                    "accuracy": 100 * training.result["test_accuracy"],
                    "training": training.result["train_seconds"],
                    "whole_command": training.wall_seconds,
                    "of_import": training.wall_seconds / import_seconds,
                }
            )
    rows = []
    for (recipe, sync), aim in _AIMS.items():
        figures = {
            key: [sample[key] for sample in samples[recipe, sync]] for key in samples[recipe, sync][0]
        }
        ddp = [sample["training"] for sample in samples[recipe, "ddp"]]
        row = {key: summary(values) for key, values in figures.items()}
        row["of_ddp"] = summary(ratios(figures["training"], ddp))
        rows.append({"recipe": recipe, "way": sync, "aim": aim if bench.gpus else None, **row})
    bench.show(
        "Recipes, one process, in seconds",
        ["", "way", "training", "aim", "of ddp", "whole command", "of import", "accuracy, %"],
        (
            [
                row["recipe"],
                row["way"],
                median_and_range(row["training"], ".3f"),
                "" if row["aim"] is None else f"{row['aim']:g}",
                f"{row['of_ddp']['median']:.2f}",
                f"{row['whole_command']['median']:.2f}",
                f"{row['of_import']['median']:.2f}",
                f"{row['accuracy']['median']:.2f}",
            ]
            for row in rows
        ),
        f"of import: the whole command's time, divided by that of python -c {bench.import_torch!r}",
        *(
            ["aims for one NVIDIA H100 or H200; also: tree within 1.25 of ddp, fast within 1.5 of import"]
            if bench.gpus
            else []
        ),
    )
    return {"rows": rows}
