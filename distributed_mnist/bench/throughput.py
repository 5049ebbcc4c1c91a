"""The section `scaling` of `dmnist bench`: images per second and times of a step, at each world size."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from ..common.placement import usable_cores
from ..config import Recipe, load_recipe
from ..data import datasets
from .session import Bench, Gpus
from .timed_runs import median_and_range, output, ratios, summary

PLAIN_LOOP = "plain loop"
_TRIAL_STEPS = 40
_MIN_STEPS = 20


def ways_to_train(recipe: Recipe, gpus: Gpus | None) -> dict[str, list[str]]:
    """Return the ways to train that are compared: name to flags of `dmnist train`.

    Exact arithmetic is left out for a recipe with code of the user's own, which may have no exact form, and
    on MPS, which has no float64. On GPUs with CUDA graphs each way is measured with and without them.
    """
    usual = "fp32" if recipe.precision == "exact" else recipe.precision
    ways = {sync: ["--precision", usual, "--sync", sync] for sync in ("tree", "ddp")}
    if not recipe.code() and not (gpus and gpus.kind == "mps"):
        ways["exact"] = ["--precision", "exact"]
    if gpus and gpus.has_graphs:
        ways |= {f"{way}, eager": [*flags, "--cuda-graphs", "off"] for way, flags in ways.items()}
    return ways


def scaling(bench: Bench) -> dict[str, Any]:
    """Measure the throughput of each way to train, and of the plain loop, at each world size."""
    plan, recipe = bench.plan, load_recipe(bench.plan.recipe)
    flags = ["--recipe", plan.recipe, "--epochs", "1000"]
    ways = ways_to_train(recipe, bench.gpus)
    steps_alone = {way: _steps(bench, recipe, [*flags, *choice]) for way, choice in ways.items()}
    speed = defaultdict[tuple[str, int], list[float]](list)
    parts: dict[tuple[str, int], dict[str, float]] = {}
    for i in range(plan.runs):
        for n in bench.sizes:
            bench.show_progress(f"round {i + 1} of {plan.runs}, with {n} process{'es' if n > 1 else ''}")
            at_once = n if bench.gpus else min(n, usable_cores())
            for way, choice in ways.items():
                steps = ["--steps", str(steps_alone[way] * at_once)]
                training = bench.train(n, *flags, *steps, *choice, cores=n)
                speed[way, n].append(training.images_per_second)
                parts[way, n] = training.parts
            speed[PLAIN_LOOP, n].append(_plain_loop(bench, recipe, n))
    rows = [
        {
            "way": way,
            "nproc": n,
            "images_per_second": summary(speed[way, n]),
            "of_one_process": summary(ratios(speed[way, n], speed[way, 1])),
            "of_ddp": summary(ratios(speed[way, n], speed["ddp", n])),
            "of_plain_loop": summary(ratios(speed[way, n], speed[PLAIN_LOOP, n])),
            "parts": parts.get((way, n), {}),
        }
        for way in (*ways, PLAIN_LOOP)
        for n in bench.sizes
    ]
    where = "a GPU per process" if bench.gpus else "a core per process"
    _show(bench, f"{plan.recipe} ({recipe.model}, batches of {recipe.batch_size}), {where}", rows)
    return {"recipe": plan.recipe, "rows": rows}


def _steps(bench: Bench, recipe: Recipe, flags: Sequence[str]) -> int:
    """Return how many steps one process takes in the time of a measurement, by a short run."""
    bench.show_progress("a short run, to choose the number of steps")
    trial = bench.train(1, *flags, "--steps", str(_TRIAL_STEPS), cores=1)
    return max(_MIN_STEPS, round(bench.plan.seconds * trial.images_per_second / recipe.batch_size))


def _show(bench: Bench, title: str, rows: list[dict[str, Any]]) -> None:
    """Print the tables of `scaling`."""
    formats = {
        "images_per_second": ",.0f",
        "of_one_process": ".2f",
        "of_ddp": ".2f",
        "of_plain_loop": ".1f",
    }
    bench.show(
        f"Throughput of {title}",
        ["", "processes", "images/s", "of one process", "of ddp", "of the plain loop"],
        (
            [row["way"], str(row["nproc"]), *(median_and_range(row[key], formats[key]) for key in formats)]
            for row in rows
        ),
        "the plain loop: DataLoader, DistributedSampler, DistributedDataParallel over "
        f"{'NCCL' if bench.gpus else 'gloo'}, in fp32",
    )
    # A GPU works by itself: there, the time of a part is that of launching it.
    names = () if bench.gpus else ("data", "forward", "backward", "exchange", "optimizer")
    bench.show(
        "A step, in milliseconds",
        ["", "processes", *([*names, "rest"] if names else []), "all"],
        (
            [
                row["way"],
                str(row["nproc"]),
                *(f"{1e3 * seconds:.2f}" for seconds in _with_rest_and_total(row["parts"], names)),
            ]
            for row in rows
            if row["parts"]
        ),
    )


def _with_rest_and_total(parts: dict[str, float], names: Iterable[str]) -> list[float]:
    """Return the seconds of these parts of a step and of the rest, if any are named, and of the step."""
    known = [parts.get(name, 0.0) for name in names]
    return [*known, parts["step"] - sum(known), parts["step"]] if known else [parts["step"]]


def _plain_loop(bench: Bench, recipe: Recipe, nproc: int) -> float:
    """Run the plain loop and return its images per second."""
    if bench.plan.dataset in ("auto", "generated"):
        folder = bench.folder / "baseline-data"
        if not folder.exists():
            drawn = datasets.load(bench.plan.dataset, bench.plan.data, train_size=6_000, test_size=500)
            datasets.write(drawn, folder)
        data = ["--dataset", "idx", "--data", str(folder)]
    else:
        data = ["--dataset", bench.plan.dataset, "--data", str(bench.plan.data)]
    flags = ["--model", recipe.model, "--nproc", str(nproc), "--batch-size", str(recipe.batch_size)]
    limit = ["--seconds", str(bench.plan.seconds)]
    device = ["--device", bench.gpus.kind if bench.gpus else "cpu"]
    command = [sys.executable, "-m", "distributed_mnist.bench.baseline", *data, *flags, *limit, *device]
    return json.loads(output(command, cores=None if bench.gpus else nproc))["images_per_second"]
