"""Models of a user's own, named on the command line as `networks:FACTORY`."""

import os
import signal

from torch import nn


def dropout(classes: int) -> nn.Module:
    """Draws random numbers in training."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, classes)
    )


def batch_norm(classes: int) -> nn.Module:
    """Mixes samples: its answer would depend on how a batch is cut."""
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, classes))


def eleven_classes(classes: int) -> nn.Module:
    """Does not do as it is told."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 11))


def fatal(classes: int) -> nn.Module:
    """Ends the process that makes it, as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(classes)
