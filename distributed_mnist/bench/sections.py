"""The sections of `dmnist bench`: one function each, which shows a table and returns its figures."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ..common.placement import usable_cores
from ..data import datasets, generated
from ..gradients.cost_model import exchange_seconds, fit_link, prediction_table
from .session import Bench
from .throughput import scaling
from .timed_runs import median_and_range, output, ratios, seconds_of, summary
from .whole_runs import recipes, time_to_99

_DRAWN_IMAGES = 2_000


def startup(bench: Bench) -> dict[str, Any]:
    """Measure the time from the command to the first step, and compare it with an import of torch.

    On a GPU, this program also creates a tensor there.
    """
    samples = defaultdict[str, list[float]](list)
    import_torch, flags = (
        f'python -c "{bench.import_torch}"',
        ["--recipe", bench.plan.recipe, "--steps", "2"],
    )
    for i in range(bench.plan.runs):
        bench.show_progress(f"round {i + 1} of {bench.plan.runs}")
        seconds = {import_torch: seconds_of([sys.executable, "-c", bench.import_torch])}
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
        ["", "seconds", "of the first"],
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


def exchange(bench: Bench) -> dict[str, Any]:
    """Measure messages and sums between processes on CPUs, and compare the sums with the cost model."""
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


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "startup": startup,
    "data": data,
    "scaling": scaling,
    "exchange": exchange,
    "time-to-99": time_to_99,
    "recipes": recipes,
}
ONLY_ON_GPUS = ("recipes",)
"""Sections that take long on a CPU: there they are measured only if they are named."""
