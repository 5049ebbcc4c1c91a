"""Time messages and sums between processes on this host. `dmnist bench` runs it; it prints one JSON object.

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
from ..gradients.tree_sum import BinaryCounter
from ..launcher import spawn
from ..launcher.rank_process import run_in_group
from ..launcher.signals import StopSignals

LENGTHS = (1, 1_000, 7_850, 26_762, 215_194, 1_000_000)
"""Lengths of the float32 vectors that are sent and summed."""
_SECONDS_PER_LENGTH = 0.5


def work(placement: Placement, listener: socket.socket | None, _: Any) -> int:
    """Run one rank and return its exit code. Rank 0 prints the results."""

    def body(world: World, signals: StopSignals) -> None:
        torch.set_num_threads(1)
        results = {"size": world.size, "messages": messages(world), "exchanges": exchanges(world)}
        if world.rank == 0:
            sys.stdout.write(json.dumps(results) + "\n")

    return run_in_group(placement, listener, body, device="cpu")


def messages(world: World) -> list[dict[str, float]]:
    """Time ranks 0 and 1 sending each other a message at once, for each length. All ranks call it."""
    rows = []
    for length in LENGTHS:
        sent, received = torch.zeros(length), torch.zeros(length)

        def swap(sent: torch.Tensor = sent, received: torch.Tensor = received) -> None:
            if world.rank < 2:
                world.send_recv({1 - world.rank: sent}, {1 - world.rank: received})

        rows.append({"bytes": 4 * length, "seconds": median_seconds(world, swap)})
    return rows


def exchanges(world: World) -> list[dict[str, Any]]:
    """Time the sum of one vector per rank, for each algorithm and length. All ranks call it."""
    even = has_equal_subtrees(world.size, world.size)
    algorithms: list[ExchangeMethod] = ["doubling", "halving", "slices"] if even else ["slices"]
    rows = []
    for length in LENGTHS[1:]:
        for algorithm in algorithms:
            exchange = SubtreeExchange(world, world.size, length, algorithm)
            vector = torch.ones(length)

            def add_up(exchange: SubtreeExchange = exchange, vector: torch.Tensor = vector) -> None:
                counter = BinaryCounter()
                counter.push(0, world.rank, vector.clone())
                exchange.all_reduce(counter)

            seconds = median_seconds(world, add_up)
            rows.append({"how": algorithm, "bytes": 4 * length, "seconds": seconds})
    return rows


def median_seconds(world: World, call: Callable[[], None]) -> float:
    """Return the median time of a call that all ranks make together."""
    for _ in range(3):  # warm up
        call()
    world.barrier()
    seconds: list[float] = []
    began = time.perf_counter()
    enough = False
    while not enough:
        for _ in range(10):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        # All ranks must stop after the same call.
        over = torch.tensor([float(time.perf_counter() - began > _SECONDS_PER_LENGTH)])
        enough = bool(world.all_reduce_max_(over) > 0)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(spawn.spawn(int(sys.argv[1]), [spawn.Task("distributed_mnist.bench.exchange:work", None)]))
