"""Sum the gradient of a global batch over shards and ranks: in one fixed tree, or with DDP.

`TreeGradients` always adds the gradients of the `V` shards in the same binary tree, regardless of the ranks
that computed them. Its result has the same bits for every number of processes. `DdpGradients` leaves the
order of additions to DistributedDataParallel and its all-reduce. Its result is equal up to rounding.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed.world import World
from .per_shard import GradientViews, HookedLayers, backpropagate
from .subtree_exchange import SubtreeExchange
from .tree_sum import BinaryCounter, owned_shards

ForwardShards = Callable[[nn.Module, range], tuple[Tensor, Tensor]]
"""`forward_shards(module, shards)` runs contiguous shards with at least one sample through `module`.

Returns the logits, and the gradient of the loss with respect to them. The loss is summed over the samples
and divided by the size of the global batch."""


class Gradients(Protocol):
    """Computes the gradient of a whole global batch into every parameter's `grad`, on every rank."""

    def compute(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compute the gradient of one step; `sizes` are the shards' sizes. Every rank must call it."""
        ...


class TreeGradients:
    """Sums gradients with the same bits for every number of processes from 1 to the number of shards.

    Each shard has its own gradient. A rank adds the complete subtrees among its shards, the ranks exchange
    the roots of these subtrees, and every rank finishes the same tree.

    If the model is supported, `layers` compute its gradients. Without `layers`, autograd does, with one
    shard per pass. With `layers`, consecutive shards whose sizes are in `invariant_sizes` go through the
    model in one pass. Each shard's gradient then has the same bits as in a pass of its own (see
    `batch_invariance`).
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        shards: int,
        layers: HookedLayers | None = None,
        invariant_sizes: Collection[Sequence[int]] = (),
    ) -> None:
        self._model, self._world, self._layers = model, world, layers
        self._invariant_sizes = {tuple(sizes) for sizes in invariant_sizes}
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._owned = owned_shards(world.rank, world.size, shards)
        self._gradient = torch.zeros(sum(p.numel() for p in self._parameters), device=world.device)
        self._rows = torch.zeros((len(self._owned), len(self._gradient)), device=world.device)
        self._layer_views: dict[range, list[GradientViews]] = {}
        self._exchange = SubtreeExchange(world, shards, len(self._gradient))
        for p, view in zip(self._parameters, self._parameter_views(self._gradient), strict=True):
            p.grad = view

    def compute(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compute the gradient of one step; see `Gradients`."""
        counter = BinaryCounter()
        gradients = self._shard_gradients(forward_shards, sizes)
        for shard, gradient in enumerate(gradients, start=self._owned.start):
            counter.push(0, shard, gradient)
        self._gradient.copy_(self._exchange.all_reduce(counter))

    def _shard_gradients(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> Iterator[Tensor]:
        """Yield the flat gradient of each of this rank's shards, in order."""
        start = self._owned.start
        while start < self._owned.stop:
            shards = self._shards_of_next_pass(sizes, start)
            start = shards.stop
            rows = self._rows[shards.start - self._owned.start : shards.stop - self._owned.start]
            own_sizes = sizes[shards.start : shards.stop]
            if sum(own_sizes) == 0:  # a batch with fewer samples than shards
                rows.zero_()
            elif self._layers is None:
                logits, grad_logits = forward_shards(self._model, shards)
                rows.zero_()  # for parameters that are not used
                gradients = backpropagate(logits, self._parameters, grad_logits)
                views = self._parameter_views(rows[0])
                used = [(v, g) for v, g in zip(views, gradients, strict=True) if g is not None]
                torch._foreach_copy_([v for v, _ in used], [g for _, g in used])
            else:
                if shards not in self._layer_views:
                    self._layer_views[shards] = self._layers.views(rows)
                with self._layers.recording():
                    logits, grad_logits = forward_shards(self._model, shards)
                self._layers.write_gradients(logits, grad_logits, own_sizes, self._layer_views[shards])
            yield from rows.unbind()

    def _shards_of_next_pass(self, sizes: Sequence[int], start: int) -> range:
        """Return the longest run of shards from `start` that can go through the model in one pass."""
        stops = range(self._owned.stop, start + 1, -1)
        invariant = (stop for stop in stops if tuple(sizes[start:stop]) in self._invariant_sizes)
        return range(start, next(invariant, start + 1))

    def _parameter_views(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat vector into one view per parameter, with the parameter's shape and memory layout."""
        views, offset = [], 0
        for p in self._parameters:
            views.append(flat.as_strided(p.shape, p.stride(), flat.storage_offset() + offset))
            offset += p.numel()
        return views


class DdpGradients:
    """Sums gradients with DistributedDataParallel, the standard way. Results are equal up to rounding.

    A rank's shards go through the model together, up to `per_pass` of them in one pass. All passes but the
    last only accumulate gradients.
    """

    def __init__(self, model: nn.Module, world: World, shards: int, per_pass: int) -> None:
        self._world = world
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

    def _surrogate_loss(self, forward_shards: ForwardShards, shards: range, sizes: Sequence[int]) -> Tensor:
        """Return a scalar whose gradient is that of the loss; see `backpropagate`."""
        if sum(sizes[shards.start : shards.stop]) == 0:
            return self._zero_loss()
        logits, grad_logits = forward_shards(self._module, shards)
        # DDP divides by the number of processes; ours is already a share of the global gradient.
        return (logits * (grad_logits * self._world.size if self._world.size > 1 else grad_logits)).sum()

    def _zero_loss(self) -> Tensor:
        """Return a zero that depends on every parameter: DDP waits for the gradients of all of them."""
        return self._module(torch.zeros((1, 1, 28, 28), device=self._world.device)).sum() * 0


def _mean_over(world: World, bucket: Any) -> torch.futures.Future[Tensor]:
    """Average gradients over the ranks, as DDP's all-reduce does. `bucket` is torch's `GradBucket`."""
    mean: torch.futures.Future[Tensor] = torch.futures.Future()
    mean.set_result(world.all_reduce_sum_(bucket.buffer().div_(world.size)))
    return mean
