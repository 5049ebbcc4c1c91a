"""`dmnist train --dry-run` and `--summary`: show what a run would do, without training or writing."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import Run
from ..data import prefetch
from ..data.catalog import ENTRIES
from ..data.datasets import Dataset, load
from ..data.download_progress import DataProgress
from ..data.locate import NotFoundError
from ..reporting.console import print_labelled

_MADE = 60_000
"""How many images, as in most of the sets: enough for `--validation` to leave some to train on."""


class Reader:
    """Reads a run's data set, but downloads nothing: in place of a missing one it makes black images."""

    def __init__(self, options: Run, console: Console) -> None:
        self._options, self._console = options, console
        self.missing: str | None = None
        """What the run would download; None if the data is there."""

    def __call__(self) -> Dataset:
        """Return the data set. Raises `DataError` if it is missing and no mirror has it."""
        options = self._options
        name = "mnist" if options.dataset == "auto" else options.dataset
        try:
            with DataProgress(self._console) as progress:
                return load(
                    name,
                    options.data,
                    download=False,
                    seed=options.data_seed,
                    train_size=options.train_size,
                    test_size=options.test_size,
                    progress=progress,
                )
        except NotFoundError:
            entry = ENTRIES[name]
            if not entry.mirrors:
                return prefetch.read(options, self._console)  # raises the error that the run would
        self.missing = f"{name}, not in {options.data}: a run would download it from {entry.mirrors[0]}"
        if options.dataset == "auto":
            self.missing += ", or else generate digits"
        labels = np.resize(np.arange(len(entry.class_names), dtype=np.uint8), _MADE)
        images = np.zeros((len(labels), 28, 28), np.uint8)
        arrays = (images, labels, images.copy(), labels.copy())
        return Dataset(name, *arrays, entry.class_names, *(entry.constants or (0.0, 1.0)), self.missing)

    def correct(self, plan: dict[str, Any]) -> None:
        """Remove from a plan what is not known before the download."""
        if self.missing is None:
            return
        plan["lines"]["data"] = self.missing
        plan["lines"]["steps"] = "known after the download"
        unknown = ("train_images", "test_images", "steps", "steps_per_epoch")
        plan.update(dict.fromkeys(unknown), download=self.missing)


def print_plan(console: Console, plan: dict[str, Any], *, dry_run: bool, summary: bool) -> None:
    """Print the lines of a plan, if `dry_run`, and the layers of its model, if `summary`."""
    if dry_run:
        lines = [*plan["lines"].items(), *(("note", text) for text in plan["notices"])]
        for name, text in lines:
            style = "yellow" if name == "note" else ""
            print_labelled(console, Text(f"{name:<8} ", "bold"), Text(text, style), 9)
    if summary:
        console.print(layer_table(plan["recipe"]["model"], plan["layers"]))
        total = sum(layer["parameters"] for layer in plan["layers"])
        console.print(Text(f"{total:,} parameters; N is the number of images", "bold"), soft_wrap=True)
    if dry_run:
        console.print(Text("a dry run: nothing was trained or written"), soft_wrap=True)


def layer_table(model: str, layers: list[dict[str, Any]]) -> Table:
    """Make a table of a model's layers. Each is indented below the one that contains it."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("layer", "type", "output", "parameters"):
        justify = "right" if column == "parameters" else "left"
        table.add_column(column, justify=justify, no_wrap=True, overflow="ellipsis")
    for layer in layers:
        path = layer["name"].split(".") if layer["name"] else []
        name = "  " * len(path) + (path[-1] if path else model)
        calls = f" x {layer['calls']}" if layer["calls"] > 1 else ""
        shape = ", ".join("N" if size is None else str(size) for size in layer["output"] or ())
        output = "-" if layer["output"] is None else f"({shape})"
        parameters = f"{layer['parameters']:,}" if layer["parameters"] else ""
        table.add_row(name, f"{layer['type']}{calls}", output, parameters)
    return table
