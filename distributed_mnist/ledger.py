"""What was trained on and how it went, recorded step by step without waiting for the device.

Each rank writes down the sample ids, losses and hits of its own shards; at a sync point the ranks add
their ledgers up. In every place at most one rank wrote something other than zero, so the sums are exact
and the same for every number of processes. A sample that two ranks trained on, or none, changes the
digest.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batches import Batch
from .digest import chain
from .world import World


@dataclass(frozen=True)
class Page:
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
        return next((self.first_step + i for i, x in enumerate(self.losses) if not math.isfinite(x)), None)


class Ledger:
    """Room for `capacity` steps of a global batch of `batch_size` samples in `shards` shards."""

    def __init__(self, capacity: int, batch_size: int, shards: int, device: torch.device) -> None:
        self._ids = np.zeros((capacity, batch_size), dtype=np.int64)  # id + 1; 0 is "not mine"
        self._losses = torch.zeros((capacity, shards), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._sizes: list[int] = []
        self._first_step = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def open(self, step: int, size: int) -> None:
        """Begin step `step`, whose global batch has `size` samples."""
        if not self._sizes:
            self._first_step = step
        self._sizes.append(size)

    def record(self, batch: Batch, shard: int, loss_sum: Tensor, logits: Tensor) -> None:
        """Some shards of the open step: their first one, the sum of their losses, their logits."""
        row = len(self._sizes) - 1
        self._ids[row, batch.start : batch.start + len(batch.ids)] += batch.ids + 1
        self._losses[row, shard] = loss_sum
        self._correct += (logits.argmax(1) == batch.labels).sum()

    def close(self, world: World, samples_sha256: str) -> tuple[Page, str]:
        """Add all ranks' ledgers up, clear this one; the page and the digest of the ids so far."""
        steps, sizes = len(self._sizes), self._sizes
        if world.size > 1:
            ids = world.sum_(torch.from_numpy(self._ids[:steps].copy()).to(world.device)).cpu().numpy()
        else:
            ids = self._ids[:steps]
        for size, row in zip(sizes, ids, strict=True):
            samples_sha256 = chain(samples_sha256, row[:size] - 1)
        sums = world.sum_(self._losses[:steps].clone()).tolist()
        totals = [_exact_sum(row) for row in sums]
        losses = [total / size for total, size in zip(totals, sizes, strict=True)]
        correct = int(world.sum_(self._correct.clone()))
        page = Page(self._first_step, losses, _exact_sum(totals), correct, sum(sizes))
        self._ids[:steps] = 0
        self._losses.zero_()
        self._correct.zero_()
        self._sizes = []
        return page, samples_sha256


def _exact_sum(values: list[float]) -> float:
    """The sum rounded once; NaN where `math.fsum` refuses (infinities of both signs)."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
