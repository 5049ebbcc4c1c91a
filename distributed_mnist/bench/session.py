"""What the sections of `dmnist bench` share: its flags, the device, and how they train and print."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..common.compute_platform import this_platform
from ..common.placement import physical_cores
from ..config import Device, load_recipe
from ..distributed.devices import find_accelerator
from ..training.step.device_graph import graphs_on
from .timed_runs import TimedTraining, train

_DEFAULT_MAX_NPROC = 4


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
    device: Device


@dataclass(frozen=True)
class Gpus:
    """The GPUs, or other accelerators, that are measured."""

    kind: str
    """torch's name of the kind of device, such as "cuda"."""
    name: str
    count: int

    @property
    def has_graphs(self) -> bool:
        """Whether a step can be captured and launched as one."""
        return graphs_on(torch.device(self.kind)) is not None


def find_gpus(device: Device) -> Gpus | None:
    """Return the GPUs that `device` asks for; None for the CPU. Raises `LaunchError` if there are none."""
    found = find_accelerator(device)
    if found is None:
        return None
    return Gpus(found.type, this_platform(found).processor, torch.accelerator.device_count())


@dataclass
class Bench:
    """The state of one `dmnist bench`: its plan, its temporary folder and its results so far."""

    plan: Plan
    console: Console
    folder: Path
    gpus: Gpus | None
    """What is measured; None for the CPU."""
    results: dict[str, Any] = field(default_factory=dict)
    show_progress: Callable[[str], None] = lambda text: None
    _runs: int = 0

    @property
    def sizes(self) -> list[int]:
        """World sizes to measure: all up to four, then powers of two, and the largest."""
        most = self.plan.nproc or min(
            self.gpus.count if self.gpus else min(physical_cores(), _DEFAULT_MAX_NPROC),
            load_recipe(self.plan.recipe).shards,
        )
        return [n for n in range(1, most + 1) if n <= 4 or n & (n - 1) == 0 or n == most]

    @property
    def import_torch(self) -> str:
        """The least that a Python program on this device does: it imports torch and, on a GPU, uses it."""
        return "import torch" + (f"; torch.ones(1, device='{self.gpus.kind}')" if self.gpus else "")

    def measure(self, name: str, section: Callable[["Bench"], dict[str, Any]]) -> None:
        """Run a section, show its progress, and store its results."""
        with self.console.status(f"measuring: {name}") as status:
            self.show_progress = lambda text: status.update(f"measuring: {name}, {text}")
            self.results[name] = section(self)

    def train(self, nproc: int, *flags: str, cores: int | None = None) -> TimedTraining:
        """Run `dmnist train` on this bench's data, without checkpoints and evaluations before the end.

        On CPU, `cores` limits its processes to that many cores.
        """
        self._runs += 1
        data = ["--dataset", self.plan.dataset, "--data", str(self.plan.data), "--device", self.plan.device]
        intervals = ["--checkpoint-every", "60 minutes", "--eval-every", "1000000"]
        out = self.folder / f"run{self._runs}"
        cores = None if self.gpus else cores
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
