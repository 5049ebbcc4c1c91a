"""Examine the communication between ranks: the collectives, their speed, and the clocks' differences.

Every collective that the program uses is checked against the answer that each rank computes by itself.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..distributed.world import World
from ..errors import WorkerLost, described
from ..gradients.cost_model import LOOPBACK
from ..gradients.subtree_exchange import SubtreeExchange
from ..gradients.tree_sum import BinaryCounter
from .findings import Finding, bad, doubtful, first_few, good

_LENGTH = 5_000
_MESSAGE_BYTES = (4, 2**12, 2**16, 2**20, 2**24)
"""Sizes of the messages that are timed."""
_ADVICE = "check network, driver and memory; dmnist verify tests whether training gives the right answer"


def collectives(world: World) -> Finding:
    """Check that each collective gives the right answer on every rank. All ranks must call it."""
    failed = [failure for name, check in _CHECKS.items() if (failure := _failure(world, name, check))]
    ranks_by_failure: dict[str, list[str]] = {}
    for rank, failures_there in enumerate(world.all_gather_object(failed, list[str])):
        if names := ", ".join(failures_there):
            ranks_by_failure.setdefault(names, []).append(str(rank))
    if ranks_by_failure:
        failures = [f"{names} on rank {', '.join(ranks)}" for names, ranks in ranks_by_failure.items()]
        return bad(f"wrong: {'; '.join(failures)}", _ADVICE)
    return good(f"{len(_CHECKS)} right over {world.backend}: {', '.join(_CHECKS)}")


def _failure(world: World, name: str, check: Callable[[World], bool]) -> str:
    """Return what is wrong with a collective on this rank; empty if nothing is.

    An exception (torch's process group cannot be joined, say) is a failure too: the other checks still run.
    """
    try:
        return "" if check(world) else name
    except WorkerLost:
        raise  # the group is gone, so nothing more can be checked
    except Exception as error:
        return f"{name} ({described(error)[1]})"


def speed(world: World) -> tuple[Finding, list[dict[str, float]]]:
    """Time messages between rank 0 and the last rank, both ways at once, and a barrier. All ranks call it.

    The second value has `bytes` and `seconds` for each message size; the barrier has 0 bytes.
    """
    partner = {0: world.size - 1, world.size - 1: 0}.get(world.rank)
    rows = []
    for nbytes in _MESSAGE_BYTES:
        sent = torch.zeros(nbytes // 4, device=world.device)
        received = torch.empty_like(sent)

        def swap(sent: Tensor = sent, received: Tensor = received) -> None:
            if partner is not None:
                world.send_recv({partner: sent}, {partner: received})

        rows.append({"bytes": nbytes, "seconds": _median_seconds(world, swap)})
    latency = rows[0]["seconds"]
    barrier = _median_seconds(world, world.barrier)
    speeds = ", ".join(f"{row['bytes'] / row['seconds'] / 1e9:.2g}" for row in rows[2:])
    sizes = ", ".join(_size(row["bytes"]) for row in rows[2:])
    value = (
        f"{1e6 * latency:.0f} µs a message; {speeds} GB/s with {sizes}; "
        f"{1e6 * barrier:.0f} µs for a barrier of all {world.size}"
    )
    rows.append({"bytes": 0, "seconds": barrier})
    if latency > 20 * LOOPBACK.latency:
        return doubtful(value, "a slow network, or more processes than cores"), rows
    return good(value), rows


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**20:g} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:g} KiB"


def addresses(world: World) -> Finding:
    """List the first few hosts with their names and the addresses at which they accept connections.

    The collectives show whether they reach each other: in an exchange every rank connects to every other.
    """
    hosts: dict[str, str] = {}
    for rank, peer in enumerate(world.peers):
        hosts.setdefault(peer.host, f"{peer.host} {world.address(rank)}")
    return good(first_few(list(hosts.values())))


def clocks(world: World) -> Finding:
    """Measure how far apart the hosts' clocks are, right after a barrier. All ranks must call it."""
    world.barrier()
    # Whole seconds and microseconds: a float32, the only float on some devices, is too coarse.
    seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
    readings = world.all_gather(torch.tensor([seconds, micros], device=world.device)).tolist()
    times = [whole + part / 1e6 for whole, part in readings]
    apart = max(times) - min(times)
    if apart > 1:
        advice = "synchronise them (NTP): otherwise logs are hard to read"
        return doubtful(f"{apart:.1f} s apart", advice)
    return good(f"within {1e3 * max(apart, 0.001):.0f} ms")


def _median_seconds(world: World, call: Callable[[], None], times: int = 15) -> float:
    """Return the median time of a call that all ranks make together, by this rank's clock."""
    call()
    seconds = []
    for _ in range(times):
        world.barrier()
        began = time.perf_counter()
        call()
        if world.device.type != "cpu":  # the call only queues work there
            torch.accelerator.synchronize(world.device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _values(world: World, rank: int) -> Tensor:
    """Return `_LENGTH` integers that differ by rank and position, so that a wrong rank or order shows."""
    return torch.arange(_LENGTH, device=world.device) * (rank + 2) + rank * rank


def _all_values(world: World) -> Tensor:
    """Return the values of all ranks, of shape `(ranks, _LENGTH)`."""
    return torch.stack([_values(world, rank) for rank in range(world.size)])


def _sum(world: World) -> bool:
    return torch.equal(world.all_reduce_sum_(_values(world, world.rank)), _all_values(world).sum(0))


def _maximum(world: World) -> bool:
    signed = _values(world, world.rank) * (-1) ** world.rank
    signs = torch.tensor([(-1) ** rank for rank in range(world.size)], device=world.device)
    return torch.equal(world.all_reduce_max_(signed), (_all_values(world) * signs[:, None]).amax(0))


def _gather(world: World) -> bool:
    return torch.equal(world.all_gather(_values(world, world.rank)), _all_values(world))


def _exchange(world: World) -> bool:
    ranks = torch.arange(world.size, device=world.device)
    sent = (1000 * world.rank + ranks)[:, None].repeat(1, 100)
    expected = (1000 * ranks + world.rank)[:, None].repeat(1, 100)
    return torch.equal(world.all_to_all(sent), expected)


def _swap(world: World) -> bool:
    following, preceding = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    received = torch.empty_like(_values(world, 0))
    world.send_recv({following: _values(world, world.rank)}, {preceding: received})
    return torch.equal(received, _values(world, preceding))


def _broadcast(world: World) -> bool:
    last = world.size - 1
    return torch.equal(world.broadcast_(_values(world, world.rank), last), _values(world, last))


def _objects(world: World) -> bool:
    received = world.broadcast_object((world.rank, b"\0" * 1000), tuple[int, bytes], src=world.size - 1)
    return received == (world.size - 1, b"\0" * 1000)


def _tree(world: World) -> bool:
    """Check the sum of gradients. For integers every order gives the same sum, so the answer is known."""
    exchange = SubtreeExchange(world, world.size, _LENGTH)
    counter = BinaryCounter()
    counter.push(0, world.rank, _values(world, world.rank).float())  # one shard for each rank
    return torch.equal(exchange.all_reduce(counter), _all_values(world).sum(0).float())


def _ddp(world: World) -> bool:
    """Check what DistributedDataParallel needs: torch's own process group."""
    group = world.join_process_group()
    return torch.equal(group.all_reduce_sum_(_values(world, world.rank)), _all_values(world).sum(0))


_CHECKS: dict[str, Callable[[World], bool]] = {
    "sum": _sum,
    "maximum": _maximum,
    "gather": _gather,
    "exchange": _exchange,
    "swap": _swap,
    "broadcast": _broadcast,
    "objects": _objects,
    "tree": _tree,
    "ddp": _ddp,
}
