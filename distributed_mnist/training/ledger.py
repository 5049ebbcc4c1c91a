"""What was trained on and how it went, recorded step by step without waiting for the device.

Each rank writes down the sample ids, losses and hits of its own shards; at a sync point the ranks add
their ledgers up. In every place at most one rank wrote something other than zero, so the sums are exact
and the same for every number of processes. A sample that two ranks trained on, or none, changes the
digest.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.digest import chain
from ..distributed.world import World
from .batches import Batch


@dataclass(frozen=True)
class IntervalRecord:
    """The steps since the last sync point, complete."""

    first_step: int
    losses: list[float]
    """Mean loss of each step, over its global batch."""
    loss_sum: float
    """Over all samples of these steps."""
    correct: int
    images: int

    def first_bad_step(self) -> int | None:
        """The first step whose loss is not finite."""
        bad = np.flatnonzero(~np.isfinite(self.losses))
        return self.first_step + int(bad[0]) if len(bad) else None


class Ledger:
    """Room for `capacity` steps of a global batch of `batch_size` samples."""

    def __init__(self, capacity: int, batch_size: int, device: torch.device) -> None:
        self._ids = np.zeros((capacity, batch_size), dtype=np.int64)  # id + 1; 0 is "not mine"
        self._losses = torch.zeros((capacity, batch_size), device=device)
        self._hits = torch.zeros((capacity, batch_size), dtype=torch.bool, device=device)
        self._sizes: list[int] = []
        self._first_step = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def open(self, step: int, size: int) -> None:
        """Begin step `step`, whose global batch has `size` samples."""
        if not self._sizes:
            self._first_step = step
        self._sizes.append(size)

    def record(self, batch: Batch, losses: Tensor, logits: Tensor) -> None:
        """Some samples of the open step: their losses `(m,)` and logits `(m, classes)`."""
        row, places = len(self._sizes) - 1, slice(batch.start, batch.start + len(batch.ids))
        self._ids[row, places] += batch.ids + 1
        self._losses[row, places] = losses
        torch.eq(logits.argmax(1), batch.labels, out=self._hits[row, places])

    def close(self, world: World, samples_sha256: str) -> tuple[IntervalRecord, str]:
        """Add all ranks' ledgers up, clear this one; the page and the digest of the ids so far."""
        steps, sizes = len(self._sizes), self._sizes
        if world.size > 1:
            ids = (
                world.all_reduce_sum_(torch.from_numpy(self._ids[:steps].copy()).to(world.device))
                .cpu()
                .numpy()
            )
        else:
            ids = self._ids[:steps]
        for size, row in zip(sizes, ids, strict=True):
            samples_sha256 = chain(samples_sha256, row[:size] - 1)
        losses = world.all_reduce_sum_(self._losses[:steps].clone()).cpu().numpy().astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinities of both signs: not finite either way
            totals = losses.sum(1)  # places beyond a short batch hold zero
            loss_sum = float(totals.sum())
        correct = int(world.all_reduce_sum_(self._hits[:steps].sum()))
        page = IntervalRecord(self._first_step, (totals / sizes).tolist(), loss_sum, correct, sum(sizes))
        self._ids[:steps] = 0
        self._losses.zero_()
        self._hits.zero_()
        self._sizes = []
        return page, samples_sha256
