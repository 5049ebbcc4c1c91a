"""What `dmnist bench` measures: one function a section, each shows a table and returns its figures."""

import json
import sys
import time
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
from .timed_runs import Sample, Trained, output, seconds_of, train

PLAIN = "plain loop"
WAYS = ("tree", "ddp", PLAIN)
_MOST_BY_DEFAULT = 4
_DRAWN = 2_000  # images


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often."""

    sections: tuple[str, ...] = ()
    """Names of `SECTIONS`; none: all."""
    recipe: str = "default"
    nproc: int | None = None
    runs: int = 3
    seeds: int = 5
    seconds: float = 2.0
    """About how long each run of `scaling` trains."""
    dataset: str = "auto"
    data: Path = Path("data")
    out: Path | None = None


@dataclass
class Bench:
    """One `dmnist bench`: where it works, what it has shown."""

    plan: Plan
    console: Console
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda text: None
    """Shows how far a section is."""
    _runs: int = 0

    @property
    def sizes(self) -> list[int]:
        """Numbers of processes to try: all up to four, then powers of two."""
        most = self.plan.nproc or min(usable_cores(), _MOST_BY_DEFAULT)
        return [n for n in range(1, most + 1) if n <= 4 or n & (n - 1) == 0 or n == most]

    def train(self, nproc: int, *words: str, cores: int | None = None) -> Trained:
        """A `dmnist train` on this bench's data, without checkpoints on the way."""
        self._runs += 1
        data = ["--dataset", self.plan.dataset, "--data", str(self.plan.data)]
        rare = ["--checkpoint-every", "60 minutes", "--eval-every", "1000000"]
        out = self.folder / f"run{self._runs}"
        return train(out, "--nproc", str(nproc), *data, *rare, *words, cores=cores)

    def show(self, title: str, columns: list[str], rows: Iterable[list[str]], *notes: str) -> None:
        """A table."""
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
    """From the command to the first step, against an import of torch."""
    taken: dict[str, Sample] = {}
    plain, words = "python -c 'import torch'", ["--recipe", bench.plan.recipe, "--steps", "2"]
    for i in range(bench.plan.runs):
        bench.tell(f"round {i + 1} of {bench.plan.runs}")
        seconds = {plain: seconds_of([sys.executable, "-c", "import torch"])}
        seconds["dmnist --help"] = seconds_of([sys.executable, "-m", "distributed_mnist", "--help"])
        for n in bench.sizes[:2]:
            seconds[f"dmnist train --nproc {n}"] = bench.train(n, *words).first_step_seconds
        for name, value in seconds.items():
            taken.setdefault(name, Sample()).add(value)
    rows = {
        name: {"seconds": sample.to_dict(), "ratio": sample.over(taken[plain]).to_dict()}
        for name, sample in taken.items()
    }
    bench.show(
        "Start-up, from the command to the first step",
        ["", "seconds", "of import torch"],
        ([name, spread(row["seconds"], ".2f"), spread(row["ratio"], ".2f")] for name, row in rows.items()),
    )
    return rows


def data(bench: Bench) -> dict[str, Any]:
    """Reading the data set, and drawing digits."""
    read, drawn, megabytes, name = Sample(), Sample(), 0.0, ""
    for _ in range(bench.plan.runs):
        began = time.perf_counter()
        found = datasets.load(bench.plan.dataset, bench.plan.data)
        read.add(time.perf_counter() - began)
        began = time.perf_counter()
        generated.draw(_DRAWN, "bench")
        drawn.add((time.perf_counter() - began) / _DRAWN * 1e6)
        megabytes, name = sum(array.nbytes for array in found.arrays().values()) / 1e6, found.name
    seconds, microseconds = read.to_dict(), drawn.to_dict()
    bench.show(
        "Data",
        ["", "", ""],
        [
            [f"{name}, {megabytes:.0f} MB", f"{spread(seconds, '.3f')} s", "obtained and checked"],
            ["a drawn image", f"{spread(microseconds, '.1f')} µs", "on one core"],
        ],
    )
    return {"name": name, "seconds": seconds, "megabytes": megabytes, "draw_microseconds": microseconds}


def scaling(bench: Bench) -> dict[str, Any]:
    """Throughput in both ways of adding gradients up, at each size, against the plain loop."""
    plan, recipe = bench.plan, load_recipe(bench.plan.recipe)
    cost = recipe.batch_size * MICROSECONDS_PER_IMAGE.get(recipe.model, MICROSECONDS_PER_IMAGE["cnn"])
    alone = max(20, round(plan.seconds / cost * 1e6))
    words = ["--recipe", plan.recipe, "--epochs", "1000"]
    speed: dict[tuple[str, int], Sample] = {}
    parts: dict[tuple[str, int], dict[str, float]] = {}
    for i in range(plan.runs):
        for n in bench.sizes:
            bench.tell(f"round {i + 1} of {plan.runs}, with {n} process{'es' if n > 1 else ''}")
            steps = ["--steps", str(alone * min(n, usable_cores()))]
            for way in ("tree", "ddp"):
                trained = bench.train(n, *words, *steps, "--sync", way, cores=n)
                speed.setdefault((way, n), Sample()).add(trained.result["images_per_second"])
                parts[way, n] = trained.parts
            speed.setdefault((PLAIN, n), Sample()).add(plain_loop(bench, recipe, n))
    rows = [
        {
            "way": way,
            "nproc": n,
            "images_per_second": sample.to_dict(),
            "of_one_process": sample.over(speed[way, 1]).to_dict(),
            "of_ddp": sample.over(speed["ddp", n]).to_dict(),
            "of_plain_loop": sample.over(speed[PLAIN, n]).to_dict(),
            "parts": parts.get((way, n), {}),
        }
        for (way, n), sample in sorted(speed.items(), key=lambda item: (WAYS.index(item[0][0]), item[0][1]))
    ]
    bench.show(
        f"Throughput of {plan.recipe} ({recipe.model}, batches of {recipe.batch_size}), a core a process",
        ["", "processes", "images/s", "of one process", "of ddp", "of the plain loop"],
        (
            [
                row["way"],
                str(row["nproc"]),
                spread(row["images_per_second"], ",.0f"),
                spread(row["of_one_process"], ".2f"),
                spread(row["of_ddp"], ".2f"),
                spread(row["of_plain_loop"], ".1f"),
            ]
            for row in rows
        ),
        "the plain loop: DataLoader, DistributedSampler, DistributedDataParallel over gloo, in fp32",
    )
    names = ("data", "forward", "backward", "exchange", "optimizer")
    bench.show(
        "A step, in milliseconds",
        ["", "processes", *names, "rest", "all"],
        (
            [row["way"], str(row["nproc"]), *(f"{1e3 * part:.2f}" for part in split(row["parts"], names))]
            for row in rows
            if row["parts"]
        ),
    )
    return {"recipe": plan.recipe, "rows": rows}


def split(parts: dict[str, float], names: Iterable[str]) -> list[float]:
    """A step's parts, what is left of it, and all of it."""
    known = [parts.get(name, 0.0) for name in names]
    return [*known, parts["step"] - sum(known), parts["step"]]


def plain_loop(bench: Bench, recipe: Recipe, nproc: int) -> float:
    """Images a second of the plain loop."""
    if bench.plan.dataset in ("auto", "generated"):
        where = bench.folder / "baseline-data"
        if not where.exists():
            drawn = datasets.load(bench.plan.dataset, bench.plan.data, train_size=6_000, test_size=500)
            datasets.write(drawn, where)
        data = ["--dataset", "idx", "--data", str(where)]
    else:
        data = ["--dataset", bench.plan.dataset, "--data", str(bench.plan.data)]
    words = ["--model", recipe.model, "--nproc", str(nproc), "--batch-size", str(recipe.batch_size)]
    limit = ["--seconds", str(bench.plan.seconds)]
    command = [sys.executable, "-m", "distributed_mnist.bench.baseline", *data, *words, *limit]
    return json.loads(output(command, cores=nproc))["images_per_second"]


def exchange(bench: Bench) -> dict[str, Any]:
    """Messages and sums between processes here, and what the model makes of them."""
    found = [
        json.loads(output([sys.executable, "-m", "distributed_mnist.bench.exchange", str(n)]))
        for n in bench.sizes
        if n > 1
    ]
    if not found:
        return {}
    link = fit_link([(m["bytes"], m["seconds"]) for m in found[0]["messages"]])
    rows = [
        {
            **made,
            "size": each["size"],
            "predicted": exchange_seconds(made["how"], each["size"], made["bytes"], link)
            * max(1.0, each["size"] / usable_cores()),  # more processes than cores take turns
        }
        for each in found
        for made in each["exchanges"]
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
    """The recipe `fast`, several seeds."""
    accuracy, training, stretch, whole = Sample(), Sample(), Sample(), Sample()
    nproc, dataset = bench.plan.nproc or min(usable_cores(), 8), ""
    for seed in range(bench.plan.seeds):
        bench.tell(f"run {seed + 1} of {bench.plan.seeds}")
        trained = bench.train(nproc, "--recipe", "fast", "--seed", str(seed))
        dataset = trained.result["dataset"]
        accuracy.add(100 * trained.result["test_accuracy"])
        training.add(trained.result["train_seconds"])
        stretch.add(trained.all_steps_seconds)
        whole.add(trained.wall_seconds)
    rows = {
        "test accuracy, %": accuracy.to_dict(),
        "training, s": training.to_dict(),
        "first step to last weight, s": stretch.to_dict(),
        "whole command, s": whole.to_dict(),
    }
    bench.show(
        f"Recipe fast on {dataset}, {nproc} processes, {bench.plan.seeds} seeds",
        ["", "mean", "deviation", "min", "max"],
        (
            [name, *(f"{row[key]:.3f}" for key in ("mean", "deviation", "min", "max"))]
            for name, row in rows.items()
        ),
    )
    return {"nproc": nproc, "seeds": bench.plan.seeds, **rows}


def spread(row: dict[str, Any], form: str) -> str:
    """The median, and between what it was."""
    if row["n"] == 1:
        return f"{row['median']:{form}}"
    return f"{row['median']:{form}} ({row['min']:{form}} to {row['max']:{form}})"


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "startup": startup,
    "data": data,
    "scaling": scaling,
    "exchange": exchange,
    "time-to-99": time_to_99,
}
