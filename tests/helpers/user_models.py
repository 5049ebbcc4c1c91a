"""Models of a user's own, named on the command line as `user_models:FACTORY`."""

import multiprocessing
import os
import random
import signal
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn


def dropout(classes: int) -> nn.Module:
    """Draws random numbers in training."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, classes)
    )


class Restless(nn.Module):
    """Draws from all global generators, when it is made and in training, and sets the number of threads."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.set_num_threads(torch.get_num_threads() + 1)
        self.first, self.second = nn.Linear(784, 64), nn.Linear(64, classes)
        self.dropout = nn.Dropout(0.3)
        with torch.no_grad():
            self.first.weight.copy_(torch.from_numpy(np.random.randn(64, 784)) * random.uniform(0.02, 0.04))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, after a layer whose output a draw may double and another may hide."""
        hidden = self.first(images.flatten(1)).relu()
        if self.training:
            hidden = self.dropout(hidden)
            hidden = hidden * 2 if np.random.rand() < 0.5 else hidden
            hidden = hidden * 0.9 if random.random() < 0.5 else hidden
        return self.second(hidden)


def restless(classes: int) -> nn.Module:
    """See `Restless`."""
    return Restless(classes)


def batch_norm(classes: int) -> nn.Module:
    """Takes statistics over each shard, and draws random numbers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, classes)),
    )


def untracked(classes: int) -> nn.Module:
    """Uses batch statistics in evaluation too."""
    return nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(784, track_running_stats=False), nn.Linear(784, classes)
    )


class BatchMean(nn.Module):
    """Mixes samples by itself."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(784), nn.Linear(784, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, after a batch norm, which is allowed, and a mean over the batch, which is not."""
        hidden = self.norm(images.flatten(1))
        return self.fc(hidden - hidden.mean(0))


def eleven_classes(classes: int) -> nn.Module:
    """Does not do as it is told."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 11))


class Branches(nn.Module):
    """Does one thing or another, by what it sees: no graph can hold that."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.light, self.dark = nn.Linear(784, classes), nn.Linear(784, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits by one layer for images that are bright on the whole, by another for dark ones."""
        flat = images.flatten(1)
        return self.light(flat) if float(flat.mean()) > 0 else self.dark(flat)


def branches(classes: int) -> nn.Module:
    """See `Branches`."""
    return Branches(classes)


def fatal(classes: int) -> nn.Module:
    """Ends the process that makes it, as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(classes)


class Leaving(nn.Module):
    """Ends the program when it sees a real batch."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(784, classes)

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 2:
            sys.exit(0)
        return self.fc(images.flatten(1))


class SlowOnRankOne(nn.Module):
    """A linear model that takes a millisecond longer for each image if its process is rank 1."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(784, classes)
        self.delay = 1e-3 if multiprocessing.current_process().name == "rank 1" else 0.0

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.delay * len(images))
        return self.layer(images.flatten(1))


def slow_on_rank_one(classes: int) -> nn.Module:
    return SlowOnRankOne(classes)


class FewImages(nn.Module):
    """Takes the images of a small shard, but not many."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(784, classes)

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 4:
            raise ValueError(f"{len(images)} images are too many")
        return self.layer(images.flatten(1))


def few_images(classes: int) -> nn.Module:
    return FewImages(classes)
