"""Start the original script's job with the flags of `multi_proc_single_gpu.py`.

`original_worker` runs in each process.
"""

from dataclasses import dataclass

from ..config import require
from ..distributed import detect_launcher
from ..launcher import spawn
from . import surroundings


@dataclass(frozen=True)
class Options:
    """The original script's flags. None means not given, for flags where that makes a difference."""

    root: str
    workers: int | None
    epochs: int
    start_epoch: int
    batch_size: int
    lr: float
    momentum: float | None
    weight_decay: float | None
    resume: str
    evaluate: bool
    backend: str
    local_rank: int | None
    init_method: str | None
    world_size: int
    rank: int | None
    seed: int

    def __post_init__(self) -> None:
        """Raise `UsageError` for invalid values."""
        for name, minimum in (("world_size", 1), ("epochs", 0), ("start_epoch", 0)):
            require(getattr(self, name) >= minimum, name, f"at least {minimum}", self)


def main(options: Options) -> int:
    """Run the job in this process if a launcher started it, otherwise start `--world-size` processes.

    Returns the exit code.
    """
    surroundings.prepare()
    return spawn.start(
        detect_launcher.detect(), options.world_size, "distributed_mnist.cli.original_worker:work", options
    )
