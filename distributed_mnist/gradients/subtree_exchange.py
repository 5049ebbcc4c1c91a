"""Finish one tree on all ranks: each rank contributes the roots of its own subtrees and gets the sum.

There are three methods:

- *doubling*: in round `k` a rank swaps its node with the rank `2**k` away and adds the two. Each round adds
  one level of the tree.
- *halving*: the same, but a rank adds only the half of each node that it is responsible for. Then the
  finished pieces are sent back along the same path. This takes twice the rounds, but the number of bytes
  does not grow with the number of ranks. (Both: Thakur, Rabenseifner and Gropp, "Optimization of collective
  communication operations in MPICH", 2005.)
- *slices*: each rank gets one slice of every rank's roots and finishes the tree for this slice; then the
  slices are gathered. This works for any number of ranks, even if their subtrees have different sizes.

All methods add in the same tree, so their results have the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.world import World
from .cost_model import LOOPBACK, ExchangeMethod, exchange_seconds
from .tree_sum import BinaryCounter, owned_shards, subtree_roots


def has_equal_subtrees(size: int, shards: int) -> bool:
    """Return whether each rank has one subtree and all have the same size.

    Only then does each higher level of the tree join pairs of ranks, as doubling and halving require.
    """
    return size <= shards and all(number & (number - 1) == 0 for number in (size, shards))  # powers of two


def fastest_method(size: int, shards: int, nbytes: int) -> ExchangeMethod:
    """Return the method that is fastest for this number of ranks, according to the cost model."""
    possible: Sequence[ExchangeMethod] = ("slices",)
    if has_equal_subtrees(size, shards):
        possible = ("doubling", "halving")
    return min(possible, key=lambda method: exchange_seconds(method, size, nbytes, LOOPBACK))


class SubtreeExchange:
    """Sums vectors of `length` numbers over all ranks, by `method` or by the fastest one."""

    def __init__(
        self, world: World, shards: int, length: int, method: ExchangeMethod | None = None
    ) -> None:
        self._world, self._length = world, length
        self._roots = [subtree_roots(owned_shards(rank, world.size, shards)) for rank in range(world.size)]
        method = method or fastest_method(world.size, shards, 4 * length)
        methods = {"doubling": self._doubling, "halving": self._halving, "slices": self._slices}
        self._exchange = methods[method]

    def all_reduce(self, counter: BinaryCounter) -> Tensor:
        """Return the sum of the whole tree, on every rank.

        `counter` holds the roots of this rank's subtrees. Their tensors are overwritten.
        """
        return counter.total() if self._world.size == 1 else self._exchange(counter)

    def _doubling(self, counter: BinaryCounter) -> Tensor:
        (value,) = (value for _, _, value in counter.nodes)
        received = torch.empty_like(value)
        distance = 1
        while distance < self._world.size:
            partner = self._world.rank ^ distance
            self._world.send_recv({partner: value}, {partner: received})
            value += received  # the sum of two numbers is the same in either order
            distance *= 2
        return value

    def _halving(self, counter: BinaryCounter) -> Tensor:
        (value,) = (value for _, _, value in counter.nodes)
        received = torch.empty_like(value)
        rank, size = self._world.rank, self._world.size
        start, stop, distance = 0, self._length, 1
        cuts: list[tuple[int, slice, slice]] = []
        while distance < size:
            partner, middle = rank ^ distance, (start + stop) // 2
            left, right = slice(start, middle), slice(middle, stop)
            mine, other = (right, left) if rank & distance else (left, right)
            self._world.send_recv({partner: value[other]}, {partner: received[mine]})
            value[mine] += received[mine]
            cuts.append((partner, mine, other))
            start, stop, distance = mine.start, mine.stop, distance * 2
        for partner, mine, other in reversed(cuts):
            self._world.send_recv({partner: value[mine]}, {partner: value[other]})
        return value

    def _slices(self, counter: BinaryCounter) -> Tensor:
        size, max_roots = self._world.size, max(map(len, self._roots))
        width = -(-self._length // size)
        sent = counter.nodes[0][2].new_zeros((size, max_roots, width))
        for i, (_, _, value) in enumerate(counter.nodes):
            for rank, piece in enumerate(value.split(width)):
                sent[rank, i, : len(piece)] = piece
        received = self._world.all_to_all(sent)
        slice_counter = BinaryCounter()
        for rank, roots in enumerate(self._roots):
            for i, (level, index) in enumerate(roots):
                slice_counter.push(level, index, received[rank, i])
        return self._world.all_gather(slice_counter.total()).flatten()[: self._length]
