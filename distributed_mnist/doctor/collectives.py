"""What `dmnist doctor` has the ranks do together: every collective that the program uses, against the
answer that each can work out by itself, and how fast; and how far their clocks are apart."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..distributed.world import World
from ..errors import WorkerLost, described
from ..gradients.cost_model import LOOPBACK
from ..gradients.subtree_exchange import SubtreeExchange
from ..gradients.tree_sum import BinaryCounter, owned_shards
from .findings import Finding, bad, doubtful, good, some

_LENGTH = 5_000
_SIZES = (4, 2**12, 2**16, 2**20, 2**24)
"""Bytes of the messages that are timed."""
_ADVICE = "dmnist verify tells whether training is right all the same; check network, driver and memory"


def collectives(world: World) -> Finding:
    """Whether each comes out right on every rank. All ranks call it."""
    wrong = [told for name, check in _CHECKS.items() if (told := _complaint(world, name, check))]
    whose: dict[str, list[str]] = {}
    for rank in range(world.size):
        if names := ", ".join(world.broadcast_object(wrong, src=rank)):
            whose.setdefault(names, []).append(str(rank))
    told = [f"{names} on rank {', '.join(ranks)}" for names, ranks in whose.items()]
    if told:
        return bad("collectives", f"wrong: {'; '.join(told)}", _ADVICE)
    return good("collectives", f"{len(_CHECKS)} right over {world.backend}: {', '.join(_CHECKS)}")


def _complaint(world: World, name: str, check: Callable[[World], bool]) -> str:
    """What is wrong with a collective on this rank; empty if nothing is."""
    try:
        return "" if check(world) else name
    except WorkerLost:
        raise  # there is no group any more that could be examined
    except Exception as error:  # torch's group that cannot be joined, say: the others' lines still stand
        return f"{name} ({described(error)[1]})"


def speed(world: World) -> tuple[Finding, list[dict[str, float]]]:
    """What messages between rank 0 and the last rank take, both ways at once, and a sum of all."""
    partner = {0: world.size - 1, world.size - 1: 0}.get(world.rank)
    rows = []
    for nbytes in _SIZES:
        mine = torch.zeros(nbytes // 4, device=world.device)
        its = torch.empty_like(mine)

        def swap(mine: Tensor = mine, its: Tensor = its) -> None:
            if partner is not None:
                world.send_recv({partner: mine}, {partner: its})

        rows.append({"bytes": nbytes, "seconds": _median(world, swap)})
    latency = rows[0]["seconds"]
    total = _median(world, world.barrier)
    speeds = ", ".join(f"{row['bytes'] / row['seconds'] / 1e9:.2g}" for row in rows[2:])
    sizes = ", ".join(_size(row["bytes"]) for row in rows[2:])
    value = (
        f"{1e6 * latency:.0f} µs a message; {speeds} GB/s with {sizes}; "
        f"{1e6 * total:.0f} µs for all {world.size} to meet"
    )
    rows.append({"bytes": 0, "seconds": total})
    if latency > 20 * LOOPBACK.latency:
        return doubtful("exchange", value, "a slow network, or more processes than cores"), rows
    return good("exchange", value), rows


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**20:g} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:g} KiB"


def addresses(world: World) -> Finding:
    """Where the hosts let each other in: their names and addresses on the way to rank 0, of many the first.

    That they reach each other shows in the collectives: in an exchange every rank connects to every other.
    """
    hosts: dict[str, str] = {}
    for rank, peer in enumerate(world.peers):
        hosts.setdefault(peer.host, f"{peer.host} {world.address(rank)}")
    return good("addresses", some(list(hosts.values())))


def clocks(world: World) -> Finding:
    """How far the hosts' clocks are apart, as seen right after all have met."""
    world.barrier()
    # Whole microseconds in two parts: float32, where a device has no other floats, is too coarse.
    seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
    told = world.all_gather(torch.tensor([seconds, micros], device=world.device)).tolist()
    times = [whole + part / 1e6 for whole, part in told]
    apart = max(times) - min(times)
    if apart > 1:
        return doubtful(
            "clocks", f"{apart:.1f} s apart", "synchronise them (NTP): logs are hard to read else"
        )
    return good("clocks", f"within {1e3 * max(apart, 0.001):.0f} ms")


def _median(world: World, call: Callable[[], None], times: int = 15) -> float:
    """Median seconds of a call that all ranks make, by rank 0's clock."""
    call()
    taken = []
    for _ in range(times):
        world.barrier()
        began = time.perf_counter()
        call()
        if world.device.type != "cpu":  # it works by itself
            torch.accelerator.synchronize(world.device)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[times // 2]


def _values(world: World, rank: int) -> Tensor:
    """Whole numbers that differ by rank and by place, so that a wrong rank or order shows."""
    return torch.arange(_LENGTH, device=world.device) * (rank + 2) + rank * rank


def _all(world: World) -> Tensor:
    return torch.stack([_values(world, rank) for rank in range(world.size)])


def _sum(world: World) -> bool:
    return torch.equal(world.all_reduce_sum_(_values(world, world.rank)), _all(world).sum(0))


def _maximum(world: World) -> bool:
    turned = _values(world, world.rank) * (-1) ** world.rank
    signs = torch.tensor([(-1) ** rank for rank in range(world.size)], device=world.device)
    return torch.equal(world.all_reduce_max_(turned), (_all(world) * signs[:, None]).amax(0))


def _gather(world: World) -> bool:
    return torch.equal(world.all_gather(_values(world, world.rank)), _all(world))


def _exchange(world: World) -> bool:
    ranks = torch.arange(world.size, device=world.device)
    sent = (1000 * world.rank + ranks)[:, None].repeat(1, 100)
    expected = (1000 * ranks + world.rank)[:, None].repeat(1, 100)
    return torch.equal(world.all_to_all(sent), expected)


def _swap(world: World) -> bool:
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    received = torch.empty_like(_values(world, 0))
    world.send_recv({after: _values(world, world.rank)}, {before: received})
    return torch.equal(received, _values(world, before))


def _broadcast(world: World) -> bool:
    last = world.size - 1
    return torch.equal(world.broadcast_(_values(world, world.rank), last), _values(world, last))


def _objects(world: World) -> bool:
    told = world.broadcast_object({"rank": world.rank, "bytes": b"\0" * 1000}, src=world.size - 1)
    return told == {"rank": world.size - 1, "bytes": b"\0" * 1000}


def _tree(world: World) -> bool:
    """The sum of gradients: on whole numbers any order gives the same, so the answer is known."""
    finish = SubtreeExchange(world, world.size, _LENGTH)
    counter = BinaryCounter()
    counter.push(
        0, owned_shards(world.rank, world.size, world.size).start, _values(world, world.rank).float()
    )
    return torch.equal(finish.all_reduce(counter), _all(world).sum(0).float())


def _ddp(world: World) -> bool:
    """What DistributedDataParallel needs: torch's own process group."""
    group = world.join_process_group()
    return torch.equal(group.all_reduce_sum_(_values(world, world.rank)), _all(world).sum(0))


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
