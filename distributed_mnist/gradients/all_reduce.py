"""The gradient of a global batch, added up over shards and ranks: in one fixed tree, or by DDP.

`TreeGradients` always adds the `V` shards' gradients in the same binary tree, whoever computed them; its
result has the same bits for every number of processes. `DdpGradients` leaves the order to
DistributedDataParallel and its all-reduce; its result is equal to rounding.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed.world import World
from .per_shard import Layers, Places, by_chain_rule
from .subtree_exchange import SubtreeExchange
from .tree_sum import BinaryCounter, owned_shards

PassOf = Callable[[nn.Module, range], tuple[Tensor, Tensor]]
"""`pass_of(module, shards)`: the logits of these contiguous shards, which hold some samples, through
`module`, and the gradient by them of the loss: summed over the samples and divided by the global batch."""


class Gradients(Protocol):
    """Leaves the gradient of a whole global batch in every parameter's `grad`, on every rank."""

    def compute(self, pass_of: PassOf, sizes: Sequence[int]) -> None:
        """One step's gradient, of a global batch of shards of these sizes. Every rank calls it."""
        ...


class TreeGradients:
    """The same bits for every number of processes from 1 to the number of shards.

    Each shard has a gradient of its own. A rank adds the complete subtrees among its shards, the
    ranks exchange the roots of those, and every rank finishes the same tree.

    `layers` take the gradients of a model that they understand, autograd those of any other. With them,
    consecutive shards whose sizes are in `together` go through the model in one pass: it is known that each
    one's gradient then has the bits that it has alone.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        shards: int,
        layers: Layers | None = None,
        together: Collection[Sequence[int]] = (),
    ) -> None:
        self._model, self._world, self._layers = model, world, layers
        self._together = {tuple(sizes) for sizes in together}
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._owned = owned_shards(world.rank, world.size, shards)
        self._gradient = torch.zeros(sum(p.numel() for p in self._parameters), device=world.device)
        self._rows = torch.zeros((len(self._owned), len(self._gradient)), device=world.device)
        self._places: dict[range, Places] = {}
        self._finish = SubtreeExchange(world, shards, len(self._gradient))
        for p, view in zip(self._parameters, self._views(self._gradient), strict=True):
            p.grad = view

    def compute(self, pass_of: PassOf, sizes: Sequence[int]) -> None:
        """One step's gradient; see the class."""
        counter = BinaryCounter()
        for shard, gradient in enumerate(self._of_shards(pass_of, sizes), start=self._owned.start):
            counter.push(0, shard, gradient)
        self._gradient.copy_(self._finish.total(counter))

    def _of_shards(self, pass_of: PassOf, sizes: Sequence[int]) -> Iterator[Tensor]:
        """The flat gradient of each of this rank's shards."""
        start = self._owned.start
        while start < self._owned.stop:
            run = self._longest_run(sizes, start)
            start = run.stop
            rows = self._rows[run.start - self._owned.start : run.stop - self._owned.start]
            if sum(sizes[run.start : run.stop]) == 0:  # a batch with fewer samples than shards
                rows.zero_()
            elif self._layers is None:
                logits, outer = pass_of(self._model, run)
                rows.zero_()  # where a parameter is not used
                found = by_chain_rule(logits, self._parameters, outer)
                used = [(v, g) for v, g in zip(self._views(rows[0]), found, strict=True) if g is not None]
                torch._foreach_copy_([v for v, _ in used], [g for _, g in used])
            else:
                if run not in self._places:
                    self._places[run] = self._layers.places(rows)
                with self._layers.watched():
                    logits, outer = pass_of(self._model, run)
                self._layers.gradients(logits, outer, sizes[run.start : run.stop], self._places[run])
            yield from rows.unbind()

    def _longest_run(self, sizes: Sequence[int], start: int) -> range:
        """The shards from `start` on that go through the model together."""
        stops = range(self._owned.stop, start + 1, -1)
        found = (stop for stop in stops if tuple(sizes[start:stop]) in self._together)
        return range(start, next(found, start + 1))

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of a flat vector that belong to each parameter, laid out in memory as it is."""
        views, offset = [], 0
        for p in self._parameters:
            views.append(flat.as_strided(p.shape, p.stride(), flat.storage_offset() + offset))
            offset += p.numel()
        return views


class DdpGradients:
    """DistributedDataParallel's sum: the field's standard way, equal to rounding.

    A rank's shards go through the model together, in as few passes as `micro_batch` (images at a time)
    allows; gradients of all but the last pass are only accumulated. A model that draws random numbers
    gets one shard a pass, so that its dropout masks do not depend on the number of processes.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        shards: int,
        *,
        shard_size: int,
        one_by_one: bool,
        micro_batch: int | None,
    ) -> None:
        self._world = world
        self._module: nn.Module = model
        if world.size > 1:
            world.join_process_group()
            device_ids = None if world.device.type == "cpu" else [world.device]
            with world.communicating("a first gradient sum"):
                self._module = DistributedDataParallel(
                    model, device_ids=device_ids, gradient_as_bucket_view=True
                )
            if world.device.type == "cpu":
                # gloo's thread would wait for a core, see `mesh`. Without annotations: torch wants its own.
                self._module.register_comm_hook(None, lambda _, bucket: _mean_over(world, bucket))
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        owned = owned_shards(world.rank, world.size, shards)
        at_once = 1 if one_by_one else micro_batch // shard_size if micro_batch else len(owned)
        self._passes = [owned[i : i + at_once] for i in range(0, len(owned), at_once)]

    def compute(self, pass_of: PassOf, sizes: Sequence[int]) -> None:
        """One step's gradient; see the class."""
        for p in self._parameters:
            p.grad = None
        for shards in self._passes[:-1]:
            with nullcontext() if self._world.size == 1 else self._module.no_sync():  # type: ignore[operator]
                self._pass(pass_of, shards, sizes).backward()
        last = self._pass(pass_of, self._passes[-1], sizes)
        with self._world.communicating("a gradient sum", only=False):
            last.backward()

    def _pass(self, pass_of: PassOf, shards: range, sizes: Sequence[int]) -> Tensor:
        """A number whose gradient is the loss's: see `by_chain_rule`."""
        if sum(sizes[shards.start : shards.stop]) == 0:
            return self._nothing()
        logits, outer = pass_of(self._module, shards)
        # DDP divides by the number of processes; ours is already a share of the global gradient.
        return (logits * (outer * self._world.size if self._world.size > 1 else outer)).sum()

    def _nothing(self) -> Tensor:
        """Of a pass without effect that depends on every parameter: DDP waits for all their gradients."""
        return self._module(torch.zeros((1, 1, 28, 28), device=self._world.device)).sum() * 0


def _mean_over(world: World, bucket: Any) -> torch.futures.Future[Tensor]:
    """What DDP's all-reduce does: the mean of the ranks' gradients. `bucket` is torch's `GradBucket`."""
    mean: torch.futures.Future[Tensor] = torch.futures.Future()
    mean.set_result(world.all_reduce_sum_(bucket.buffer().div_(world.size)))
    return mean
