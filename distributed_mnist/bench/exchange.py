"""What messages and exchanges take between processes here: run by `dmnist bench`, prints one JSON object.

python -m distributed_mnist.bench.exchange 4
"""

import json
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..common.placement import Placement
from ..distributed.world import World
from ..gradients.cost_model import ExchangeMethod
from ..gradients.subtree_exchange import SubtreeExchange, has_equal_subtrees
from ..gradients.tree_sum import BinaryCounter, owned_shards
from ..launcher import spawn
from ..launcher.rank_process import run_in_group
from ..launcher.signals import StopSignals

NUMBERS = (1, 1_000, 7_850, 26_762, 215_194, 1_000_000)
"""Lengths of the vectors that are exchanged, in float32."""
_SECONDS = 0.5  # for each of them


def work(placement: Placement, listener: socket.socket | None, _: Any) -> int:
    """One process."""

    def body(world: World, signals: StopSignals) -> None:
        torch.set_num_threads(1)
        found = {"size": world.size, "messages": messages(world), "exchanges": exchanges(world)}
        if world.rank == 0:
            sys.stdout.write(json.dumps(found) + "\n")

    return run_in_group(placement, listener, body, device="cpu")


def messages(world: World) -> list[dict[str, float]]:
    """Ranks 0 and 1 send each other so many bytes, both at once; the others watch."""
    found = []
    for count in NUMBERS:
        mine, its = torch.zeros(count), torch.zeros(count)

        def swap(mine: torch.Tensor = mine, its: torch.Tensor = its) -> None:
            if world.rank < 2:
                world.send_recv({1 - world.rank: mine}, {1 - world.rank: its})

        found.append({"bytes": 4 * count, "seconds": timed(world, swap)})
    return found


def exchanges(world: World) -> list[dict[str, Any]]:
    """One sum of everybody's vectors, by way and bytes."""
    ways: list[ExchangeMethod] = ["slices"]
    if has_equal_subtrees(world.size, world.size):
        ways = ["doubling", "halving", "slices"]
    found = []
    for count in NUMBERS[1:]:
        for how in ways:
            finish = SubtreeExchange(world, world.size, count, how)
            vector = torch.ones(count)

            def once(finish: SubtreeExchange = finish, vector: torch.Tensor = vector) -> None:
                counter = BinaryCounter()
                counter.push(0, owned_shards(world.rank, world.size, world.size).start, vector.clone())
                finish.all_reduce(counter)

            found.append({"how": how, "bytes": 4 * count, "seconds": timed(world, once)})
    return found


def timed(world: World, call: Callable[[], None]) -> float:
    """The median time of a call that all ranks make together."""
    for _ in range(3):
        call()
    world.barrier()
    taken: list[float] = []
    began = time.perf_counter()
    enough = False
    while not enough:
        for _ in range(10):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        enough = bool(
            world.all_reduce_max_(torch.tensor([float(time.perf_counter() - began > _SECONDS)])) > 0
        )
    return statistics.median(taken)


if __name__ == "__main__":
    sys.exit(spawn.spawn(int(sys.argv[1]), [spawn.Task("distributed_mnist.bench.exchange:work", None)]))
