"""Sum the gradient of a global batch over shards and ranks: in one fixed tree, or with DDP.

`TreeGradients` always adds the gradients of the `V` shards in the same binary tree, regardless of the ranks
that computed them. Its result has the same bits for every number of processes. `DdpGradients` leaves the
order of additions to DistributedDataParallel and its all-reduce. Its result is equal up to rounding.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..common.generators import same_torch_state
from ..config import ImageShape
from ..distributed.world import World
from .cross_check import CrossCheck, all_true
from .per_shard import GradientViews, HookedLayers
from .shard_gradients import ForwardShards, ShardGradients
from .subtree_exchange import SubtreeExchange
from .tree_sum import BinaryCounter, owned_shards


class Gradients(Protocol):
    """Computes the gradient of a whole global batch into every parameter's `grad`, on every rank."""

    def compute(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compute the gradient of one step, and change running statistics; `sizes` are the shards' sizes.

        Every rank must call it.
        """
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


class TreeGradients:
    """Sums gradients with the same bits for every number of processes from 1 to the number of shards.

    Each shard has its own gradient. A rank adds the complete subtrees among its shards, the ranks exchange
    the roots of these subtrees, and every rank finishes the same tree.

    If the model is supported, `layers` compute its gradients. Without `layers`, autograd does, with one
    shard per pass. With `layers`, consecutive shards whose sizes are in `invariant_sizes` go through the
    model in one pass. Each shard's gradient then has the same bits as in a pass of its own (see
    `batch_invariance`). For the other arguments see `CrossCheck`.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        shards: int,
        layers: HookedLayers | None = None,
        invariant_sizes: Collection[Sequence[int]] = (),
        *,
        untouched: nn.Module | None = None,
        name: str = "",
        tolerance: float = 1e-3,
    ) -> None:
        self._world, self._local = world, ShardGradients(model, layers)
        self._cross_check = CrossCheck(world, shards, self._local, untouched, name, tolerance)
        self._invariant_sizes = {tuple(sizes) for sizes in invariant_sizes}
        self._owned = owned_shards(world.rank, world.size, shards)
        self._gradient = torch.zeros(self._local.length, device=world.device)
        self._rows = torch.zeros((len(self._owned), self._local.length), device=world.device)
        self._layer_views: dict[range, list[GradientViews]] = {}
        self._exchange = SubtreeExchange(world, shards, self._local.length)
        views = self._local.parameter_views(self._gradient)
        for p, view in zip(self._local.parameters, views, strict=True):
            p.grad = view

    def compute(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compute the gradient of one step; see `Gradients`."""
        counter = BinaryCounter()
        gradients = self._shard_gradients(forward_shards, sizes)
        for shard, gradient in enumerate(gradients, start=self._owned.start):
            counter.push(0, shard, gradient)
        self._gradient.copy_(self._exchange.all_reduce(counter))
        self._local.statistics.add(self._gradient[self._local.gradients_length :])

    @torch.no_grad()
    def recompute_statistics(self, batches: Iterable[tuple[ForwardShards, Sequence[int]]]) -> None:
        """Replace the batch norms' running statistics; see `Gradients`. Their gradients become zero."""
        if self._local.statistics.length:
            with self._local.statistics.recomputed():
                for forward_shards, sizes in batches:
                    self.compute(forward_shards, sizes)

    def _shard_gradients(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> Iterator[Tensor]:
        """Yield the flat gradient of each of this rank's shards, in order."""
        start = self._owned.start
        while start < self._owned.stop:
            shards = self._shards_of_next_pass(sizes, start)
            rows = self._gradients_of_pass(forward_shards, sizes, shards)
            if rows is not None:
                yield from rows.unbind()
                start = shards.stop

    def _gradients_of_pass(
        self, forward_shards: ForwardShards, sizes: Sequence[int], shards: range
    ) -> Tensor | None:
        """Return the gradients of shards that share a pass, one row each. They are overwritten later.

        Returns None if they cannot share one. From then on each shard has a pass of its own.
        """
        rows = self._rows[shards.start - self._owned.start : shards.stop - self._owned.start]
        if self._local.layers and shards not in self._layer_views:
            self._layer_views[shards] = self._local.layers.views(rows)
        views = self._layer_views.get(shards)
        if self._local.write(forward_shards, shards, sizes, rows, views):
            return rows
        self._invariant_sizes.clear()
        return None

    def prepare(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Try the layers' gradients on the run's first batch with its initial weights; see `Gradients`.

        A trial on noise is not enough, because what a model does may depend on its images. If the gradient
        of some shard is not autograd's, autograd computes them all, on every rank.
        """
        initial, close = self._cross_check.initial(), True
        if self._local.layers is not None and initial is not None:
            with same_torch_state(self._world.device):
                close = self._layers_are_right(initial, forward_shards, sizes)
        if not all_true(self._world, close):
            self._local.layers = None
            self._invariant_sizes.clear()

    def _layers_are_right(
        self, initial: ShardGradients, forward_shards: ForwardShards, sizes: Sequence[int]
    ) -> bool:
        """Compare the gradients of this rank's shards with autograd's.

        Shards that share a pass are compared with the same ones alone. If they differ, each shard has a
        pass of its own from now on.
        """
        by_layers = {shard: initial.of_shard(forward_shards, shard, sizes) for shard in self._owned}
        for shards in self._passes(sizes):
            rows = torch.empty((len(shards), initial.length), device=self._world.device)
            alone = torch.stack([by_layers[shard] for shard in shards])
            written = initial.write(forward_shards, shards, sizes, rows)
            if not (written and torch.equal(rows, alone)):
                self._invariant_sizes.clear()
        autograd = ShardGradients(initial.model)
        return all(
            self._cross_check.is_close(row, autograd.of_shard(forward_shards, shard, sizes))
            for shard, row in by_layers.items()
        )

    def check(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compare gradients with other ranks and with autograd; see `CrossCheck.check`."""

        def usual(shard: int) -> Tensor:
            for shards in self._passes(sizes):
                if shard in shards:
                    rows = self._gradients_of_pass(forward_shards, sizes, shards)
                    if rows is not None:
                        return rows[shard - shards.start]
            return self._local.of_shard(forward_shards, shard, sizes)

        self._cross_check.check(usual, forward_shards, sizes)

    def _passes(self, sizes: Sequence[int]) -> list[range]:
        passes: list[range] = []
        while (start := passes[-1].stop if passes else self._owned.start) < self._owned.stop:
            passes.append(self._shards_of_next_pass(sizes, start))
        return passes

    def _shards_of_next_pass(self, sizes: Sequence[int], start: int) -> range:
        """Return the longest run of shards from `start` that can go through the model in one pass."""
        stops = range(self._owned.stop, start + 1, -1)
        invariant = (stop for stop in stops if tuple(sizes[start:stop]) in self._invariant_sizes)
        return range(start, next(invariant, start + 1))


class DdpGradients:
    """Sums gradients with DistributedDataParallel, the standard way. Results are equal up to rounding.

    A rank's shards go through the model together, up to `per_pass` of them in one pass. All passes but the
    last only accumulate gradients. For `name` and `tolerance` see `CrossCheck`.
    """

    def __init__(
        self, model: nn.Module, world: World, shards: int, per_pass: int, image_shape: ImageShape,
        *, name: str = "", tolerance: float = 1e-3,
    ) -> None:  # fmt: skip
        self._cross_check = CrossCheck(world, shards, ShardGradients(model), None, name, tolerance)
        self._world, self._image_shape = world, image_shape
        self._module: nn.Module = model
        if world.size > 1:
            world.join_process_group()
            device_ids = None if world.device.type == "cpu" else [world.device]
            # It imports torch's compiler, which takes seconds and is not a hang.
            with world.status.during("setting up DDP", 120.0), world.communicating("a first gradient sum"):
                self._module = DistributedDataParallel(
                    model, device_ids=device_ids, gradient_as_bucket_view=True
                )
            if world.device.type == "cpu":
                # gloo's thread would compete for a core, see `socket_collectives`. A lambda, because torch
                # accepts only its own type annotations on a hook.
                self._module.register_comm_hook(None, lambda _, bucket: _mean_over(world, bucket))
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        owned = owned_shards(world.rank, world.size, shards)
        self._passes = [owned[i : i + per_pass] for i in range(0, len(owned), per_pass)]

    def compute(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compute the gradient of one step; see `Gradients`."""
        for p in self._parameters:
            p.grad = None
        for shards in self._passes[:-1]:
            with nullcontext() if self._world.size == 1 else self._module.no_sync():  # type: ignore[operator]
                self._surrogate_loss(forward_shards, shards, sizes).backward()
        last = self._surrogate_loss(forward_shards, self._passes[-1], sizes)
        with self._world.communicating("a gradient sum", also_computes=True):
            last.backward()

    def recompute_statistics(self, batches: Iterable[tuple[ForwardShards, Sequence[int]]]) -> None:
        """Do nothing: models with running statistics are refused."""

    def prepare(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Do nothing: autograd computes these gradients."""

    def check(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compare gradients with other ranks, up to rounding; see `CrossCheck.check_closely`."""
        self._cross_check.check_closely(forward_shards, sizes)

    def _surrogate_loss(self, forward_shards: ForwardShards, shards: range, sizes: Sequence[int]) -> Tensor:
        """Return a scalar whose gradient is that of the loss; see `backpropagate`."""
        if sum(sizes[shards.start : shards.stop]) == 0:
            return self._zero_loss()
        logits, grad_logits = forward_shards(self._module, shards)
        # DDP divides by the number of processes; ours is already a share of the global gradient.
        return (logits * (grad_logits * self._world.size if self._world.size > 1 else grad_logits)).sum()

    def _zero_loss(self) -> Tensor:
        """Return a zero that depends on every parameter: DDP waits for the gradients of all of them."""
        return self._module(torch.zeros((1, *self._image_shape), device=self._world.device)).sum() * 0


def _mean_over(world: World, bucket: Any) -> torch.futures.Future[Tensor]:
    """Average gradients over the ranks, as DDP's all-reduce does. `bucket` is torch's `GradBucket`."""
    mean: torch.futures.Future[Tensor] = torch.futures.Future()
    mean.set_result(world.all_reduce_sum_(bucket.buffer().div_(world.size)))
    return mean
