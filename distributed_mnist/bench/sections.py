"""The sections of `dmnist bench`: one function each, which shows a table and returns its figures."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..common.placement import usable_cores
from ..config import Recipe, load_recipe
from ..data import datasets, generated
from ..gradients.cost_model import exchange_seconds, fit_link, prediction_table
from ..launcher.default_nproc import MICROSECONDS_PER_IMAGE
from .timed_runs import TimedTraining, median_and_range, output, ratios, seconds_of, summary, train

PLAIN_LOOP = "plain loop"
_DEFAULT_MAX_NPROC = 4
_DRAWN_IMAGES = 2_000


@dataclass(frozen=True)
class Plan:
    """The flags that say how to measure."""

    recipe: str
    nproc: int | None
    runs: int
    seeds: int
    seconds: float
    dataset: str
    data: Path


@dataclass
class Bench:
    """The state of one `dmnist bench`: its plan, its temporary folder and its results so far."""

    plan: Plan
    console: Console
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    show_progress: Callable[[str], None] = lambda text: None
    _runs: int = 0

    @property
    def sizes(self) -> list[int]:
        """World sizes to measure: all up to four, then powers of two, and the largest."""
        most = self.plan.nproc or min(usable_cores(), _DEFAULT_MAX_NPROC)
        return [n for n in range(1, most + 1) if n <= 4 or n & (n - 1) == 0 or n == most]

    def measure(self, name: str) -> None:
        """Run a section, show its progress, and store its results."""
        with self.console.status(f"measuring: {name}") as status:
            self.show_progress = lambda text: status.update(f"measuring: {name}, {text}")
            self.results[name] = SECTIONS[name](self)

    def train(self, nproc: int, *flags: str, cores: int | None = None) -> TimedTraining:
        """Run `dmnist train` on this bench's data, without checkpoints and evaluations before the end."""
        self._runs += 1
        data = ["--dataset", self.plan.dataset, "--data", str(self.plan.data)]
        intervals = ["--checkpoint-every", "60 minutes", "--eval-every", "1000000"]
        out = self.folder / f"run{self._runs}"
        return train(out, "--nproc", str(nproc), *data, *intervals, *flags, cores=cores)

    def show(self, title: str, columns: list[str], rows: Iterable[list[str]], *notes: str) -> None:
        """Print a table."""
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=i > 0)
        for row in rows:
            table.add_row(*row)
        self.console.print()
        self.console.print(table)
        for note in notes:
            self.console.print(note, style="dim")


def startup(bench: Bench) -> dict[str, Any]:
    """Measure the time from the command to the first step, and compare it with an import of torch."""
    samples = defaultdict[str, list[float]](list)
    import_torch, flags = "python -c 'import torch'", ["--recipe", bench.plan.recipe, "--steps", "2"]
    for i in range(bench.plan.runs):
        bench.show_progress(f"round {i + 1} of {bench.plan.runs}")
        seconds = {import_torch: seconds_of([sys.executable, "-c", "import torch"])}
        seconds["dmnist --help"] = seconds_of([sys.executable, "-m", "distributed_mnist", "--help"])
        for n in bench.sizes[:2]:
            seconds[f"dmnist train --nproc {n}"] = bench.train(n, *flags).first_step_seconds
        for name, value in seconds.items():
            samples[name].append(value)
    rows = {
        name: {"seconds": summary(values), "ratio": summary(ratios(values, samples[import_torch]))}
        for name, values in samples.items()
    }
    bench.show(
        "Start-up, from the command to the first step",
        ["", "seconds", "of import torch"],
        (
            [name, median_and_range(row["seconds"], ".2f"), median_and_range(row["ratio"], ".2f")]
            for name, row in rows.items()
        ),
    )
    return rows


def data(bench: Bench) -> dict[str, Any]:
    """Measure how long it takes to read the data set and to generate a digit."""
    read, drawn, megabytes, name = list[float](), list[float](), 0.0, ""
    for _ in range(bench.plan.runs):
        began = time.perf_counter()
        dataset = datasets.load(bench.plan.dataset, bench.plan.data)
        read.append(time.perf_counter() - began)
        began = time.perf_counter()
        generated.draw(_DRAWN_IMAGES, "bench")
        drawn.append((time.perf_counter() - began) / _DRAWN_IMAGES * 1e6)
        megabytes, name = sum(array.nbytes for array in dataset.arrays().values()) / 1e6, dataset.name
    seconds, microseconds = summary(read), summary(drawn)
    bench.show(
        "Data",
        ["", "", ""],
        [
            [f"{name}, {megabytes:.0f} MB", f"{median_and_range(seconds, '.3f')} s", "read and checked"],
            ["a generated image", f"{median_and_range(microseconds, '.1f')} µs", "on one core"],
        ],
    )
    return {"name": name, "seconds": seconds, "megabytes": megabytes, "draw_microseconds": microseconds}


def scaling(bench: Bench) -> dict[str, Any]:
    """Measure the throughput of each way to add gradients, and of the plain loop, at each world size.

    Exact arithmetic is left out for a recipe with code of the user's own, which may have no exact form.
    """
    plan, recipe = bench.plan, load_recipe(bench.plan.recipe)
    cost = recipe.batch_size * MICROSECONDS_PER_IMAGE.get(recipe.model, MICROSECONDS_PER_IMAGE["cnn"])
    steps_alone = max(20, round(plan.seconds / cost * 1e6))
    flags = ["--recipe", plan.recipe, "--epochs", "1000"]
    usual = "fp32" if recipe.precision == "exact" else recipe.precision
    methods = {sync: ["--precision", usual, "--sync", sync] for sync in ("tree", "ddp")}
    if not recipe.code():
        methods["exact"] = ["--precision", "exact"]
    speed = defaultdict[tuple[str, int], list[float]](list)
    parts: dict[tuple[str, int], dict[str, float]] = {}
    for i in range(plan.runs):
        for n in bench.sizes:
            bench.show_progress(f"round {i + 1} of {plan.runs}, with {n} process{'es' if n > 1 else ''}")
            steps = ["--steps", str(steps_alone * min(n, usable_cores()))]
            for method, choice in methods.items():
                training = bench.train(n, *flags, *steps, *choice, cores=n)
                speed[method, n].append(training.result["images_per_second"])
                parts[method, n] = training.parts
            speed[PLAIN_LOOP, n].append(plain_loop(bench, recipe, n))
    rows = [
        {
            "way": method,
            "nproc": n,
            "images_per_second": summary(speed[method, n]),
            "of_one_process": summary(ratios(speed[method, n], speed[method, 1])),
            "of_ddp": summary(ratios(speed[method, n], speed["ddp", n])),
            "of_plain_loop": summary(ratios(speed[method, n], speed[PLAIN_LOOP, n])),
            "parts": parts.get((method, n), {}),
        }
        for method in (*methods, PLAIN_LOOP)
        for n in bench.sizes
    ]
    formats = {
        "images_per_second": ",.0f",
        "of_one_process": ".2f",
        "of_ddp": ".2f",
        "of_plain_loop": ".1f",
    }
    bench.show(
        f"Throughput of {plan.recipe} ({recipe.model}, batches of {recipe.batch_size}), a core per process",
        ["", "processes", "images/s", "of one process", "of ddp", "of the plain loop"],
        (
            [row["way"], str(row["nproc"]), *(median_and_range(row[key], formats[key]) for key in formats)]
            for row in rows
        ),
        "the plain loop: DataLoader, DistributedSampler, DistributedDataParallel over gloo, in fp32",
    )
    names = ("data", "forward", "backward", "exchange", "optimizer")
    bench.show(
        "A step, in milliseconds",
        ["", "processes", *names, "rest", "all"],
        (
            [
                row["way"],
                str(row["nproc"]),
                *(f"{1e3 * seconds:.2f}" for seconds in with_rest_and_total(row["parts"], names)),
            ]
            for row in rows
            if row["parts"]
        ),
    )
    return {"recipe": plan.recipe, "rows": rows}


def with_rest_and_total(parts: dict[str, float], names: Iterable[str]) -> list[float]:
    """Return the seconds of these parts of a step, then those of the rest, then those of the whole step."""
    known = [parts.get(name, 0.0) for name in names]
    return [*known, parts["step"] - sum(known), parts["step"]]


def plain_loop(bench: Bench, recipe: Recipe, nproc: int) -> float:
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
    command = [sys.executable, "-m", "distributed_mnist.bench.baseline", *data, *flags, *limit]
    return json.loads(output(command, cores=nproc))["images_per_second"]


def exchange(bench: Bench) -> dict[str, Any]:
    """Measure messages and sums between processes, and compare the sums with the cost model."""
    runs = [
        json.loads(output([sys.executable, "-m", "distributed_mnist.bench.exchange", str(n)]))
        for n in bench.sizes
        if n > 1
    ]
    if not runs:
        return {}
    link = fit_link([(message["bytes"], message["seconds"]) for message in runs[0]["messages"]])
    rows = [
        {
            **measured,
            "size": run["size"],
            "predicted": exchange_seconds(measured["how"], run["size"], measured["bytes"], link)
            * max(1.0, run["size"] / usable_cores()),  # more processes than cores take turns
        }
        for run in runs
        for measured in run["exchanges"]
    ]
    bench.show(
        "One sum of a vector over all processes, in milliseconds",
        ["", "processes", "kB", "measured", "predicted"],
        (
            [
                row["how"],
                str(row["size"]),
                f"{row['bytes'] / 1e3:,.0f}",
                f"{1e3 * row['seconds']:.3f}",
                f"{1e3 * row['predicted']:.3f}",
            ]
            for row in rows
        ),
        f"two processes here: {1e6 * link.latency:.0f} µs a message, {link.bandwidth / 1e9:.1f} GB/s",
    )
    return {"link": vars(link), "rows": rows, "predictions": prediction_table(link)}


def time_to_99(bench: Bench) -> dict[str, Any]:
    """Train the recipe `fast` with several seeds; measure its accuracy and its duration."""
    samples = defaultdict[str, list[float]](list)
    nproc, dataset = bench.plan.nproc or min(usable_cores(), 8), ""
    for seed in range(bench.plan.seeds):
        bench.show_progress(f"run {seed + 1} of {bench.plan.seeds}")
        training = bench.train(nproc, "--recipe", "fast", "--seed", str(seed))
        dataset = training.result["dataset"]
        figures = {
            "test accuracy, %": 100 * training.result["test_accuracy"],
            "training, s": training.result["train_seconds"],
            "first step to last weight, s": training.all_steps_seconds,
            "whole command, s": training.wall_seconds,
        }
        for name, value in figures.items():
            samples[name].append(value)
    rows = {name: summary(values) for name, values in samples.items()}
    bench.show(
        f"Recipe fast on {dataset}, {nproc} processes, {bench.plan.seeds} seeds",
        ["", "mean", "deviation", "min", "max"],
        (
            [name, *(f"{row[key]:.3f}" for key in ("mean", "deviation", "min", "max"))]
            for name, row in rows.items()
        ),
    )
    return {"nproc": nproc, "seeds": bench.plan.seeds, **rows}


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "startup": startup,
    "data": data,
    "scaling": scaling,
    "exchange": exchange,
    "time-to-99": time_to_99,
}
