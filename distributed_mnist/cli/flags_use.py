"""Flags of the commands that use trained networks or examine a run or a machine. See `flags_train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import Device, require, require_count
from ..data.catalog import require_name
from ..errors import UsageError
from .flags_train import CommonFlags

Format = Literal["onnx", "safetensors", "torch"]


@dataclass(frozen=True)
class Evaluate(CommonFlags):
    """Evaluate a checkpoint on the test images, each exactly once, with any number of processes."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint (from dmnist or the original script), or a run's folder: its last weights or, with
    --validation, those with the best validation accuracy."""
    model: str | None = None
    """For a checkpoint of your own model: the package.module:factory it was trained with."""
    dataset: str | None = None
    """Data set to evaluate on (default: the one it was trained on)."""
    data: Path | None = None
    """Data folder (default: the folder it was trained from if it exists here, otherwise data)."""
    nproc: int | None = None
    """Number of processes to start on this host (default: 1)."""
    device: Device = "auto"
    """auto uses a GPU or other accelerator if there is one; cpu always uses the CPU; cuda, mps or xpu
    demand an accelerator of this kind."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for invalid values."""
        require_count(self, "nproc")
        if self.dataset is not None:
            require_name(self.dataset)


@dataclass(frozen=True)
class Predict(CommonFlags):
    """Classify pictures of digits, including photos: any size, dark on light or light on dark."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint (from dmnist or the original script), or a run's folder: its last weights or, with
    --validation, those with the best validation accuracy."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files with one digit each, folders of such files, or IDX files of images, raw or .gz."""
    top: int = 1
    """Number of classes to list for each picture, most likely first."""
    ink: Literal["auto", "dark", "light"] = "auto"
    """Whether the digit is darker or lighter than the background. auto decides by the picture's border."""
    show: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the network's input: the digit cropped, scaled and centered as in MNIST."""
    model: str | None = None
    """For a checkpoint of your own model: the package.module:factory it was trained with."""
    device: Device = "auto"
    """auto uses a GPU or other accelerator if there is one; cpu always uses the CPU; cuda, mps or xpu
    demand an accelerator of this kind."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for invalid values."""
        if not self.images:
            raise UsageError("predict needs pictures (dmnist predict --help lists the flags)")
        require_count(self, "top")


@dataclass(frozen=True)
class Report(CommonFlags):
    """Write an HTML report of one run, or a comparison of several. This also works for runs in progress."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the runs."""
    out: Path | None = None
    """File to write (default: report.html, in the run's folder or, for several runs, the current one)."""

    def __post_init__(self) -> None:
        """Raise `UsageError` if no run is given."""
        if not self.runs:
            raise UsageError("report needs a run's folder (dmnist report --help lists the flags)")


@dataclass(frozen=True)
class Watch(CommonFlags):
    """Follow a run from another terminal or host by reading its files: progress, ranks and stragglers.
    Exits when the run ends. Ctrl-C stops watching, not the run."""

    run: tyro.conf.Positional[Path]
    """The run's folder. With --json, print the current state and exit."""


@dataclass(frozen=True)
class Stop(CommonFlags):
    """Stop a run, also one in the background: it saves a checkpoint and ends. It can be resumed."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    timeout: float = 30.0
    """How many seconds to wait for the run to end."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for invalid values."""
        require(0 < self.timeout <= 3600, "timeout", "above zero and at most 3600", self)


@dataclass(frozen=True)
class Doctor(CommonFlags):
    """Check this machine or, under torchrun, srun or mpirun, this job: versions, devices, host names,
    collectives, disk and data. Suggests a fix for each problem it finds."""

    nproc: int | None = None
    """Number of processes for the checks of collectives (default: one per GPU; without GPUs one per core, 2
    to 4)."""
    out: Path = Path("runs")
    """Folder where checkpoints would be written."""
    dataset: str = "mnist"
    """Data set to look for. Nothing is downloaded."""
    data: Path = Path("data")
    """Data folder to look in."""
    device: Device = "auto"
    """auto uses a GPU or other accelerator if there is one; cpu always uses the CPU; cuda, mps or xpu
    demand an accelerator of this kind."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for invalid values."""
        require_count(self, "nproc")
        require_name(self.dataset)


@dataclass(frozen=True)
class Export(CommonFlags):
    """Export a checkpoint to a file that runs without dmnist, and check its outputs against torch's."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint (from dmnist or the original script), or a run's folder: its last weights or, with
    --validation, those with the best validation accuracy."""
    model: str | None = None
    """For a checkpoint of your own model: the package.module:factory it was trained with."""
    format: tuple[Format, ...] = ("onnx",)
    """onnx: for onnxruntime in any language. safetensors: the weights only. torch: a .pt2 file from
    torch.export."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write (default: model.onnx, model.safetensors or model.pt2 in the run's folder)."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for invalid combinations."""
        require(len(self.format) >= 1, "format", "at least one of onnx, safetensors, torch", self)
        require(len(set(self.format)) == len(self.format), "format", "given without repeats", self)
        if self.out is not None and len(self.format) > 1:
            raise UsageError("--out names one file: use it with one --format, or leave it out")
