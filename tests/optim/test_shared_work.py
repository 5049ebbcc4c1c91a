"""Test that ranks which share Muon's products get the bits that each would have computed alone."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks, try_ranks
from torch import Tensor

from distributed_mnist.common.digest import digest
from distributed_mnist.config import Recipe
from distributed_mnist.distributed.world import World
from distributed_mnist.models.build import build
from distributed_mnist.optim import exact_muon, newton_schulz, shared_work
from distributed_mnist.optim.schedule import make_optimizer
from distributed_mnist.optim.shared_work import SharedWork, map_here, share
from distributed_mnist.training.preparation import make_state

SHAPES = ((128, 300), (96, 96), (300, 128), (5, 7), (200, 200))
RECIPE = Recipe(model="mlp", optimizer="muon", lr=0.1)


def shapes(model: str) -> tuple[tuple[int, int], ...]:
    matrices = [p for p in build(model, 10, seed=0).parameters() if p.ndim >= 2][:-1]
    return tuple((len(p), p[0].numel()) for p in matrices)


def numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def products(map_matrices: Any) -> tuple[list[str], int]:
    """Return digests of the results in both kinds of arithmetic, and how many were computed here."""
    computed = 0

    def counted(function: Any, *arguments: Tensor) -> Tensor:
        nonlocal computed
        computed += 1
        return function(*arguments)

    matrices = [numbers(seed, shape) for seed, shape in enumerate(SHAPES)]
    exact = [matrix.double() for matrix in matrices]
    norms = [matrix.norm() for matrix in exact]
    fast = map_matrices(partial(counted, newton_schulz.orthogonalise), matrices)
    slow = map_matrices(partial(counted, exact_muon.orthogonalise), exact, norms)
    assert [each.shape for each in fast] == [each.shape for each in slow] == [m.shape for m in matrices]
    return [digest(each) for each in (*fast, *slow)], computed


def share_products(world: World) -> tuple[list[str], int]:
    torch.set_num_threads(1)
    shared_work._LATENCY = 0.0  # matrices of this size would not be worth messages
    shared_work._OPERATIONS_PER_SECOND = 1e9
    work = SharedWork(world)
    work._calls = 1  # this is no call with a check
    return products(work)


@pytest.mark.parametrize("size", [3, 7])
def test_shared_results_have_the_bits_of_those_computed_alone(size: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected, count = products(map_here)
    torch.set_num_threads(threads)
    ranks = run_ranks(share_products, size)
    assert [found for found, _ in ranks] == [expected] * size
    computed = [here for _, here in ranks]
    assert sum(computed) == count == 2 * len(SHAPES)
    assert max(computed) < count
    assert (min(computed) == 0) == (size > len(SHAPES))


def step_of_a_run(world: World) -> tuple[str, bool]:
    """Return the digest of weights and state after two steps, and whether there were messages."""
    torch.set_num_threads(1)
    data: Any = SimpleNamespace(class_names=range(10), image_shape=(1, 28, 28))
    state, _ = make_state(world, RECIPE, data)
    sent = world.communication_seconds
    for step in range(2):
        for seed, p in enumerate(state.model.parameters()):
            p.grad = numbers(10 * step + seed, tuple(p.shape))
        state.optimizer.step()
    content = (dict(state.model.state_dict()), state.optimizer.state_dict())
    return digest(content), world.communication_seconds > sent


def test_the_steps_of_a_run_are_shared_and_the_same_at_any_size() -> None:
    alone = run_ranks(step_of_a_run, 1)[0]
    assert not alone[1]
    assert run_ranks(step_of_a_run, 3) == [(alone[0], True)] * 3


def compute_wrongly(world: World) -> None:
    """Rank 1 of 3 computes something else, as on faulty hardware. That a result is NaN is no fault."""
    work = SharedWork(world)
    work(lambda matrix: matrix * float("nan"), [torch.ones(1000, 1000), torch.ones(900, 900)])
    work._calls = 64
    factor = 1 + (world.rank == 1) * 1e-6
    work(lambda matrix: matrix * factor, [torch.ones(1000, 1000), torch.ones(900, 900)])


def test_a_rank_that_computes_wrongly_is_noticed() -> None:
    for end in try_ranks(compute_wrongly, 3):
        assert "TrainingError: rank 0 and rank 1 compute different steps of the optimizer" in str(end.error)


def test_only_work_that_takes_longer_than_messages_is_shared() -> None:
    assert share(shapes("cnn-small"), 2) is None
    assert share(shapes("cnn-large"), 1) is None
    assert share(shapes("cnn-large"), 2) == [1, 1, 1, 1, 0]
    assert share(shapes("cnn-large"), 8) == [4, 3, 2, 1, 0]


def test_a_group_with_a_gpu_does_not_share() -> None:
    """There a step is replayed as one graph, and all ranks must do the same."""
    peers = [SimpleNamespace(device=kind) for kind in ("cpu", "cuda")]
    mixed: Any = SimpleNamespace(size=2, rank=0, peers=peers, device=torch.device("cpu"))
    optimizer: Any = make_optimizer(RECIPE, build("mlp", 10, seed=0), mixed)
    assert optimizer._map_matrices is map_here
    peers[1].device = "cpu"
    optimizer = make_optimizer(RECIPE, build("mlp", 10, seed=0), mixed)
    assert isinstance(optimizer._map_matrices, SharedWork)
