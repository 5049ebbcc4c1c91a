"""What the training loop needs of a way to add gradients: `--sync tree`, `--sync ddp`, `--precision
exact`."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from .shard_gradients import ForwardShards


class Gradients(Protocol):
    """Computes the gradient of a whole global batch into every parameter's `grad`, on every rank.

    A step calls `compute_part`, `exchange` and `set_gradients`, on every rank. Only `exchange`
    communicates, and the other two use nothing but the device, so they can be captured as graphs. (DDP
    communicates in `compute_part`, and cannot be captured then.)
    """

    def part(self, sizes: Sequence[int]) -> range:
        """Return this rank's shards of a batch whose shards have these sizes."""
        ...

    def compute_part(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compute the gradients of this rank's shards. `sizes` are the sizes of all shards."""
        ...

    def exchange(self) -> None:
        """Add the parts of all ranks."""
        ...

    def set_gradients(self) -> None:
        """Set every parameter's `grad` from the sum, and change running statistics."""
        ...

    def can_be_captured(self) -> bool:
        """Return whether the next step needs no look at the device's memory to decide what to compute."""
        ...

    def recompute_statistics(self, batches: Iterable[tuple[ForwardShards, Sequence[int]]]) -> None:
        """Replace batch norms' running statistics by those of the present weights over these batches.

        Does nothing for a model without running statistics. Every rank must call it.
        """
        ...

    def prepare(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Choose how to compute, by a trial on the run's first batch. Every rank must call it."""
        ...

    def check(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Raise an error if a rank computes wrong gradients. Every rank must call it."""
        ...


def compute_gradients(gradients: Gradients, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
    """Compute the gradient of one step, in the three parts of `Gradients`. Every rank must call it."""
    gradients.compute_part(forward_shards, sizes)
    gradients.exchange()
    gradients.set_gradients()
