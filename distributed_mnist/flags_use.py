"""The flags of the commands that use what was trained: see `flags`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .catalog import require_name
from .config import require
from .errors import UsageError
from .flags import Every

Format = Literal["onnx", "safetensors", "torch"]


@dataclass(frozen=True)
class Evaluate(Every):
    """Score a checkpoint on the test images: every image once, on any number of processes."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, ours or the original script's, or a run's folder, whose best is taken."""
    model: str | None = None
    """For a checkpoint of your own model: the package.module:factory it was trained with."""
    dataset: str | None = None
    """Data set to score on; by default the one it was trained on."""
    data: Path = Path("data")
    """Folder with the data; what is missing is downloaded into it."""
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
class Export(Every):
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
