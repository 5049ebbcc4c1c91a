"""`Run`: the settings that say which data, where and how."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UsageError
from .fields import check_type, flag, require, require_count
from .intervals import checkpoint_interval

Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]
Balance = Literal["off", "auto"]
CudaGraphs = Literal["auto", "off"]

DATA_OPTIONS = ("dataset", "data", "train_size", "test_size", "data_seed", "init_from")
"""Fields of `Run` that decide the weights."""


@dataclass(frozen=True)
class Run:
    """Which data a run uses, where it runs and writes, and how.

    Apart from the choice of data, `init_from` and the kind of device, nothing here changes the weights.
    (With `--sync ddp`, the number of processes and `micro_batch` change the rounding.)
    """

    dataset: str = "mnist"
    """mnist, fashion-mnist, kmnist, qmnist, emnist-SPLIT, generated (synthetic digits), idx (your own
    files), or auto (mnist if available, otherwise generated)."""
    data: Path = Path("data")
    """Data folder. Missing files are downloaded into it."""
    train_size: int = 60_000
    """Number of training images to generate, with --dataset generated."""
    test_size: int = 10_000
    """Number of test images to generate, with --dataset generated."""
    data_seed: int = 0
    """Seed for the digits, with --dataset generated."""
    init_from: str | None = None
    """Start from the weights in this checkpoint, file of weights (.pt or .safetensors) or run's folder (the
    last weights, or the best with --validation) instead of random ones. The model must be the same."""
    out: Path | None = None
    """Folder for checkpoints and logs (default: a new folder under runs/)."""
    resume: str | None = None
    """Checkpoint to resume from, or auto for the newest valid one in --out."""
    checkpoint_every: str = "5 seconds"
    """How often to save a checkpoint, in the background: in seconds or minutes ('5 seconds'), steps (500)
    or epochs ('2 epochs')."""
    keep: int = 3
    """How many of the newest checkpoints to keep, in addition to best.pt."""
    max_restarts: int = 3
    """If a process dies, restart all processes from the last checkpoint. Give up after this many restarts
    in a row without a new checkpoint. (Other launchers have their own restart settings.)"""
    hang_after: float = 60.0
    """If a process makes no progress for this many seconds, the others report it and exit."""
    nproc: int | None = None
    """Number of processes to start on this host (default: one per GPU; on CPU, as many as speed it up)."""
    device: Device = "auto"
    """auto uses a GPU or other accelerator if there is one; cpu always uses the CPU; cuda, mps or xpu
    demand an accelerator of this kind."""
    oversubscribe: bool = False
    """Let several processes share a GPU, to try how training in a group works. They communicate through the
    CPU, and are slower than one process."""
    micro_batch: int | None = None
    """With --sync ddp, the most images to put through the model at once, to save memory (default: the
    process's whole share of the batch). With tree it is one shard, or several shards up to 512 images. With
    --precision exact, the most images per pass of a step (default: what is fastest)."""
    balance: Balance = "off"
    """With --precision exact, auto gives slower processes fewer images of each batch, by their measured
    speed; off cuts batches evenly. The weights are the same."""

    cuda_graphs: CudaGraphs = "auto"
    """On a CUDA device, auto captures a whole training step as a CUDA graph, and launches it at once; off
    launches one kernel after another. The weights are the same with --sync tree and --precision exact."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        for field in dataclasses.fields(self):
            check_type(flag(field.name), field, getattr(self, field.name))
        require_count(self, "train_size", "test_size", "keep", "nproc", "micro_batch")
        require(0 <= self.data_seed < 2**63, "data_seed", "between 0 and 2^63 - 1", self)
        require(self.max_restarts >= 0, "max_restarts", "zero or more", self)
        require(1 <= self.hang_after < math.inf, "hang_after", "at least 1", self)
        checkpoint_interval(self.checkpoint_every, 1)
        if self.dataset not in ("generated", "auto"):
            for name in ("train_size", "test_size", "data_seed"):
                if getattr(self, name) != getattr(Run, name):
                    raise UsageError(f"{flag(name)} only goes with --dataset generated")
        if self.resume == "auto" and self.out is None:
            raise UsageError("--resume auto needs --out: the folder of the run to resume")
