"""The collectives of a `World` at several world sizes, in groups of real processes, on every rank."""

import os
import re
from functools import cache
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pytest
import torch
from ranks import PATIENCE, run_ranks, server, try_ranks

from distributed_mnist.distributed.world import World
from distributed_mnist.errors import DataError, WorkerLost

SIZES = (1, 2, 3, 4)


def all_collectives(world: World) -> dict[str, Any]:
    """Call every collective once, with values that differ between ranks."""
    rank, size = world.rank, world.size
    summed = torch.tensor([rank, 10 * rank, 1])
    same = world.all_reduce_sum_(summed)
    results: dict[str, Any] = {"rank": rank, "size": size, "sum in place": same is summed}
    results["sum"] = summed.tolist()
    results["max"] = world.all_reduce_max_(torch.tensor([float(rank), -float(rank), 7.5])).tolist()
    results["gather"] = world.all_gather(torch.full((2, 3), rank + 1)).numpy()
    results["gather transposed"] = world.all_gather(torch.arange(6).view(2, 3).t() + rank).numpy()
    results["gather scalar"] = world.all_gather(torch.tensor(rank)).tolist()
    results["exchange"] = world.all_to_all(
        torch.tensor([[10 * rank + j, rank] for j in range(size)])
    ).tolist()
    above, below = (rank + 1) % size, (rank - 1) % size
    theirs = torch.zeros(2, dtype=torch.int64)
    world.send_recv({above: torch.tensor([rank, 7])}, {below: theirs})
    results["swap"] = theirs.tolist()
    results["broadcast"] = world.broadcast_(torch.tensor([rank, rank + 5])).tolist()
    results["bytes"] = world.broadcast_bytes(bytes(range(256)) * 5 if rank == 0 else None)
    results["no bytes"] = world.broadcast_bytes(b"" if rank == 0 else None)
    made = []

    def make() -> dict[str, object]:
        made.append(rank)
        return {"answer": 42, "text": "é", "none": None}

    results["from rank 0"] = world.on_rank_zero(make, dict[str, Any])
    results["of all ranks"] = world.all_gather_object(Path(f"/{rank}"), Path)
    results["made on"] = made

    def fail() -> None:
        raise DataError("there is no such folder")

    try:
        world.on_rank_zero(fail, NoneType)
    except DataError as error:
        results["error"] = str(error)
    results["after the error"] = world.all_reduce_sum_(torch.ones(1)).item()
    return results


@cache
def answers(size: int) -> list[dict[str, Any]]:
    return run_ranks(all_collectives, size)


@pytest.mark.parametrize("size", SIZES)
def test_reductions(size: int) -> None:
    total = size * (size - 1) // 2
    for rank, results in enumerate(answers(size)):
        assert (results["rank"], results["size"]) == (rank, size)
        assert results["sum"] == [total, 10 * total, size]
        assert results["sum in place"]
        assert results["max"] == [size - 1, 0, 7.5]


@pytest.mark.parametrize("size", SIZES)
def test_all_gather_stacks_by_rank(size: int) -> None:
    for results in answers(size):
        assert results["gather"].shape == (size, 2, 3)
        assert [np.unique(block).tolist() for block in results["gather"]] == [[r + 1] for r in range(size)]
        expected = np.stack([np.arange(6).reshape(2, 3).T + r for r in range(size)])
        assert np.array_equal(results["gather transposed"], expected)
        assert results["gather scalar"] == list(range(size))


@pytest.mark.parametrize("size", SIZES)
def test_all_to_all_is_a_transposition(size: int) -> None:
    for rank, results in enumerate(answers(size)):
        assert results["exchange"] == [[10 * sender + rank, sender] for sender in range(size)]


@pytest.mark.parametrize("size", SIZES[1:])
def test_send_recv_between_neighbours(size: int) -> None:
    for rank, results in enumerate(answers(size)):
        assert results["swap"] == [(rank - 1) % size, 7]


@pytest.mark.parametrize("size", SIZES)
def test_broadcast(size: int) -> None:
    for rank, results in enumerate(answers(size)):
        assert results["broadcast"] == [0, 5]
        assert results["bytes"] == bytes(range(256)) * 5
        assert results["no bytes"] == b""
        assert results["from rank 0"] == {"answer": 42, "text": "é", "none": None}
        assert results["made on"] == ([0] if rank == 0 else [])
        assert results["of all ranks"] == [Path(f"/{other}") for other in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_an_error_on_rank_zero_is_raised_on_all(size: int) -> None:
    for results in answers(size):
        assert results["error"] == "there is no such folder"
        assert results["after the error"] == size  # they still make the same collective calls


def order_dependent(count: int) -> np.ndarray:
    """Floats whose sum depends on the order, with tiny and huge values."""
    drawn = np.random.default_rng(3).standard_normal(count).astype(np.float32)
    drawn *= np.float32(10.0) ** np.arange(count, dtype=np.float32).__mod__(60).__sub__(30)
    drawn[:3] = [np.float32(1e-45), np.float32(3e38), np.float32(0.1)]
    return drawn


def add_with_zeros(world: World) -> np.ndarray:
    """Each element is set by one rank only; the zeros of the others are added to it."""
    values = torch.from_numpy(order_dependent(1_000))
    mine = torch.zeros(1_000)
    places = slice(world.rank, None, world.size)
    mine[places] = values[places]
    return world.all_reduce_sum_(mine).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_a_value_and_zeros_add_up_to_the_value(size: int) -> None:
    expected = order_dependent(1_000).tobytes()
    assert [results.tobytes() for results in run_ranks(add_with_zeros, size)] == [expected] * size


def arrive(world: World, folder: str) -> list[int]:
    """Create a file, pass the barrier, count the files; in each round another rank is late."""
    seen = []
    for late in range(world.size):
        if world.rank == late:
            sum(range(2_000_000))
        Path(folder, f"{late}-{world.rank}").touch()
        world.barrier()
        seen.append(len(list(Path(folder).glob(f"{late}-*"))))
    return seen


@pytest.mark.parametrize("size", [2, 3])
def test_no_rank_passes_a_barrier_before_the_last_one(size: int, tmp_path: Any) -> None:
    assert run_ranks(arrive, size, str(tmp_path)) == [[size] * size] * size


def lose_one(world: World, victim: int, what: str, noticed: Barrier) -> None:
    """The victim exits; the others call collectives until they notice, and report who it was."""
    everyone = world.all_gather(torch.tensor([os.getpid()])).flatten().tolist()
    if world.rank == victim:
        os._exit(9)
    others = [rank for rank in range(world.size) if rank != world.rank]
    calls = {
        "sum_": lambda: world.all_reduce_sum_(torch.ones(1_000)),
        "large sum": lambda: world.all_reduce_sum_(torch.ones(100_000)),
        "max_": lambda: world.all_reduce_max_(torch.ones(1_000)),
        "gather": lambda: world.all_gather(torch.ones(1_000)),
        "exchange": lambda: world.all_to_all(torch.ones(world.size, 1_000)),
        "swap": lambda: world.send_recv(
            {rank: torch.ones(1_000) for rank in others}, {rank: torch.ones(1_000) for rank in others}
        ),
        "broadcast_bytes": lambda: world.broadcast_bytes(b"x" * 1_000 if world.rank == 0 else None),
        "from_rank_zero": lambda: world.on_rank_zero(lambda: 1, int),
        "barrier": world.barrier,
    }
    try:
        while True:
            calls[what]()
    except WorkerLost as error:
        noticed.wait(PATIENCE)  # a rank that leaves at once would be lost to the next one
        raise WorkerLost(f"noticed: {error}, {everyone[victim]}") from None


NAMES = {
    "sum_": "an all-reduce",
    "large sum": "an all-reduce",
    "max_": "an all-reduce",
    "gather": "an all-gather",
    "exchange": "an all-to-all",
    "swap": "a send-receive",
    "barrier": "an all-reduce",
    "broadcast_bytes": "a broadcast",
    "from_rank_zero": "an? (all-gather|broadcast)",
}
# Ranks that only receive from rank 0 do not notice another's death.
ONE_WAY = ("broadcast_bytes", "from_rank_zero")


@pytest.mark.parametrize(
    ("what", "size", "victim"),
    [(what, 3, victim) for what in NAMES if what not in ONE_WAY for victim in range(3)]
    + [(what, 2, victim) for what in ONE_WAY for victim in range(2)],
)
def test_the_others_notice_a_death_and_name_the_rank(what: str, size: int, victim: int) -> None:
    ends = try_ranks(lose_one, size, victim, what, server().Barrier(size - 1))
    assert ends[victim].error == "died without a word"
    message = (
        rf"WorkerLost: noticed: lost rank {victim} \(pid (?P<pid>\d+) on \S+\): "
        rf"(it closed the connection|connection reset by peer|broken pipe), in {NAMES[what]}, (?P=pid)$"
    )
    for rank, end in enumerate(ends):
        if rank != victim:
            assert end.error is not None
            assert re.search(message, end.error.strip()), end.error


def fail_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise ZeroDivisionError("on purpose")
    world.all_reduce_sum_(torch.ones(1))


def test_the_helper_names_the_rank_that_failed() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2: Traceback.*in fail_on_rank_1.*on purpose"):
        run_ranks(fail_on_rank_1, 2)
