"""The gradient of a global batch, added up over shards and ranks: in one fixed tree, or by DDP.

Floating-point addition is not associative, so a sum has as many answers as there are orders to add in.
`TreeGradients` always adds the `V` shards' gradients in the same binary tree, whoever computed them; its
result has the same bits for every number of processes. `DdpGradients` leaves the order to
DistributedDataParallel and its all-reduce; its result is equal to rounding.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .world import World

LossOf = Callable[[nn.Module, range], Tensor | None]
"""`loss_of(module, shards)`: the loss of these contiguous shards through `module`, summed over their
samples and divided by the global batch; None if they hold no sample."""


class Gradients(Protocol):
    """Leaves the gradient of a whole global batch in every parameter's `grad`, on every rank."""

    def compute(self, loss_of: LossOf) -> None:
        """One step's gradient. Every rank calls it at the same step."""
        ...


def owned_shards(rank: int, size: int, shards: int) -> range:
    """The contiguous shards of a rank: `rank*shards//size` up to the next rank's first."""
    return range(rank * shards // size, (rank + 1) * shards // size)


class BinaryCounter:
    """Adds leaves 0, 1, 2 … up in a fixed binary tree, keeping at most log2 of them at a time.

    Node `(level, index)` is the sum of leaves `index * 2**level` up to, but not including,
    `(index + 1) * 2**level`. Pushing a node merges it with its left sibling if that is on top of the
    stack, as a carry runs through a binary number. Tensors that are pushed become the counter's own.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int, Tensor]] = []

    def push(self, level: int, index: int, value: Tensor) -> None:
        """Add a node; nodes must come from left to right."""
        while index % 2 == 1 and self.nodes and self.nodes[-1][:2] == (level, index - 1):
            value = self.nodes.pop()[2].add_(value)
            level, index = level + 1, index // 2
        self.nodes.append((level, index, value))

    def total(self) -> Tensor:
        """The sum of all leaves: what is left is merged from the right, smallest first."""
        value = self.nodes[-1][2]
        for _, _, left in reversed(self.nodes[:-1]):
            value = left.add_(value)
        return value


def subtree_roots(leaves: range) -> list[tuple[int, int]]:
    """The nodes (level, index) left when `leaves` alone have been added: the complete subtrees in them."""
    counter = BinaryCounter()
    for leaf in leaves:
        counter.push(0, leaf, torch.zeros(()))
    return [(level, index) for level, index, _ in counter.nodes]


class TreeGradients:
    """The same bits for every number of processes from 1 to the number of shards.

    Each shard's gradient is computed by itself. A rank adds the complete subtrees among its shards, the
    ranks exchange the roots of those, and every rank finishes the same tree.
    """

    def __init__(self, model: nn.Module, world: World, shards: int) -> None:
        self._model, self._world = model, world
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._owned = owned_shards(world.rank, world.size, shards)
        self._roots = [subtree_roots(owned_shards(rank, world.size, shards)) for rank in range(world.size)]
        self._most_roots = max(len(roots) for roots in self._roots)
        self._gradient = torch.zeros(sum(p.numel() for p in self._parameters), device=world.device)
        for p, view in zip(self._parameters, self._views(self._gradient), strict=True):
            p.grad = view

    def compute(self, loss_of: LossOf) -> None:
        """One step's gradient; see the class."""
        counter = BinaryCounter()
        for shard in self._owned:
            loss = loss_of(self._model, range(shard, shard + 1))
            counter.push(0, shard, self._flat_gradient(loss))
        if self._world.size == 1:
            self._gradient.copy_(counter.total())
        elif self._world.size == 2:
            self._gradient.copy_(self._finish_here(counter))
        else:
            self._gradient.copy_(self._finish_in_slices(counter))

    def _flat_gradient(self, loss: Tensor | None) -> Tensor:
        if loss is None:  # a batch with fewer samples than shards
            return torch.zeros_like(self._gradient)
        gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        flat = torch.empty_like(self._gradient)
        torch._foreach_copy_(self._views(flat), gradients)
        return flat

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of a flat vector that belong to each parameter, laid out in memory as it is."""
        views, offset = [], 0
        for p in self._parameters:
            views.append(flat.as_strided(p.shape, p.stride(), offset))
            offset += p.numel()
        return views

    def _finish_here(self, counter: BinaryCounter) -> Tensor:
        """Everyone gets every root: one message, which grows with the number of ranks."""
        mine = self._gradient.new_zeros((self._most_roots, len(self._gradient)))
        for row, (_, _, value) in zip(mine, counter.nodes, strict=False):
            row.copy_(value)
        return self._finish(self._world.gather(mine))

    def _finish_in_slices(self, counter: BinaryCounter) -> Tensor:
        """Each rank finishes one slice of the vector for all: two messages, two gradients' worth each."""
        size = self._world.size
        width = -(-len(self._gradient) // size)
        mine = self._gradient.new_zeros((size, self._most_roots, width))
        for i, (_, _, value) in enumerate(counter.nodes):
            for j, piece in enumerate(value.split(width)):
                mine[j, i, : len(piece)] = piece
        finished = self._finish(self._world.exchange(mine))
        return self._world.gather(finished).flatten()[: len(self._gradient)]

    def _finish(self, values: Tensor) -> Tensor:
        """The rest of the tree over all ranks' roots, `(size, most roots, width)` to `(width,)`."""
        counter = BinaryCounter()
        for rank, roots in enumerate(self._roots):
            for i, (level, index) in enumerate(roots):
                counter.push(level, index, values[rank, i])
        return counter.total()


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
            device_ids = None if world.device.type == "cpu" else [world.device]
            with world.speaking("first gradient sum"):
                self._module = DistributedDataParallel(
                    model, device_ids=device_ids, gradient_as_bucket_view=True
                )
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        owned = owned_shards(world.rank, world.size, shards)
        at_once = 1 if one_by_one else micro_batch // shard_size if micro_batch else len(owned)
        self._passes = [owned[i : i + at_once] for i in range(0, len(owned), at_once)]

    def compute(self, loss_of: LossOf) -> None:
        """One step's gradient; see the class."""
        for p in self._parameters:
            p.grad = None
        for shards in self._passes[:-1]:
            with nullcontext() if self._world.size == 1 else self._module.no_sync():  # type: ignore[operator]
                self._loss(loss_of, shards).backward()
        last = self._loss(loss_of, self._passes[-1])
        with self._world.speaking("gradient sum"):
            last.backward()

    def _loss(self, loss_of: LossOf, shards: range) -> Tensor:
        loss = loss_of(self._module, shards)
        # DDP divides by the number of processes; our loss is already a share of the global one.
        return self._nothing() if loss is None else loss * self._world.size

    def _nothing(self) -> Tensor:
        """A loss of zero that depends on every parameter: DDP waits for all of their gradients."""
        images = torch.zeros((1, 1, 28, 28), device=self._world.device)
        return self._module(images).sum() * 0
