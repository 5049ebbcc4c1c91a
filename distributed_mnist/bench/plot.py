"""Draw the results of `dmnist bench`: throughput by world size, and the time of a sum over them."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")  # needs no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

_METHOD_COLORS = {"tree": "#0b6e4f", "ddp": "#c05746", "exact": "#3a86c8", "plain loop": "#8d99ae"}
_ALGORITHM_COLORS = {"doubling": "#0b6e4f", "halving": "#3a86c8", "slices": "#c05746", "ring": "#8d99ae"}
_GRADIENT_BYTES = 107_048  # of the recipe `fast`


def draw(results: dict[str, Any], path: Path) -> None:
    """Write an SVG file with one panel for each of `scaling` and `exchange` that is in these results."""
    drawers = {"scaling": _scaling, "exchange": _exchange}
    panels = [panel for name, panel in drawers.items() if results.get(name)]
    count = max(len(panels), 1)
    figure, axes = plt.subplots(1, count, figsize=(6 * count, 4), squeeze=False)
    if not panels:
        axes[0, 0].set_axis_off()
    for panel, ax in zip(panels, axes[0], strict=False):
        panel(results, ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _scaling(results: dict[str, Any], ax: Axes) -> None:
    rows = results["scaling"]["rows"]
    ways = [(way, color, "-") for way, color in _METHOD_COLORS.items()]
    ways += [(f"{way}, eager", color, "--") for way, color, _ in ways]  # measured on GPUs only
    for way, color, line in ways:
        way_rows = [row for row in rows if row["way"] == way]
        if not way_rows:
            continue
        sizes = [row["nproc"] for row in way_rows]
        speeds = [row["images_per_second"] for row in way_rows]
        below = [speed["median"] - speed["min"] for speed in speeds]
        above = [speed["max"] - speed["median"] for speed in speeds]
        medians = [speed["median"] for speed in speeds]
        ax.errorbar(
            sizes, medians, [below, above], color=color, linestyle=line, marker="o", capsize=3, label=way
        )
    recipe = results["scaling"]["recipe"]
    ax.set(xlabel="processes", ylabel="images/s", title=f"Throughput, recipe {recipe}")
    ax.set_xticks(sorted({row["nproc"] for row in rows}))
    ax.set_ylim(bottom=0)


def _exchange(results: dict[str, Any], ax: Axes) -> None:
    exchange = results["exchange"]
    predicted = [row for row in exchange["predictions"] if row["bytes"] == _GRADIENT_BYTES]
    for algorithm, color in _ALGORITHM_COLORS.items():
        sizes = [row["size"] for row in predicted]
        milliseconds = [1e3 * row[algorithm] for row in predicted]
        ax.loglog(sizes, milliseconds, color=color, label=f"{algorithm}, predicted")
        key = (algorithm, _GRADIENT_BYTES)
        measured = [row for row in exchange["rows"] if (row["how"], row["bytes"]) == key]
        if measured:
            sizes = [row["size"] for row in measured]
            milliseconds = [1e3 * row["seconds"] for row in measured]
            ax.loglog(sizes, milliseconds, "o", color=color)
    title = f"One sum of {_GRADIENT_BYTES // 1000} kB over all processes (dots: measured)"
    ax.set(xlabel="processes", ylabel="ms", title=title)
    ax.set_xscale("log", base=4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()
