"""Choose the samples of each step and return them as tensors: `(step, shards) -> tensors`, pure.

With `N` samples and a global batch of `B`, an epoch has `S = ceil(N / B)` steps and its last batch is
short. Step `t` is batch `b = t % S` of epoch `t // S` and takes samples `order(epoch)[b*B : (b+1)*B]`,
where `order` is a permutation keyed by (seed, epoch). The `n` samples of a batch are cut into `V`
contiguous shards at `i*n // V`. No sample is padded, dropped or repeated. The only state of the data
loader is the integer `t`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.random_keys import permutation
from ..config import Recipe
from ..data.split import Split, as_stored, channels_first, normalise
from ..exact.resampling import resample
from ..gradients.tree_sum import shard_sizes
from .augment import apply_transforms, draw_transforms


@dataclass(frozen=True)
class Batch:
    """Contiguous shards of a global batch: `m` samples, at positions `start .. start + m - 1` in it."""

    images: Tensor
    """float32 `(m, channels, h, w)`, normalised."""
    labels: Tensor
    """int64 `(m,)`."""
    ids: NDArray[np.int64]
    """Indices of the samples in the training set, `(m,)`."""
    start: int


class Batches:
    """The training set, in the order that a recipe's seed determines.

    Keeps the order of the current epoch, and on the device the current step's indices and transforms. These
    stay at one place in memory, where a captured step reads them.
    """

    def __init__(self, split: Split, recipe: Recipe, mean: float, std: float) -> None:
        self._split, self._recipe = split, recipe
        self._labels = split.labels.long()
        self._mean, self._std = mean, std
        self._by_sample = recipe.precision == "exact"  # the batch may be cut anywhere: a sample is a shard
        self._samples = len(split)
        self.steps_per_epoch = -(-self._samples // recipe.batch_size)
        self.total_steps = recipe.total_steps(self.steps_per_epoch)
        self._epoch = -1
        self._order = self._ids = np.empty(0, dtype=np.int64)
        self._step = -1
        device, size = split.images.device, min(recipe.batch_size, len(split))
        self._indices = torch.zeros(size, dtype=torch.int64, device=device)
        self._transforms = None
        if recipe.distorts():
            self._transforms = torch.zeros((size, 2, 3), device=device)

    def size(self, step: int) -> int:
        """Return the number of samples in global batch `step`."""
        first = step % self.steps_per_epoch * self._recipe.batch_size
        return min(self._recipe.batch_size, self._samples - first)

    def images_before(self, step: int) -> int:
        """Return the number of samples in all global batches before `step`."""
        epochs, batch = divmod(step, self.steps_per_epoch)
        return epochs * len(self._split) + min(batch * self._recipe.batch_size, len(self._split))

    def span(self, step: int, shards: range) -> tuple[int, int]:
        """Return the positions of contiguous shards in global batch `step`, as (start, stop)."""
        if self._by_sample:
            return shards.start, shards.stop
        count, total_shards = self.size(step), self._recipe.shards
        return shards.start * count // total_shards, shards.stop * count // total_shards

    def shard_sizes(self, step: int) -> list[int]:
        """Return the number of samples in each shard of global batch `step`."""
        size = self.size(step)
        return [1] * size if self._by_sample else shard_sizes(size, self._recipe.shards)

    def smallest_size(self) -> int:
        """Return the number of samples in the run's smallest global batch."""
        return self.size(min(self.steps_per_epoch, self.total_steps) - 1)

    def take(self, step: int, shards: range) -> Batch:
        """Return the samples of contiguous shards of global batch `step`, in fresh tensors.

        They are copies, not views of a larger tensor. The start address of a tensor can change which kernel
        runs on it, and so the last bits.
        """
        self.load(step)
        start, stop = self.span(step, shards)
        indices = self._indices[start:stop]
        images = self._split.images.index_select(0, indices)
        labels = self._labels.index_select(0, indices)
        if self._transforms is not None:
            transforms = self._transforms[start:stop].clone()
            distort = resample if self._recipe.precision == "exact" else apply_transforms
            images = as_stored(distort(channels_first(images).float(), transforms))
        images = normalise(images, self._mean, self._std)
        return Batch(images, labels, self._ids[start:stop], start)

    def ids(self, step: int, shards: range) -> tuple[NDArray[np.int64], int]:
        """Return what a batch of `take` has as `ids` and `start`."""
        self.load(step)
        start, stop = self.span(step, shards)
        return self._ids[start:stop], start

    def load(self, step: int) -> None:
        """Copy to the device what decides the samples of a step, unless that is done."""
        if step == self._step:
            return
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = permutation(len(self._split), "order", self._recipe.seed, epoch)
            self._epoch = epoch
        first, size = batch * self._recipe.batch_size, self.size(step)
        self._ids = self._order[first : first + size]
        copy_to_device_(self._indices[:size], torch.from_numpy(self._ids))
        transforms = draw_transforms(self._recipe, step, size, self._split.image_shape)
        if transforms is not None and self._transforms is not None:
            copy_to_device_(self._transforms[:size], torch.from_numpy(transforms))
        self._step = step


def copy_to_device_(target: Tensor, source: Tensor) -> None:
    """Copy a tensor on the CPU into one on any device. It does not wait for a CUDA device."""
    on_cuda = target.device.type == "cuda"
    if on_cuda:
        source = source.pin_memory()  # the copy of other memory would wait
    # MPS would read the source later, when its memory may have another use (pytorch/pytorch#139550).
    target.copy_(source, non_blocking=on_cuda)
