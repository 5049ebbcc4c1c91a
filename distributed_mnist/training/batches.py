"""Which samples a step trains on, and as which tensors: `(step, shards) -> tensors`, pure.

With `N` samples and a global batch of `B`, an epoch has `S = ceil(N / B)` steps and its last batch is
short. Step `t` is batch `b = t % S` of epoch `t // S` and takes samples `order(epoch)[b*B : (b+1)*B]`,
where `order` is a permutation keyed by (seed, epoch). The `n` samples of a batch are cut into `V`
contiguous shards at `i*n // V`. Nothing is padded, dropped or repeated, and the loader's whole state is
the integer `t`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.random_keys import permutation
from ..config import Recipe
from ..data.split import Split, normalise
from .augment import apply_transforms, draw_transforms


@dataclass(frozen=True)
class Batch:
    """Some contiguous shards of one global batch: `m` samples at places `start .. start + m - 1` of it."""

    images: Tensor
    """float32 `(m, 1, 28, 28)`, normalised."""
    labels: Tensor
    """int64 `(m,)`."""
    ids: NDArray[np.int64]
    """Numbers of the samples in the training set, `(m,)`."""
    start: int


def shard_sizes(count: int, shards: int) -> list[int]:
    """How many of `count` samples each shard holds."""
    return [(i + 1) * count // shards - i * count // shards for i in range(shards)]


class Batches:
    """The training set in the order of a recipe. Holds the current epoch's order and nothing else."""

    def __init__(self, split: Split, recipe: Recipe, mean: float, std: float) -> None:
        self._split, self._recipe = split, recipe
        self._mean, self._std = mean, std
        self.steps_per_epoch = -(-len(split) // recipe.batch_size)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        self._order_on_device = torch.empty(0, dtype=torch.int64)
        self._step = -1
        self._transforms: Tensor | None = None

    def size(self, step: int) -> int:
        """The number of samples in global batch `step`."""
        first = step % self.steps_per_epoch * self._recipe.batch_size
        return min(self._recipe.batch_size, len(self._split) - first)

    def images_before(self, step: int) -> int:
        """Samples in all global batches before `step`."""
        epochs, batch = divmod(step, self.steps_per_epoch)
        return epochs * len(self._split) + min(batch * self._recipe.batch_size, len(self._split))

    def span(self, step: int, shards: range) -> tuple[int, int]:
        """First and past-the-last place in global batch `step` of these contiguous shards."""
        count, cuts = self.size(step), self._recipe.shards
        return shards.start * count // cuts, shards.stop * count // cuts

    def shard_sizes(self, step: int) -> list[int]:
        """The number of samples in each shard of global batch `step`."""
        return shard_sizes(self.size(step), self._recipe.shards)

    def take(self, step: int, shards: range) -> Batch:
        """The samples of these contiguous shards, in fresh tensors.

        Fresh, not views of a larger gather: where a tensor starts in memory can change which kernel
        runs on it, and with it the last bits.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        self._prepare(epoch, step)
        start, stop = self.span(step, shards)
        first = batch * self._recipe.batch_size
        rows = slice(first + start, first + stop)
        chosen = self._order_on_device[rows]
        images = self._split.images.index_select(0, chosen)
        labels = self._split.labels.index_select(0, chosen).long()
        if self._transforms is not None:
            transforms = self._transforms[start:stop].clone()
            images = apply_transforms(images.unsqueeze(1).float(), transforms).squeeze(1)
        images = normalise(images, self._mean, self._std)
        return Batch(images, labels, self._order[rows], start)

    def _prepare(self, epoch: int, step: int) -> None:
        device = self._split.images.device
        if epoch != self._epoch:
            self._order = permutation(len(self._split), "order", self._recipe.seed, epoch)
            self._order_on_device = torch.from_numpy(self._order).to(device)
            self._epoch = epoch
        if step != self._step:
            drawn = draw_transforms(self._recipe, step, self.size(step))
            self._transforms = None if drawn is None else torch.from_numpy(drawn).to(device)
            self._step = step
