"""One binary tree over the shards of a batch, and the parts of it that a rank can add up alone.

Floating-point addition is not associative, so a sum has as many answers as there are orders to add in. This
is the one order the program adds gradients in.
"""

import torch
from torch import Tensor


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
