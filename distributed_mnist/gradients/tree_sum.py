"""Add the gradients of shards in one fixed binary tree, and find the parts that a rank can add alone.

Floating-point addition is not associative: each order of additions has its own result. This is the one
order in which the program adds gradients.
"""

import torch
from torch import Tensor


def shard_sizes(count: int, shards: int) -> list[int]:
    """Return how many of `count` samples each shard holds."""
    return [(i + 1) * count // shards - i * count // shards for i in range(shards)]


def owned_shards(rank: int, size: int, shards: int) -> range:
    """Return the contiguous shards of a rank, from `rank*shards//size` to the next rank's first."""
    return range(rank * shards // size, (rank + 1) * shards // size)


class BinaryCounter:
    """Adds leaves 0, 1, 2 … in a fixed binary tree, and keeps at most log2 of their number at a time.

    Node `(level, index)` is the sum of leaves `index * 2**level` up to, but not including,
    `(index + 1) * 2**level`. Pushing a node merges it with its left sibling if that is on top of the
    stack, as a carry runs through a binary number. The counter changes the tensors that are pushed.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int, Tensor]] = []

    def push(self, level: int, index: int, value: Tensor) -> None:
        """Add a node. Nodes must come from left to right."""
        while index % 2 == 1 and self.nodes and self.nodes[-1][:2] == (level, index - 1):
            value = self.nodes.pop()[2].add_(value)
            level, index = level + 1, index // 2
        self.nodes.append((level, index, value))

    def push_rows(self, first: int, rows: Tensor) -> None:
        """Add consecutive leaves from `first` on, one in each of `rows`: pairs of a level in one call."""
        level = 0
        while len(rows) > 1 and first % 2 == len(rows) % 2 == 0:
            rows = rows[0::2].add_(rows[1::2])
            level, first = level + 1, first // 2
        for index, row in enumerate(rows.unbind(), start=first):
            self.push(level, index, row)

    def total(self) -> Tensor:
        """Return the sum of all leaves: the nodes left are merged from the right, smallest first."""
        value = self.nodes[-1][2]
        for _, _, left in reversed(self.nodes[:-1]):
            value = left.add_(value)
        return value


def subtree_roots(leaves: range) -> list[tuple[int, int]]:
    """Return the roots (level, index) of the complete subtrees among `leaves`."""
    counter = BinaryCounter()
    for leaf in leaves:
        counter.push(0, leaf, torch.zeros(()))
    return [(level, index) for level, index, _ in counter.nodes]
