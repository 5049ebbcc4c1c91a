"""The original script's command: from its flags to processes. `classic_job.py` is what each does."""

from dataclasses import dataclass

from ..distributed import detect_launcher
from ..errors import UsageError
from ..launcher import spawn


@dataclass(frozen=True)
class Options:
    """The original's flags; None where it matters whether one was given."""

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
        for name, least in (("world_size", 1), ("epochs", 0), ("start_epoch", 0)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} must be at least {least}, not {getattr(self, name)}")


def main(options: Options) -> int:
    """Run the job here, or in `--world-size` processes of our own if no launcher started this one."""
    return spawn.start(
        detect_launcher.detect(), options.world_size, "distributed_mnist.cli.original_worker:work", options
    )
