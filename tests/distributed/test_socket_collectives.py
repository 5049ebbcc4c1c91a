"""Sockets between ranks, in groups of real processes: each collective is a plain reference's to the bit,
strangers are no trouble, and who dies is named."""

import hashlib
import math
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from multiprocessing.synchronize import Barrier

import numpy as np
import pytest
import torch
from ranks import PATIENCE, run_ranks, server, try_ranks
from torch import Tensor

from distributed_mnist.distributed import socket_collectives as mesh_module
from distributed_mnist.distributed.membership import Peer
from distributed_mnist.distributed.socket_collectives import _LARGE, SocketCollectives, open_listener
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import WorkerLost

SIZES = (2, 3, 4, 5, 7)
WORD = "a word of our own"
EIGHT_MB = 8_000_000
"""Bytes; more than two sockets hold."""

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int32, torch.int64, torch.bool
)  # fmt: skip
SHAPES = ((), (1,), (7,), (3, 5), (0,), (2, 0, 3), (1_000,))


def fresh(world: World) -> tuple[SocketCollectives, list[int]]:
    """A mesh in which nobody has met anybody yet, and the ports of its doors."""
    door = open_listener()
    ports = world.all_gather(torch.tensor(door.getsockname()[1])).tolist()
    peers = [replace(peer, port=port) for peer, port in zip(world.peers, ports, strict=True)]
    return SocketCollectives(world.rank, peers, door, "127.0.0.1", WORD), ports


def values(rank: int, dtype: torch.dtype, shape: Sequence[int], salt: int = 0) -> Tensor:
    """What a rank says; floats of many magnitudes and both signs, so that orders of addition differ."""
    rng = np.random.default_rng([rank, salt, math.prod(shape)])
    if dtype == torch.bool:
        return torch.from_numpy(np.array(rng.integers(0, 2, shape))).bool()
    if dtype.is_floating_point:
        drawn = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)
        return torch.from_numpy(np.array(drawn)).to(dtype)
    limits = torch.iinfo(dtype)
    drawn = rng.integers(limits.min // 8, limits.max // 8, shape, dtype=np.int64)
    return torch.from_numpy(np.array(drawn)).to(dtype)


Said = tuple[torch.dtype, tuple[int, ...], bytes]


def said(tensor: Tensor) -> Said:
    """All that there is to a tensor."""
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


def speak(world: World) -> dict[Key, Said]:
    """Every collective on every kind of tensor."""
    mesh, _ = fresh(world)
    rank, size = world.rank, world.size
    heard: dict[Key, Said] = {}
    for dtype, shape in product(DTYPES, SHAPES):
        mine = values(rank, dtype, shape)
        rows = torch.stack([values(rank, dtype, shape, salt=j) for j in range(size)])
        before = said(mine), said(rows)
        heard["gather", dtype, shape] = said(mesh.all_gather(mine))
        heard["exchange", dtype, shape] = said(mesh.all_to_all(rows))
        assert (said(mine), said(rows)) == before, "what was sent has changed"
        for src in range(size):
            tensor = values(rank, dtype, shape, salt=src)
            assert mesh.broadcast_(tensor, src) is tensor
            heard[f"broadcast {src}", dtype, shape] = said(tensor)
        above, below = (rank + 1) % size, (rank - 1) % size
        theirs = torch.empty_like(mine)
        mesh.send_recv({above: mine}, {below: theirs})
        heard["swap", dtype, shape] = said(theirs)
        if dtype != torch.bool:
            tensor = mine.clone()
            assert mesh.all_reduce_sum_(tensor) is tensor
            heard["sum", dtype, shape] = said(tensor)
        tensor = mine.clone()
        assert mesh.all_reduce_max_(tensor) is tensor
        heard["max", dtype, shape] = said(tensor)
    world.barrier()
    mesh.close()
    return heard


def expected(rank: int, size: int, dtype: torch.dtype) -> dict[Key, Said]:
    """The same, by a plain reference."""
    found: dict[Key, Said] = {}
    for shape in SHAPES:
        everyone = [values(r, dtype, shape) for r in range(size)]
        found["gather", dtype, shape] = said(torch.stack(everyone))
        to_me = [values(r, dtype, shape, salt=rank) for r in range(size)]
        found["exchange", dtype, shape] = said(torch.stack(to_me))
        for src in range(size):
            found[f"broadcast {src}", dtype, shape] = said(values(src, dtype, shape, salt=src))
        found["swap", dtype, shape] = said(everyone[(rank - 1) % size])
        if dtype != torch.bool:
            found["sum", dtype, shape] = said(in_order(everyone))
        found["max", dtype, shape] = said(torch.stack(everyone).amax(0))
    return found


@cache
def heard(size: int) -> list[dict[Key, Said]]:
    return run_ranks(speak, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_collectives(size: int, dtype: torch.dtype) -> None:
    for rank in range(size):
        found = {key: value for key, value in heard(size)[rank].items() if key[1] == dtype}
        assert found == expected(rank, size, dtype)


# ---- Sums ------------------------------------------------------------------------------------------------

LENGTHS = ((_LARGE - 1,), (_LARGE,), (_LARGE + 1,), (3, _LARGE + 5), (1, 1, 2 * _LARGE), (53, 311))


def add(world: World) -> list[Said]:
    mesh, _ = fresh(world)
    return [said(mesh.all_reduce_sum_(values(world.rank, torch.float32, shape))) for shape in LENGTHS]


@pytest.mark.parametrize("size", SIZES)
def test_short_and_long_sums_add_in_the_order_of_ranks(size: int) -> None:
    """Below a length everyone adds everything, above it each rank a slice: the same bits."""
    everyone = [[values(rank, torch.float32, shape) for rank in range(size)] for shape in LENGTHS]
    reference = [said(in_order(tensors)) for tensors in everyone]
    assert run_ranks(add, size) == [reference] * size
    if size > 2:  # these numbers can tell orders apart
        assert all(
            said(in_order(tensors[::-1])) != its for tensors, its in zip(everyone, reference, strict=True)
        )


def add_in_pieces(world: World) -> list[Said]:
    """Views that do not lie in one piece are summed where they are."""
    mesh, _ = fresh(world)
    found = []
    for rows, columns in ((6, 5), (101, 90)):
        whole = values(world.rank, torch.float32, (rows, columns))
        mesh.all_reduce_sum_(whole.t()[1:-1])
        mesh.all_reduce_max_(whole[:2, ::2])
        found.append(said(whole))
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
            assert its == said(whole)


def into_parts(world: World, what: str) -> bool:
    """Whether what is received into a view that does not lie in one piece is there, or was refused."""
    mesh, _ = fresh(world)
    rank, size = world.rank, world.size
    try:
        if what == "broadcast":
            part = torch.full((4, 6), float(rank))[:, :3]
            return not mesh.broadcast_(part, 0).any()
        if what == "exchange":
            many = torch.arange(20 * size).view(5, 4, size).permute(2, 1, 0)
            rows, right = many + 100 * rank, [many[rank] + 100 * other for other in range(size)]
            return torch.equal(mesh.all_to_all(rows), torch.stack(right))
        part = torch.full((4, 6), -1.0)[:, :3]
        mesh.send_recv({1 - rank: torch.full((4, 3), float(rank))}, {1 - rank: part})
        return bool((part == 1 - rank).all())
    except (RuntimeError, ValueError):
        return True


@pytest.mark.parametrize("what", ["broadcast", "exchange", "swap"])
def test_nothing_is_lost_on_the_way_into_a_view(what: str) -> None:
    assert run_ranks(into_parts, 2, what) == [True, True]


# ---- More than sockets hold ------------------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def heap(rank: int, to: int, length: int = EIGHT_MB) -> Tensor:
    return torch.from_numpy(np.random.default_rng([rank, to]).integers(0, 256, length, dtype=np.uint8))


def swap_much(world: World) -> list[str]:
    """Everyone sends everyone eight megabytes, all at once; what came, by rank."""
    mesh, _ = fresh(world)
    others = [rank for rank in range(world.size) if rank != world.rank]
    into = {rank: torch.zeros(EIGHT_MB, dtype=torch.uint8) for rank in others}
    mesh.send_recv({rank: heap(world.rank, rank) for rank in others}, into)
    return [digest(into[rank]) if rank in into else "" for rank in range(world.size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_much_goes_both_ways_at_once(size: int) -> None:
    for rank, came in enumerate(run_ranks(swap_much, size)):
        assert came == [digest(heap(other, rank)) if other != rank else "" for other in range(size)]


def uneven_swaps(world: World) -> list[str]:
    """Much one way and a byte or nothing the other; then a round trip to see that nothing was left over."""
    mesh, _ = fresh(world)
    rank, other = world.rank, 1 - world.rank
    found = []
    for mine, theirs in ((EIGHT_MB, 1), (1, EIGHT_MB), (EIGHT_MB, 0), (0, EIGHT_MB), (0, 0), (3, 5)):
        lengths = (mine, theirs) if rank == 0 else (theirs, mine)
        into = torch.zeros(lengths[1], dtype=torch.uint8)
        mesh.send_recv({other: heap(rank, other, lengths[0])}, {other: into})
        assert torch.equal(into, heap(other, rank, lengths[1]))
    found.append(digest(mesh.all_gather(heap(rank, 7, 100))))
    return found


def test_much_one_way_and_little_the_other() -> None:
    reference = digest(torch.stack([heap(rank, 7, 100) for rank in range(2)]))
    assert run_ranks(uneven_swaps, 2) == [[reference]] * 2


def collect_much(world: World) -> list[str]:
    mesh, _ = fresh(world)
    rank, size = world.rank, world.size
    found = [digest(mesh.all_gather(heap(rank, 0)))]
    found.append(digest(mesh.broadcast_(heap(rank, 1), size - 1)))
    rows = torch.stack([heap(rank, j, EIGHT_MB // 4) for j in range(size)])
    assert torch.equal(
        mesh.all_to_all(rows), torch.stack([heap(other, rank, EIGHT_MB // 4) for other in range(size)])
    )
    return found


def test_large_collectives() -> None:
    size = 3
    reference = [digest(torch.stack([heap(rank, 0) for rank in range(size)])), digest(heap(size - 1, 1))]
    assert run_ranks(collect_much, size) == [reference] * size


def converse(world: World, seed: int) -> list[tuple[int, str, int]]:
    """A hundred collectives of all lengths without a pause; those that were heard wrongly."""
    mesh, _ = fresh(world)
    rank, size = world.rank, world.size
    rng = np.random.default_rng(seed)
    wrong = []
    for i in range(100):
        what = str(rng.choice(["gather", "exchange", "broadcast", "sum"]))
        length, src = int(10 ** rng.uniform(0, 4.5)), int(rng.integers(size))
        everyone = [values(r, torch.float32, (size, length), salt=i) for r in range(size)]
        mine = everyone[rank].clone()
        if what == "gather":
            right = torch.equal(mesh.all_gather(mine), torch.stack(everyone))
        elif what == "exchange":
            right = torch.equal(mesh.all_to_all(mine), torch.stack([rows[rank] for rows in everyone]))
        elif what == "broadcast":
            right = torch.equal(mesh.broadcast_(mine, src), everyone[src])
        else:
            right = torch.equal(mesh.all_reduce_sum_(mine), in_order(everyone))
        if not right:
            wrong.append((i, what, length))
    return wrong


@pytest.mark.parametrize("size", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_long_conversation(size: int) -> None:
    """Nothing of one message is left over for the next, and nobody who is early is misunderstood."""
    assert run_ranks(converse, size, 11) == [[]] * size


# ---- Strangers -------------------------------------------------------------------------------------------

OURS, THEIRS = (hashlib.sha256(word.encode()).digest() for word in (WORD, "another"))


def number(rank: int) -> bytes:
    return rank.to_bytes(4, "little")


STRANGERS: dict[str, tuple[bytes, bool]] = {
    "another word": (THEIRS + number(2), True),
    "another word, and goes": (THEIRS + number(2), False),
    "a word of another language": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(100), True),
    "half a greeting, and goes": (OURS[:20], False),
    "the word alone, and goes": (OURS, False),
    "half a greeting, and is silent": (OURS[:20], True),
    "nothing": (b"", True),
    "nothing, and goes": (b"", False),
    "the rank of who is asked": (OURS + number(0), True),
    "a rank beyond the last": (OURS + number(3), True),
    "a rank far beyond": (OURS + bytes([255] * 4), True),
}
"""What a stranger says, and whether it stays."""


def among_strangers(world: World, kind: str) -> tuple[list[int], list[int], int]:
    """Strangers are the first at every door; what was heard afterwards, and how many were hung up on."""
    mesh_module._GREETING_SECONDS = 0.3
    mesh, ports = fresh(world)
    says, stays = STRANGERS[kind]
    guests = []
    if world.rank == 2:
        for port in ports[:2] * 2:  # the last rank's door is nobody's: it goes to the others
            guest = socket.create_connection(("127.0.0.1", port))
            guest.sendall(says)
            if stays:
                guests.append(guest)
            else:
                guest.close()
    world.barrier()
    total = mesh.all_reduce_sum_(torch.tensor([1 + world.rank, 10])).tolist()
    gathered = mesh.all_gather(torch.tensor(world.rank)).tolist()
    turned_away = sum(map(hung_up, guests))
    world.barrier()  # whose process ends hangs up on everybody
    mesh.close()
    return total, gathered, turned_away


def hung_up(guest: socket.socket) -> bool:
    guest.settimeout(PATIENCE / 4)
    with guest:
        try:
            return guest.recv(1) == b""
        except ConnectionResetError:  # it had more to say than was listened to
            return True


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_is_not_let_in_and_disturbs_nobody(kind: str) -> None:
    found = run_ranks(among_strangers, 3, kind)
    for rank, (total, gathered, turned_away) in enumerate(found):
        assert total == [6, 30]
        assert gathered == [0, 1, 2]
        assert turned_away == (4 if rank == 2 and STRANGERS[kind][1] else 0)


def test_what_goes_over_the_wire() -> None:
    """The digest of the word and not the word, the rank, and the tensor's bytes."""
    with open_listener() as door, open_listener() as own:
        peers = [Peer(0, "here", 100, port=door.getsockname()[1]), Peer(1, "here", 101)]
        mesh = SocketCollectives(1, peers, own, "localhost", WORD)
        mesh.send_recv({0: torch.tensor([1, 2, 255], dtype=torch.uint8)}, {})
        link, _ = door.accept()
        mesh.close()
        with link, link.makefile("rb") as heard:
            assert heard.read() == OURS + number(1) + bytes([1, 2, 255])


# ---- Deaths ----------------------------------------------------------------------------------------------

WAYS = "(it closed the connection|connection reset by peer|broken pipe)"


def die_in_the_middle(world: World, victim: int, noticed: Barrier) -> None:
    """The victim sends each of the others the beginning of what they wait for, and is gone."""
    mesh, _ = fresh(world)
    mesh.all_to_all(torch.zeros(world.size, 1))
    if world.rank == victim:
        for other in range(world.size):
            if other != victim:
                assert mesh._link(other).send(bytes(1_000)) == 1_000
        os._exit(9)
    try:
        mesh.all_to_all(torch.ones(world.size, EIGHT_MB // 4))
    except WorkerLost as error:
        noticed.wait(PATIENCE)  # who leaves at once would be lost to the next in turn
        raise WorkerLost(f"noticed: {error}, {world.peers[victim].pid}") from None


@pytest.mark.parametrize(("size", "victim"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (5, 3)])
def test_who_dies_in_the_middle_of_a_message_is_named(size: int, victim: int) -> None:
    ends = try_ranks(die_in_the_middle, size, victim, server().Barrier(size - 1))
    assert ends[victim].error == "died without a word"
    for rank, end in enumerate(ends):
        if rank != victim:
            said = rf"noticed: lost rank {victim} \(pid (?P<pid>\d+) on \S+\): {WAYS}, (?P=pid)$"
            assert re.search(said, (end.error or "").strip()), end.error


def hang_up_in_the_middle(world: World) -> None:
    """All that rank 1 said was heard; the rest never comes."""
    mesh, _ = fresh(world)
    mesh.all_gather(torch.zeros(1))
    if world.rank == 1:
        mesh.send_recv({0: torch.zeros(1_000)}, {})
        os._exit(9)
    mesh.send_recv({}, {1: torch.zeros(2_000)})


def test_who_hangs_up_in_the_middle_of_a_message_is_named() -> None:
    end, _ = try_ranks(hang_up_in_the_middle, 2)
    said = r"WorkerLost: lost rank 1 \(pid \d+ on \S+\): it closed the connection$"
    assert re.search(said, (end.error or "").strip()), end.error


def die_before_they_meet(world: World) -> str:
    """Rank 0 shuts its door and goes; rank 1 has not met it yet."""
    mesh, _ = fresh(world)
    if world.rank == 0:
        mesh.close()
    world.barrier()
    if world.rank == 1:
        with pytest.raises(WorkerLost) as lost:
            mesh.all_gather(torch.ones(3))
        return f"{lost.value}, {world.peers[0].pid}"
    return ""


def test_who_has_gone_before_they_met_is_named() -> None:
    _, said = run_ranks(die_before_they_meet, 2)
    assert re.fullmatch(r"lost rank 0 \(pid (\d+) on \S+\): connection refused at \S+ port \d+, \1", said)
