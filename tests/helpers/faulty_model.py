"""A model that fails in the middle of a training, for `--model faulty_model:network`.

`TROUBLE="kill 1 train 300"`: rank 1's process kills itself in its 300th training pass, counted in each
process (a step of batches in 8 shards has four passes on each of two ranks). Instead of `kill` it may
`loop` forever, `sleep` forever, `raise`, or answer with `nan`; instead of `train`, in a pass of an
evaluation (`evaluate`). The file that `TROUBLE_TOLD` names is there when the trouble has begun, and with
`TROUBLE_ONCE` it only begins where that file is not there yet. Training goes slowly until the file named by
`SLOW_UNTIL` is there. `OBEY_SECONDS` shortens how long a process that was asked to stop may take. What the
model computes is the same with all of this and without.
"""

import multiprocessing
import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn

from distributed_mnist.launcher import signals

signals.OBEY_SECONDS = float(os.environ.get("OBEY_SECONDS", signals.OBEY_SECONDS))


class Network(nn.Module):
    """A small network, and what it was told to do."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, classes))
        self.passes = {"train": 0, "evaluate": 0}
        words = os.environ.get("TROUBLE", "none 0 train 0").split()
        self.what, self.rank, self.when, self.at = words[0], int(words[1]), words[2], int(words[3])
        self.slow_until = os.environ.get("SLOW_UNTIL")

    def forward(self, images: Tensor) -> Tensor:
        """The logits, unless now is the time."""
        when = "train" if self.training else "evaluate"
        if self.training or len(images) > 20:  # else the program only tries the model
            self.passes[when] += 1
        if self.slow_until and self.training and not Path(self.slow_until).exists():
            time.sleep(0.01)
        if when == self.when and self.passes[when] == self.at and _rank() == self.rank and _begins():
            return self.trouble(images)
        return self.layers(images)

    def trouble(self, images: Tensor) -> Tensor:
        """What it is."""
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while self.what == "loop":
            pass
        while self.what == "sleep":
            time.sleep(60)
        if self.what == "raise":
            raise ArithmeticError("of the user's own")
        return self.layers(images) * float("nan")


def network(classes: int) -> nn.Module:
    """For `--model`."""
    return Network(classes)


def _rank() -> int:
    """As the launcher said, torchrun or ours."""
    return int(os.environ.get("RANK", multiprocessing.current_process().name.removeprefix("rank ")))


def _begins() -> bool:
    told = os.environ.get("TROUBLE_TOLD")
    if told is None:
        return True
    if "TROUBLE_ONCE" in os.environ and Path(told).exists():
        return False
    Path(told).touch()
    return True
