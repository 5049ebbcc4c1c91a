"""Record each step's samples, losses and correct predictions without waiting for the device.

Each rank records the sample ids, losses and correct predictions of its own shards. At a sync point the
ranks add their ledgers. Each position is nonzero on at most one rank, so the sums are exact and the same
for every number of processes. If two ranks trained on the same sample, or no rank did, the digest changes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.digest import chain
from ..distributed.world import World
from .batches import Batch


@dataclass(frozen=True)
class IntervalRecord:
    """The record of all ranks for the steps since the last sync point."""

    first_step: int
    losses: list[float]
    """Mean loss of each step, over its global batch."""
    loss_sums: list[float]
    """Sum of the losses of each step's samples, rounded once."""
    correct: int
    images: int

    @property
    def mean_loss(self) -> float:
        """The mean loss of all samples in these steps."""
        return _sum(self.loss_sums) / self.images

    def first_bad_step(self) -> int | None:
        """Return the first step whose loss is not finite, or None."""
        bad = np.flatnonzero(~np.isfinite(self.losses))
        return self.first_step + int(bad[0]) if len(bad) else None


class Ledger:
    """A buffer for the records of up to `capacity` steps of up to `batch_size` samples."""

    def __init__(self, capacity: int, batch_size: int, device: torch.device) -> None:
        # Each is an id plus one; 0 means another rank's sample.
        self._ids = np.zeros((capacity, batch_size), dtype=np.int64)
        self._losses = torch.zeros((capacity, batch_size), device=device)
        self._correct = torch.zeros((capacity, batch_size), dtype=torch.bool, device=device)
        self._sizes: list[int] = []
        self._first_step = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def open(self, step: int, size: int) -> None:
        """Begin the record of a step whose global batch has `size` samples."""
        if not self._sizes:
            self._first_step = step
        self._sizes.append(size)

    def record(self, batch: Batch, losses: Tensor, logits: Tensor) -> None:
        """Record `m` samples of the open step, with their losses `(m,)` and logits `(m, classes)`."""
        row, positions = len(self._sizes) - 1, slice(batch.start, batch.start + len(batch.ids))
        self._ids[row, positions] += batch.ids + 1
        self._losses[row, positions] = losses
        torch.eq(logits.max(1).indices, batch.labels, out=self._correct[row, positions])

    def take_back(self, start: int) -> None:
        """Forget the samples of the open step from position `start` on, because their pass is repeated."""
        self._ids[len(self._sizes) - 1, start:] = 0

    def close(self, world: World, samples_sha256: str) -> tuple[IntervalRecord, str]:
        """Add the ledgers of all ranks and clear this one.

        `samples_sha256` is the digest of all sample ids before this interval. Returns the record and the
        digest of all ids so far. Every rank must call it.
        """
        steps, sizes = len(self._sizes), self._sizes
        ids = self._ids[:steps]
        if world.size > 1:
            ids = world.all_reduce_sum_(torch.from_numpy(ids.copy()).to(world.device)).cpu().numpy()
        for size, row in zip(sizes, ids, strict=True):
            samples_sha256 = chain(samples_sha256, row[:size] - 1)
        losses = world.all_reduce_sum_(self._losses[:steps].clone()).cpu()
        sums = [_sum(row) for row in losses.tolist()]  # positions after a short batch hold zero
        correct = int(world.all_reduce_sum_(self._correct[:steps].sum()))
        means = [total / size for total, size in zip(sums, sizes, strict=True)]
        interval = IntervalRecord(self._first_step, means, sums, correct, sum(sizes))
        self._ids[:steps] = 0
        self._losses.zero_()
        self._correct.zero_()
        self._sizes = []
        return interval, samples_sha256


def _sum(values: Iterable[float]) -> float:
    """Return the sum, rounded once: NumPy's depends on the processor, and `sum` on Python's version."""
    try:
        return math.fsum(values)
    except ValueError:  # both infinities
        return math.nan
