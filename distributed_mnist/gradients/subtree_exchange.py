"""How the ranks finish one tree together: each comes with the roots of its own subtrees, all leave with the
sum.

- *doubling*: in round `k` a rank swaps its node with the one `2**k` away and adds: a level of the tree a
  round.
- *halving*: the same, but of each node only the half that a rank will answer for; then the finished pieces
  are handed back the same way. Twice the rounds, and bytes that do not grow with the number of ranks.
  (Both: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH",
  2005.)
- *slices*: every rank gets everyone's roots of one slice of the vector and finishes the tree for it; the
  slices are gathered. For any number of ranks, also where subtrees are uneven.

All add in the same tree, so they have the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.world import World
from .cost_model import LOOPBACK, How, exchange_seconds
from .tree_sum import BinaryCounter, owned_shards, subtree_roots


def is_even(size: int, shards: int) -> bool:
    """Whether each rank has one subtree, all of one size: a level of the tree lies between neighbours."""
    return size & (size - 1) == 0 and shards % size == 0 and (each := shards // size) & (each - 1) == 0


def choose(size: int, shards: int, nbytes: int) -> How:
    """The quickest way there is for this number of ranks, by the model of an exchange."""
    ways: Sequence[How] = ("doubling", "halving") if is_even(size, shards) else ("slices",)
    return min(ways, key=lambda how: exchange_seconds(how, size, nbytes, LOOPBACK))


class SubtreeExchange:
    """`total(nodes)`: the sum of all ranks' vectors of `length` numbers, on every rank, by `how` or by
    what the model of an exchange says is quickest."""

    def __init__(self, world: World, shards: int, length: int, how: How | None = None) -> None:
        self._world, self._length = world, length
        self._roots = [subtree_roots(owned_shards(rank, world.size, shards)) for rank in range(world.size)]
        how = how or choose(world.size, shards, 4 * length)
        self._way = {"doubling": self._doubling, "halving": self._halving, "slices": self._slices}[how]

    def total(self, counter: BinaryCounter) -> Tensor:
        """The whole tree's sum; `counter` holds this rank's roots, which are used up."""
        return counter.total() if self._world.size == 1 else self._way(counter)

    def _doubling(self, counter: BinaryCounter) -> Tensor:
        (value,) = (value for _, _, value in counter.nodes)
        theirs = torch.empty_like(value)
        distance = 1
        while distance < self._world.size:
            partner = self._world.rank ^ distance
            self._world.send_recv({partner: value}, {partner: theirs})
            value += theirs  # of two numbers, either order is the same sum
            distance *= 2
        return value

    def _halving(self, counter: BinaryCounter) -> Tensor:
        (value,) = (value for _, _, value in counter.nodes)
        theirs = torch.empty_like(value)
        rank, size = self._world.rank, self._world.size
        start, stop, distance = 0, self._length, 1
        cuts: list[tuple[int, slice, slice]] = []
        while distance < size:
            partner, middle = rank ^ distance, (start + stop) // 2
            left, right = slice(start, middle), slice(middle, stop)
            mine, other = (right, left) if rank & distance else (left, right)
            self._world.send_recv({partner: value[other]}, {partner: theirs[mine]})
            value[mine] += theirs[mine]
            cuts.append((partner, mine, other))
            start, stop, distance = mine.start, mine.stop, distance * 2
        for partner, mine, other in reversed(cuts):
            self._world.send_recv({partner: value[mine]}, {partner: value[other]})
        return value

    def _slices(self, counter: BinaryCounter) -> Tensor:
        size, most = self._world.size, max(map(len, self._roots))
        width = -(-self._length // size)
        mine = counter.nodes[0][2].new_zeros((size, most, width))
        for i, (_, _, value) in enumerate(counter.nodes):
            for j, piece in enumerate(value.split(width)):
                mine[j, i, : len(piece)] = piece
        received = self._world.all_to_all(mine)
        finish = BinaryCounter()
        for rank, roots in enumerate(self._roots):
            for i, (level, index) in enumerate(roots):
                finish.push(level, index, received[rank, i])
        return self._world.all_gather(finish.total()).flatten()[: self._length]
