"""Test that with every exchange method every rank gets the tree's sum to the bit."""

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks
from torch import Tensor

from distributed_mnist.distributed.world import World
from distributed_mnist.gradients.cost_model import ExchangeMethod
from distributed_mnist.gradients.subtree_exchange import SubtreeExchange, fastest_method, has_equal_subtrees
from distributed_mnist.gradients.tree_sum import BinaryCounter, owned_shards

LENGTHS = (1, 2, 7, 64, 1_001, 30_000)
"""Some are shorter than the number of ranks, or odd at every halving."""

SHARDS = (8, 11, 16)
METHODS: tuple[ExchangeMethod, ...] = ("doubling", "halving", "slices")
SIZES = (1, 2, 3, 4, pytest.param(7, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow))


def leaf(shard: int, length: int) -> Tensor:
    """Return numbers of many magnitudes and both signs: every order of additions rounds differently."""
    rng = np.random.default_rng([shard, length])
    values = rng.standard_normal(length) * 10.0 ** rng.integers(-4, 4, length)
    return torch.from_numpy(values.astype(np.float32))


def tree_sum(leaves: list[Tensor]) -> Tensor:
    """Add from the top: the left part is the largest power of two smaller than the whole."""
    if len(leaves) == 1:
        return leaves[0].clone()
    left = 1 << (len(leaves) - 1).bit_length() - 1
    return tree_sum(leaves[:left]) + tree_sum(leaves[left:])


Case = tuple[int, int, ExchangeMethod | None]
"""Shards, length of the vectors, method; None for the fastest one."""


def cases(size: int) -> list[Case]:
    """Return the cases that are possible at this size."""
    return [
        (shards, length, method)
        for shards in SHARDS
        for length in LENGTHS
        for method in (None, *METHODS)
        if method in (None, "slices") or has_equal_subtrees(size, shards)
    ]


def finish(world: World) -> list[NDArray[np.float32]]:
    found = []
    for shards, length, method in cases(world.size):
        exchange = SubtreeExchange(world, shards, length, method)
        for again in range(2):  # nothing is left of the first for the second
            counter = BinaryCounter()
            for shard in owned_shards(world.rank, world.size, shards):
                counter.push(0, shard, leaf(shard + again, length))
            found.append(exchange.all_reduce(counter).numpy().copy())
    return found


@cache
def finished(size: int) -> list[list[NDArray[np.float32]]]:
    return run_ranks(finish, size)


@pytest.mark.parametrize("size", SIZES)
def test_every_way_has_the_trees_bits_on_every_rank(size: int) -> None:
    assert ("halving" in {method for _, _, method in cases(size)}) == (size not in (3, 7))
    twice = [(*case, again) for case in cases(size) for again in range(2)]
    for case, *ranks in zip(twice, *finished(size), strict=True):
        shards, length, _, again = case
        leaves = [leaf(shard + again, length) for shard in range(shards)]
        expected = tree_sum(leaves).numpy().tobytes()
        assert [each.tobytes() for each in ranks] == [expected] * size, case


@pytest.mark.parametrize("shards", range(1, 33))
def test_a_tree_is_even_where_every_rank_has_one_equal_part(shards: int) -> None:
    powers = {1, 2, 4, 8, 16, 32}
    for size in range(1, shards + 1):
        parts = {len(owned_shards(rank, size, shards)) for rank in range(size)}
        assert has_equal_subtrees(size, shards) == (
            size in powers and len(parts) == 1 and parts <= powers
        ), size


def test_what_is_chosen_can_be_done() -> None:
    """Short vectors are doubled and long ones halved; slices are used if neither is possible."""
    assert fastest_method(8, 8, 4) == "doubling"
    assert fastest_method(8, 8, 100_000_000) == "halving"
    for size, shards in ((3, 8), (4, 11), (6, 6), (4, 12)):
        for nbytes in (4, 100_000, 100_000_000):
            assert fastest_method(size, shards, nbytes) == "slices"
