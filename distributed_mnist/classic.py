"""The original script's command: from its flags to processes. `classic_job.py` is what each does."""

import os
import socket
from dataclasses import dataclass

from . import launch
from .errors import UsageError
from .placement import Placement
from .spawn import spawn


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
    placement = launch.detect(os.environ)
    if placement is not None or options.world_size == 1:
        return work(placement or Placement(), None, options)
    return spawn(options.world_size, work, (options,))


def work(placement: Placement, listener: socket.socket | None, options: Options) -> int:
    """One rank's life; the exit code."""
    from . import classic_job  # not before: the process that only starts others does without torch

    return classic_job.work(placement, listener, options)
