"""The picture of a `dmnist bench`: throughput by processes, and what an exchange takes on larger groups."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")  # needs no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

_WAYS = {"tree": "#0b6e4f", "ddp": "#c05746", "plain loop": "#8d99ae"}
_TOPOLOGIES = {"doubling": "#0b6e4f", "halving": "#3a86c8", "slices": "#c05746", "ring": "#8d99ae"}
_BYTES = 107_048  # of the gradient of `fast`


def draw(results: dict[str, Any], path: Path) -> None:
    """Write what can be drawn of these results as an SVG file."""
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
    for way, color in _WAYS.items():
        mine = [row for row in rows if row["way"] == way]
        sizes = [row["nproc"] for row in mine]
        speeds = [row["images_per_second"] for row in mine]
        low = [speed["median"] - speed["min"] for speed in speeds]
        high = [speed["max"] - speed["median"] for speed in speeds]
        middle = [speed["median"] for speed in speeds]
        ax.errorbar(sizes, middle, [low, high], color=color, marker="o", capsize=3, label=way)
    recipe = results["scaling"]["recipe"]
    ax.set(xlabel="processes", ylabel="images/s", title=f"Throughput, recipe {recipe}")
    ax.set_xticks(sorted({row["nproc"] for row in rows}))
    ax.set_ylim(bottom=0)


def _exchange(results: dict[str, Any], ax: Axes) -> None:
    found = results["exchange"]
    predicted = [row for row in found["predictions"] if row["bytes"] == _BYTES]
    for how, color in _TOPOLOGIES.items():
        sizes, taken = [row["size"] for row in predicted], [1e3 * row[how] for row in predicted]
        ax.loglog(sizes, taken, color=color, label=f"{how}, predicted")
        measured = [row for row in found["rows"] if (row["how"], row["bytes"]) == (how, _BYTES)]
        if measured:
            sizes, taken = [row["size"] for row in measured], [1e3 * row["seconds"] for row in measured]
            ax.loglog(sizes, taken, "o", color=color)
    title = f"One sum of {_BYTES // 1000} kB over all processes (dots: measured)"
    ax.set(xlabel="processes", ylabel="ms", title=title)
    ax.set_xscale("log", base=4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()
