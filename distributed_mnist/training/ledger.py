"""Record each step's samples, losses and correct predictions without waiting for the device.

Each rank records the sample ids, losses and correct predictions of its own shards. At a sync point the
ranks add their ledgers. Each position is nonzero on at most one rank, so the sums are exact and the same
for every number of processes. If two ranks trained on the same sample, or no rank did, the digest changes.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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
        self._records = torch.zeros((capacity, 2, batch_size), device=device)
        """Each step's losses, and behind them 1 for correct predictions."""
        self._open = self._records[0]
        self._sizes: list[int] = []
        self._first_step = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def open(self, step: int, size: int) -> None:
        """Begin the record of a step whose global batch has `size` samples."""
        if not self._sizes:
            self._first_step = step
        self._open = self._records[len(self._sizes)]
        self._sizes.append(size)

    def record(self, batch: Batch, losses: Tensor, logits: Tensor) -> None:
        """Record `m` samples of the open step, with their losses `(m,)` and logits `(m, classes)`."""
        self.record_ids(batch.ids, batch.start)
        positions = slice(batch.start, batch.start + len(batch.ids))
        self._open[0, positions] = losses
        torch.eq(logits.max(1).indices, batch.labels, out=self._open[1, positions])

    def record_ids(self, ids: NDArray[np.int64], start: int) -> None:
        """Record the ids of samples, `(m,)`, whose first is at position `start` in the open step."""
        self._ids[len(self._sizes) - 1, start : start + len(ids)] += ids + 1

    def new_records(self) -> Tensor:
        """Return room for the losses and correct predictions of a step, for `records_in`."""
        return torch.zeros_like(self._open)

    @contextlib.contextmanager
    def records_in(self, records: Tensor) -> Iterator[None]:
        """In this context the open step's losses are recorded in `records`, and then copied from there.

        A captured step always records them at one place.
        """
        opened, self._open = self._open, records
        try:
            yield
            opened.copy_(records)
        finally:
            self._open = opened

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
        losses, correct = world.all_reduce_sum_(self._records[:steps].clone()).cpu().unbind(1)
        sums = [_sum(row) for row in losses.tolist()]  # positions after a short batch hold zero
        means = [total / size for total, size in zip(sums, sizes, strict=True)]
        interval = IntervalRecord(self._first_step, means, sums, int(correct.count_nonzero()), sum(sizes))
        self._ids[:steps] = 0
        self._records[:steps] = 0
        self._sizes = []
        return interval, samples_sha256


def _sum(values: Iterable[float]) -> float:
    """Return the sum, rounded once: NumPy's depends on the processor, and `sum` on Python's version."""
    try:
        return math.fsum(values)
    except ValueError:  # both infinities
        return math.nan
