"""The flags of the commands that use what was trained: see `flags`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import require
from ..data.catalog import require_name
from ..errors import UsageError
from .flags_train import CommonFlags

Format = Literal["onnx", "safetensors", "torch"]


@dataclass(frozen=True)
class Evaluate(CommonFlags):
    """Score a checkpoint on the test images: every image once, on any number of processes."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, ours or the original script's, or a run's folder, whose best is taken."""
    model: str | None = None
    """For a checkpoint of your own model: the package.module:factory it was trained with."""
    dataset: str | None = None
    """Data set to score on; by default the one it was trained on."""
    data: Path | None = None
    """Folder with the data; by default the one it was trained from if that is here, else data."""
    nproc: int | None = None
    """Processes to start here; by default one."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU or other accelerator if there is one, cpu never does."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        require(self.nproc is None or self.nproc >= 1, "nproc", "at least 1", self)
        if self.dataset is not None:
            require_name(self.dataset)


@dataclass(frozen=True)
class Predict(CommonFlags):
    """Say what is drawn in pictures: of any size, dark on light or light on dark, photos too."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, ours or the original script's, or a run's folder, whose best is taken."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files of one digit each, folders of them, or an IDX file of images, raw or .gz."""
    top: int = 1
    """How many classes to name for each, the likeliest first."""
    ink: Literal["auto", "dark", "light"] = "auto"
    """Whether the digit is darker or lighter than its ground; auto looks at the border."""
    show: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show what the network is given: the digit cut out, scaled and centred as MNIST's are."""
    model: str | None = None
    """For a checkpoint of your own model: the package.module:factory it was trained with."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU or other accelerator if there is one, cpu never does."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        if not self.images:
            raise UsageError("predict needs pictures (dmnist predict --help lists the flags)")
        require(self.top >= 1, "top", "at least 1", self)


@dataclass(frozen=True)
class Report(CommonFlags):
    """Make one page of a run, or of several side by side, from their files; of a running one too."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """File to write; by default report.html in the run's folder, or here for several runs."""

    def __post_init__(self) -> None:
        """Raises `UsageError` without a run."""
        if not self.runs:
            raise UsageError("report needs a run's folder (dmnist report --help lists the flags)")


@dataclass(frozen=True)
class Watch(CommonFlags):
    """Follow a run that somebody else started, by its files: progress, its ranks, and who holds them up. It
    ends with the run; Ctrl-C ends only the watching."""

    run: tyro.conf.Positional[Path]
    """The run's folder. With --json how it stands now, and no more."""


@dataclass(frozen=True)
class Doctor(CommonFlags):
    """Examine this machine, or under torchrun, srun or mpirun this job: versions, devices, names, exchanges
    between the processes, disk, data. For what is not good it says what to do."""

    nproc: int | None = None
    """Processes to start here for what takes several; by default one per core, 2 to 4."""
    out: Path = Path("runs")
    """Where checkpoints would go."""
    dataset: str = "mnist"
    """Data set to look for; nothing is downloaded."""
    data: Path = Path("data")
    """Folder to look in."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU or other accelerator if there is one, cpu never does."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        require(self.nproc is None or self.nproc >= 1, "nproc", "at least 1", self)
        require_name(self.dataset)


@dataclass(frozen=True)
class Export(CommonFlags):
    """Write a checkpoint as a file that runs without dmnist, and compare what it computes with torch."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, ours or the original script's, or a run's folder, whose best is taken."""
    model: str | None = None
    """For a checkpoint of your own model: the package.module:factory it was trained with."""
    format: tuple[Format, ...] = ("onnx",)
    """onnx for onnxruntime in any language, safetensors for the bare weights, torch for a .pt2 of
    torch.export."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write; by default model.onnx, model.safetensors, model.pt2 in the run's folder."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible combinations."""
        require(len(self.format) >= 1, "format", "at least one of onnx, safetensors, torch", self)
        require(len(set(self.format)) == len(self.format), "format", "different ones", self)
        if self.out is not None and len(self.format) > 1:
            raise UsageError("--out names one file: give one --format with it, or leave it out")
