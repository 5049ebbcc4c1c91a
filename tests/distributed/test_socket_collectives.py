"""Socket collectives in groups of real processes.

Each collective equals a plain reference bit for bit, strangers are refused, and a rank that dies is named.
"""

import contextlib
import hashlib
import math
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from multiprocessing.synchronize import Barrier

import numpy as np
import pytest
import torch
from ranks import PATIENCE, run_ranks, server, try_ranks
from torch import Tensor

from distributed_mnist.distributed import authentication, listener
from distributed_mnist.distributed.authentication import Claim, Purpose
from distributed_mnist.distributed.listener import Listener
from distributed_mnist.distributed.network import LOOPBACK, open_listener
from distributed_mnist.distributed.peer import Peer
from distributed_mnist.distributed.rendezvous import Rendezvous
from distributed_mnist.distributed.socket_collectives import _LARGE, SocketCollectives
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import WorkerLost

SIZES = (2, 3, 4, 5, 7)
ATTEMPT, KEY = b"this attempt    ", b"the key of this job"
EIGHT_MB = 8_000_000
"""Bytes; more than the buffers of two sockets hold."""

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int32, torch.int64, torch.bool
)  # fmt: skip
SHAPES = ((), (1,), (7,), (3, 5), (0,), (2, 0, 3), (1_000,))


class Joined(Rendezvous):
    """The result of a rendezvous, without the rendezvous."""

    def __init__(self, peers: list[Peer], own: Listener) -> None:
        self.peers, self.attempt, self.key, self.host, self.listener = peers, ATTEMPT, KEY, LOOPBACK, own
        self._connection = None


def fresh(world: World) -> tuple[SocketCollectives, list[int]]:
    """Collectives without any connection yet, and the ranks' ports."""
    own = Listener(open_listener(LOOPBACK), KEY, report=lambda text: None)
    ports = world.all_gather(torch.tensor(own.port)).tolist()
    peers = [replace(peer, port=port) for peer, port in zip(world.peers, ports, strict=True)]
    return SocketCollectives(world.rank, Joined(peers, own)), ports


def values(rank: int, dtype: torch.dtype, shape: Sequence[int], salt: int = 0) -> Tensor:
    """A rank's values; floats of many magnitudes and both signs, so that the order of additions matters."""
    rng = np.random.default_rng([rank, salt, math.prod(shape)])
    if dtype == torch.bool:
        return torch.from_numpy(np.array(rng.integers(0, 2, shape))).bool()
    if dtype.is_floating_point:
        drawn = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)
        return torch.from_numpy(np.array(drawn)).to(dtype)
    limits = torch.iinfo(dtype)
    drawn = rng.integers(limits.min // 8, limits.max // 8, shape, dtype=np.int64)
    return torch.from_numpy(np.array(drawn)).to(dtype)


Content = tuple[torch.dtype, tuple[int, ...], bytes]


def content(tensor: Tensor) -> Content:
    """Everything about a tensor: dtype, shape and bytes."""
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"",
    )


def in_order(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


Key = tuple[str, torch.dtype, tuple[int, ...]]


def all_collectives(world: World) -> dict[Key, Content]:
    """Call every collective with every kind of tensor."""
    collectives, _ = fresh(world)
    rank, size = world.rank, world.size
    results: dict[Key, Content] = {}
    for dtype, shape in product(DTYPES, SHAPES):
        mine = values(rank, dtype, shape)
        rows = torch.stack([values(rank, dtype, shape, salt=j) for j in range(size)])
        before = content(mine), content(rows)
        results["gather", dtype, shape] = content(collectives.all_gather(mine))
        results["exchange", dtype, shape] = content(collectives.all_to_all(rows))
        assert (content(mine), content(rows)) == before, "the input has changed"
        for src in range(size):
            tensor = values(rank, dtype, shape, salt=src)
            assert collectives.broadcast_(tensor, src) is tensor
            results[f"broadcast {src}", dtype, shape] = content(tensor)
        above, below = (rank + 1) % size, (rank - 1) % size
        theirs = torch.empty_like(mine)
        collectives.send_recv({above: mine}, {below: theirs})
        results["swap", dtype, shape] = content(theirs)
        if dtype != torch.bool:
            tensor = mine.clone()
            assert collectives.all_reduce_sum_(tensor) is tensor
            results["sum", dtype, shape] = content(tensor)
        tensor = mine.clone()
        assert collectives.all_reduce_max_(tensor) is tensor
        results["max", dtype, shape] = content(tensor)
    world.barrier()
    collectives.close()
    return results


def expected(rank: int, size: int, dtype: torch.dtype) -> dict[Key, Content]:
    """The same results from a plain reference."""
    found: dict[Key, Content] = {}
    for shape in SHAPES:
        everyone = [values(r, dtype, shape) for r in range(size)]
        found["gather", dtype, shape] = content(torch.stack(everyone))
        to_me = [values(r, dtype, shape, salt=rank) for r in range(size)]
        found["exchange", dtype, shape] = content(torch.stack(to_me))
        for src in range(size):
            found[f"broadcast {src}", dtype, shape] = content(values(src, dtype, shape, salt=src))
        found["swap", dtype, shape] = content(everyone[(rank - 1) % size])
        if dtype != torch.bool:
            found["sum", dtype, shape] = content(in_order(everyone))
        found["max", dtype, shape] = content(torch.stack(everyone).amax(0))
    return found


@cache
def results(size: int) -> list[dict[Key, Content]]:
    return run_ranks(all_collectives, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_collectives(size: int, dtype: torch.dtype) -> None:
    for rank in range(size):
        found = {key: value for key, value in results(size)[rank].items() if key[1] == dtype}
        assert found == expected(rank, size, dtype)


# ---- Sums ------------------------------------------------------------------------------------------------

LENGTHS = ((_LARGE - 1,), (_LARGE,), (_LARGE + 1,), (3, _LARGE + 5), (1, 1, 2 * _LARGE), (53, 311))


def add(world: World) -> list[Content]:
    collectives, _ = fresh(world)
    return [
        content(collectives.all_reduce_sum_(values(world.rank, torch.float32, shape))) for shape in LENGTHS
    ]


@pytest.mark.parametrize("size", SIZES)
def test_short_and_long_sums_add_in_the_order_of_ranks(size: int) -> None:
    """Every rank sums a short tensor, and one slice of a long one: the same bits."""
    everyone = [[values(rank, torch.float32, shape) for rank in range(size)] for shape in LENGTHS]
    reference = [content(in_order(tensors)) for tensors in everyone]
    assert run_ranks(add, size) == [reference] * size
    if size > 2:  # with these numbers the order matters
        assert all(
            content(in_order(tensors[::-1])) != its
            for tensors, its in zip(everyone, reference, strict=True)
        )


def add_in_pieces(world: World) -> list[Content]:
    """Sum views that are not contiguous, in place."""
    collectives, _ = fresh(world)
    found = []
    for rows, columns in ((6, 5), (101, 90)):
        whole = values(world.rank, torch.float32, (rows, columns))
        collectives.all_reduce_sum_(whole.t()[1:-1])
        collectives.all_reduce_max_(whole[:2, ::2])
        found.append(content(whole))
    return found


def test_sums_of_parts_leave_the_rest_alone() -> None:
    size = 3
    for rank, found in enumerate(run_ranks(add_in_pieces, size)):
        for (rows, columns), its in zip(((6, 5), (101, 90)), found, strict=True):
            everyone = [values(r, torch.float32, (rows, columns)) for r in range(size)]
            total = in_order([whole[:, 1:-1] for whole in everyone])
            whole = everyone[rank]
            summed = [torch.cat([w[:, :1], total, w[:, -1:]], 1) for w in everyone]
            whole[:, 1:-1] = total
            whole[:2, ::2] = torch.stack([w[:2, ::2] for w in summed]).amax(0)
            assert its == content(whole)


def receive_into_views(world: World, what: str) -> bool:
    """Whether values that are received into a view that is not contiguous arrive, or an error is raised."""
    collectives, _ = fresh(world)
    rank, size = world.rank, world.size
    try:
        if what == "broadcast":
            part = torch.full((4, 6), float(rank))[:, :3]
            return not collectives.broadcast_(part, 0).any()
        if what == "exchange":
            many = torch.arange(20 * size).view(5, 4, size).permute(2, 1, 0)
            rows, right = many + 100 * rank, [many[rank] + 100 * other for other in range(size)]
            return torch.equal(collectives.all_to_all(rows), torch.stack(right))
        part = torch.full((4, 6), -1.0)[:, :3]
        collectives.send_recv({1 - rank: torch.full((4, 3), float(rank))}, {1 - rank: part})
        return bool((part == 1 - rank).all())
    except (RuntimeError, ValueError):
        return True


@pytest.mark.parametrize("what", ["broadcast", "exchange", "swap"])
def test_receiving_into_a_view_loses_nothing(what: str) -> None:
    assert run_ranks(receive_into_views, 2, what) == [True, True]


# ---- More than socket buffers hold -----------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def random_bytes(rank: int, to: int, length: int = EIGHT_MB) -> Tensor:
    return torch.from_numpy(np.random.default_rng([rank, to]).integers(0, 256, length, dtype=np.uint8))


def swap_much(world: World) -> list[str]:
    """Every rank sends every other rank eight megabytes at once; digests of what came, by rank."""
    collectives, _ = fresh(world)
    others = [rank for rank in range(world.size) if rank != world.rank]
    into = {rank: torch.zeros(EIGHT_MB, dtype=torch.uint8) for rank in others}
    collectives.send_recv({rank: random_bytes(world.rank, rank) for rank in others}, into)
    return [digest(into[rank]) if rank in into else "" for rank in range(world.size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_large_messages_both_ways_at_once(size: int) -> None:
    for rank, came in enumerate(run_ranks(swap_much, size)):
        assert came == [digest(random_bytes(other, rank)) if other != rank else "" for other in range(size)]


def uneven_swaps(world: World) -> list[str]:
    """Much one way, and a byte or nothing the other; then a collective, to see that nothing is left."""
    collectives, _ = fresh(world)
    rank, other = world.rank, 1 - world.rank
    found = []
    for mine, theirs in ((EIGHT_MB, 1), (1, EIGHT_MB), (EIGHT_MB, 0), (0, EIGHT_MB), (0, 0), (3, 5)):
        lengths = (mine, theirs) if rank == 0 else (theirs, mine)
        into = torch.zeros(lengths[1], dtype=torch.uint8)
        collectives.send_recv({other: random_bytes(rank, other, lengths[0])}, {other: into})
        assert torch.equal(into, random_bytes(other, rank, lengths[1]))
    found.append(digest(collectives.all_gather(random_bytes(rank, 7, 100))))
    return found


def test_a_large_and_a_small_message() -> None:
    reference = digest(torch.stack([random_bytes(rank, 7, 100) for rank in range(2)]))
    assert run_ranks(uneven_swaps, 2) == [[reference]] * 2


def collect_much(world: World) -> list[str]:
    collectives, _ = fresh(world)
    rank, size = world.rank, world.size
    found = [digest(collectives.all_gather(random_bytes(rank, 0)))]
    found.append(digest(collectives.broadcast_(random_bytes(rank, 1), size - 1)))
    rows = torch.stack([random_bytes(rank, j, EIGHT_MB // 4) for j in range(size)])
    assert torch.equal(
        collectives.all_to_all(rows),
        torch.stack([random_bytes(other, rank, EIGHT_MB // 4) for other in range(size)]),
    )
    return found


def test_large_collectives() -> None:
    size = 3
    reference = [
        digest(torch.stack([random_bytes(rank, 0) for rank in range(size)])),
        digest(random_bytes(size - 1, 1)),
    ]
    assert run_ranks(collect_much, size) == [reference] * size


def many_collectives(world: World, seed: int) -> list[tuple[int, str, int]]:
    """A hundred collectives of all lengths without a pause; those with a wrong result."""
    collectives, _ = fresh(world)
    rank, size = world.rank, world.size
    rng = np.random.default_rng(seed)
    wrong = []
    for i in range(100):
        what = str(rng.choice(["gather", "exchange", "broadcast", "sum"]))
        length, src = int(10 ** rng.uniform(0, 4.5)), int(rng.integers(size))
        everyone = [values(r, torch.float32, (size, length), salt=i) for r in range(size)]
        mine = everyone[rank].clone()
        if what == "gather":
            right = torch.equal(collectives.all_gather(mine), torch.stack(everyone))
        elif what == "exchange":
            right = torch.equal(
                collectives.all_to_all(mine), torch.stack([rows[rank] for rows in everyone])
            )
        elif what == "broadcast":
            right = torch.equal(collectives.broadcast_(mine, src), everyone[src])
        else:
            right = torch.equal(collectives.all_reduce_sum_(mine), in_order(everyone))
        if not right:
            wrong.append((i, what, length))
    return wrong


@pytest.mark.parametrize("size", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_many_collectives(size: int) -> None:
    """Nothing of a message is left over for the next, and an early message is not confused with another."""
    assert run_ranks(many_collectives, size, 11) == [[]] * size


# ---- Strangers -------------------------------------------------------------------------------------------


def claim(rank: int, key: bytes = KEY, attempt: bytes = ATTEMPT) -> Callable[[int], socket.socket]:
    """Connect to a port with a proof, as this rank of this attempt."""
    return lambda port: authentication.connect(
        LOOPBACK, port, key, Claim(Purpose.COLLECTIVES, rank, attempt), PATIENCE
    )[0]


def send(message: bytes) -> Callable[[int], socket.socket]:
    """Connect to a port and send this."""

    def connect(port: int) -> socket.socket:
        stranger = socket.create_connection((LOOPBACK, port))
        stranger.sendall(message)
        return stranger

    return connect


STRANGERS: dict[str, tuple[Callable[[int], socket.socket], bool]] = {
    "another protocol": (send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(100)), True),
    "half a proof": (send(bytes(20)), True),
    "zeros as a proof": (send(bytes(authentication.CLAIM_BYTES)), True),
    "nothing": (send(b""), True),
    "a megabyte": (send(bytes(2**20)), True),
    "another key": (claim(2, b"another key"), False),
    "an earlier attempt": (claim(2, attempt=b"earlier attempt "), False),
    "the receiver's own rank": (claim(0), False),
    "a rank beyond the last": (claim(3), False),
}
"""How a stranger connects, and whether the listener closes the connection in time."""


def among_strangers(world: World, kind: str) -> tuple[list[int], list[int], int]:
    """Strangers connect to every rank first. Results of collectives, and how many were refused."""
    listener.HANDSHAKE_SECONDS = 1.0  # ranks need less, also on a busy machine
    collectives, ports = fresh(world)
    connect, _ = STRANGERS[kind]
    strangers = []
    if world.rank == 2:
        for port in ports[:2] * 2:  # no rank connects to the last one: it connects to the others
            with contextlib.suppress(OSError):  # it is refused at once
                strangers.append(connect(port))
    world.barrier()
    total = collectives.all_reduce_sum_(torch.tensor([1 + world.rank, 10])).tolist()
    gathered = collectives.all_gather(torch.tensor(world.rank)).tolist()
    refused = sum(map(connection_closed, strangers)) if STRANGERS[kind][1] else 0
    world.barrier()  # a process that ends closes its connections
    collectives.close()
    return total, gathered, refused


def connection_closed(stranger: socket.socket) -> bool:
    stranger.settimeout(PATIENCE / 4)
    with stranger:
        try:
            while stranger.recv(100):  # the challenge
                pass
        except ConnectionResetError:  # it sent more than was read
            pass
        return True


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_is_refused_and_does_no_harm(kind: str) -> None:
    found = run_ranks(among_strangers, 3, kind)
    for rank, (total, gathered, refused) in enumerate(found):
        assert total == [6, 30]
        assert gathered == [0, 1, 2]
        assert refused == (4 if rank == 2 and STRANGERS[kind][1] else 0)


# ---- Deaths ----------------------------------------------------------------------------------------------

WAYS = "(it closed the connection|connection reset by peer|broken pipe)"


def die_within_a_message(world: World, victim: int, noticed: Barrier) -> None:
    """The victim sends each other rank the beginning of a message, and dies."""
    collectives, _ = fresh(world)
    collectives.all_to_all(torch.zeros(world.size, 1))
    if world.rank == victim:
        for other in range(world.size):
            if other != victim:
                assert collectives._connection(other).send(bytes(1_000)) == 1_000
        os._exit(9)
    try:
        collectives.all_to_all(torch.ones(world.size, EIGHT_MB // 4))
    except WorkerLost as error:
        noticed.wait(PATIENCE)  # a rank that leaves at once would be lost to the next one
        raise WorkerLost(f"noticed: {error}, {world.peers[victim].pid}") from None


@pytest.mark.parametrize(("size", "victim"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (5, 3)])
def test_a_rank_that_dies_within_a_message_is_named(size: int, victim: int) -> None:
    ends = try_ranks(die_within_a_message, size, victim, server().Barrier(size - 1))
    assert ends[victim].error == "died without a word"
    for rank, end in enumerate(ends):
        if rank != victim:
            message = rf"noticed: lost rank {victim} \(pid (?P<pid>\d+) on \S+\): {WAYS}, (?P=pid)$"
            assert re.search(message, (end.error or "").strip()), end.error


def close_within_a_message(world: World) -> None:
    """Rank 1 sends a part of the message, which arrives, and then closes."""
    collectives, _ = fresh(world)
    collectives.all_gather(torch.zeros(1))
    if world.rank == 1:
        collectives.send_recv({0: torch.zeros(1_000)}, {})
        os._exit(9)
    collectives.send_recv({}, {1: torch.zeros(2_000)})


def test_a_rank_that_closes_within_a_message_is_named() -> None:
    end, _ = try_ranks(close_within_a_message, 2)
    message = r"WorkerLost: lost rank 1 \(pid \d+ on \S+\): it closed the connection$"
    assert re.search(message, (end.error or "").strip()), end.error


def die_before_connecting(world: World) -> str:
    """Rank 0 closes its listener before rank 1 has connected to it."""
    collectives, _ = fresh(world)
    if world.rank == 0:
        collectives._rendezvous.close()
    world.barrier()
    if world.rank == 1:
        with pytest.raises(WorkerLost) as lost:
            collectives.all_gather(torch.ones(3))
        return f"{lost.value}, {world.peers[0].pid}"
    return ""


def test_a_rank_that_is_gone_before_it_connects_is_named() -> None:
    _, message = run_ranks(die_before_connecting, 2)
    assert re.fullmatch(
        r"lost rank 0 \(pid (\d+) on \S+\): connection refused at \S+ port \d+, \1", message
    )
